"""How many threads the device thread's products use, by how much others use this machine's cores.

Threads of one product wait for each other: where another process has taken the core of one, all
of them stand. Two nodes that are busy on two cores take 117 ms for a step with two threads each,
and 41 ms with one. So a node watches how long its threads wait for a core, and gives threads up
while they do. Alone on the machine it uses all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

WINDOW_S = 0.25
"""Measured over this much computing."""
TOLERATED_WAIT = 0.25
"""Waiting for a core, as a share of computing, that is no contention yet."""
FIRST_HOLD_S = 1.0
LONGEST_HOLD_S = 4.0
PAUSE_S = 1.0
"""After so long without computing, what was measured before says nothing of now."""


class ThreadGovernor:
    """Chooses a number of threads. Pure: measurements and time come in as arguments.

    It halves the number when threads wait for cores, and doubles it again after a hold; the hold
    grows each time that this turns out to be too early.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = max(1, maximum)
        self.threads = self._maximum
        self._hold_s = FIRST_HOLD_S
        self._held_until_s = 0.0

    def begin(self, now_s: float) -> int:
        """The number to use after a pause: all, unless giving threads up has just been decided."""
        if now_s >= self._held_until_s:
            self.threads = self._maximum
        return self.threads

    def update(self, now_s: float, computed_s: float, waited_s: float) -> int:
        """The number to use now, after a window of computing with ``waited_s`` in queues."""
        contended = waited_s > TOLERATED_WAIT * computed_s
        if contended and self.threads > 1:
            if now_s < self._held_until_s + self._hold_s:
                self._hold_s = min(2 * self._hold_s, LONGEST_HOLD_S)
            self.threads = max(1, self.threads // 2)
            self._held_until_s = now_s + self._hold_s
        elif not contended and now_s >= self._held_until_s:
            if self.threads == self._maximum:
                self._hold_s = FIRST_HOLD_S
            else:
                self.threads = min(self._maximum, 2 * self.threads)
        return self.threads


class ContentionMeter:
    """Feeds a governor from the device thread; tells when the number of threads changes."""

    def __init__(
        self,
        governor: ThreadGovernor,
        set_threads: Callable[[int], None],
        read_waited_s: Callable[[], float | None],
    ) -> None:
        self._governor = governor
        self._set_threads = set_threads
        self._read_waited_s = read_waited_s
        self._computed_s = 0.0
        self._ended_s = float("-inf")
        self._waited_before_s = read_waited_s()

    def begins(self, now_s: float) -> None:
        """A batch is about to be computed."""
        if now_s - self._ended_s < PAUSE_S or self._waited_before_s is None:
            return
        before = self._governor.threads
        self._computed_s, self._waited_before_s = 0.0, self._read_waited_s()
        if self._governor.begin(now_s) != before:
            self._set_threads(self._governor.threads)

    def computed(self, now_s: float, duration_s: float) -> None:
        """A batch took ``duration_s``; reads the kernel's counters once a window."""
        self._computed_s += duration_s
        self._ended_s = now_s
        if self._computed_s < WINDOW_S or self._waited_before_s is None:
            return
        waited_s = self._read_waited_s()
        if waited_s is None:
            return
        before = self._governor.threads
        after = self._governor.update(now_s, self._computed_s, waited_s - self._waited_before_s)
        self._computed_s, self._waited_before_s = 0.0, waited_s
        if after != before:
            self._set_threads(after)


def read_waited_s(threads: Collection[int], tasks: Path = Path("/proc/self/task")) -> float | None:
    """How long these threads have waited for a core so far; None where the kernel does not tell.

    Only those that compute count. The event loop of a node also waits, for the cores on which the
    other nodes of a chain compute, one after the other; giving threads up would help nobody.
    """
    waited_ns = 0
    try:
        for thread in os.listdir(tasks):
            if int(thread) not in threads:
                continue
            try:
                _, waited = (tasks / thread / "schedstat").read_text().split()[:2]
            except FileNotFoundError:  # the thread ended meanwhile
                continue
            waited_ns += int(waited)
    except (OSError, ValueError):
        return None
    return waited_ns / 1e9
