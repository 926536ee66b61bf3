"""Time for simulations: an asyncio loop that jumps to its next timer, and a clock for any loop.

Under :func:`run` an hour of waiting takes no time, and the same program makes the same steps in the
same order. Threads and sockets have no place in it: nothing may become ready except by a timer.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

STARTED_UNIX_S = 1_800_000_000.0
"""Unix time at which every simulation starts."""


class DeadlockError(RuntimeError):
    """Everybody waits and no timer is set: in real time the program would hang forever."""


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for a timeout, moves the clock by it."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise DeadlockError("nothing is scheduled and the main task is not done")
        self.now_s += max(timeout, 0.0)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when every task waits."""

    def __init__(self) -> None:
        self._jumping_selector = _JumpingSelector()
        super().__init__(self._jumping_selector)

    def time(self) -> float:
        return self._jumping_selector.now_s

    def unix_s(self) -> float:
        """Unix time of the simulation."""
        return STARTED_UNIX_S + self.time()


def run(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` in virtual time. Raises DeadlockError where it would hang."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


class LoopClock:
    """``ports.Clock`` of the running loop, real or virtual."""

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def unix_s(self) -> float:
        loop = asyncio.get_running_loop()
        return loop.unix_s() if isinstance(loop, VirtualTimeLoop) else time.time()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)
