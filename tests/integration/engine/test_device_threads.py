"""The device thread's team: its size, and a core for each thread when it fills the machine."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from swarm.node.engine.device_threads import NAME, DeviceThreads, _threads_named

CORES = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []


def in_a_thread(work: Callable[[], None]) -> None:
    """Run on a thread of its own, as the device thread is; raise what it raises."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    before = torch.get_num_threads()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    if failures:
        raise failures[0]


@pytest.mark.skipif(len(CORES) < 2, reason="needs Linux and two cores")
def test_a_team_that_fills_the_machine_has_a_core_for_each_thread() -> None:
    def work() -> None:
        team = DeviceThreads()
        team.use(len(CORES))
        assert torch.get_num_threads() == len(CORES)
        pinned = [os.sched_getaffinity(thread) for thread in team._team]
        assert sorted(pinned, key=min) == [{core} for core in CORES]
        # With fewer threads the kernel places them; back at full size each has its core again.
        team.use(1)
        assert torch.get_num_threads() == 1
        assert os.sched_getaffinity(0) == set(CORES)
        team.use(len(CORES))
        assert {min(os.sched_getaffinity(thread)) for thread in team._team} == set(CORES)
        assert team._team <= _threads_named(NAME)

    in_a_thread(work)


def test_other_threads_keep_their_cores() -> None:
    in_a_thread(lambda: DeviceThreads().use(torch.get_num_threads()))
    if sys.platform == "linux":
        assert sorted(os.sched_getaffinity(0)) == CORES
