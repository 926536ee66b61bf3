"""The device thread and its OpenMP team: how many threads, and on which cores.

A step is short and comes after a pause, in which the team sleeps. Some kernels then wake two of its
threads on the same core and take longer than the step to part them: 25 ms instead of 10 for ten
blocks of a small model. So when the team is as large as the machine, each thread gets a core of its
own. With fewer threads the kernel has room, and is left to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from pathlib import Path

import torch

from swarm.node.engine.contention import read_waited_s

NAME = b"swarm-device"
_PR_SET_NAME = 15
_ELEMENTS_PER_THREAD = 1 << 16
"""Enough for torch to give every thread of the team a part."""


class DeviceThreads:
    """Sets the team of the calling thread. All methods are for the device thread itself."""

    def __init__(self) -> None:
        self._cores: tuple[int, ...] = ()
        self._team: set[int] = {threading.get_native_id()}
        if sys.platform == "linux":
            # The threads that it starts inherit the name, and so can be told from all others.
            ctypes.CDLL(None).prctl(_PR_SET_NAME, NAME, 0, 0, 0)
            self._cores = tuple(sorted(os.sched_getaffinity(0)))

    def use(self, count: int) -> None:
        """Compute with ``count`` threads from now on."""
        torch.set_num_threads(count)
        if len(self._cores) < 2:
            return
        before = _threads_named(NAME)  # torch has other pools, which never compute here
        torch.zeros(count * _ELEMENTS_PER_THREAD).add_(1)  # the team exists once it has worked
        after = _threads_named(NAME)
        self._team = (self._team | (after - before)) & after
        if count == len(self._cores) == len(self._team):
            # Nodes on one machine begin with different cores.
            first = os.getpid() % count
            for offset, thread in enumerate(sorted(self._team)):
                _allow(thread, {self._cores[(first + offset) % count]})
        else:
            for thread in self._team:
                _allow(thread, set(self._cores))

    def waited_s(self) -> float | None:
        """How long the team has waited for cores so far; None where unknown."""
        return read_waited_s(self._team)


def _threads_named(name: bytes) -> set[int]:
    named = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # the thread ended meanwhile
            if (task / "comm").read_bytes().strip() == name:
                named.add(int(task.name))
    return named


def _allow(thread: int, cores: set[int]) -> None:
    with contextlib.suppress(OSError):  # a wish: without it the thread computes all the same
        os.sched_setaffinity(thread, cores)
