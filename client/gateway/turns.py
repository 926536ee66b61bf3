"""Whose answer begins next: keys take turns, however many requests each of them has waiting."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class TooManyWaiting(Exception):
    """The queue is full."""


class Turns:
    """Lets a number of answers run at a time. One event loop."""

    def __init__(self, maximum_running: int, maximum_waiting: int) -> None:
        self._free = maximum_running
        self._maximum_waiting = maximum_waiting
        self._waiting: OrderedDict[str, deque[tuple[int, asyncio.Future[None]]]] = OrderedDict()
        self._waiters = 0
        self.running = 0

    @property
    def waiting(self) -> int:
        return self._waiters

    @asynccontextmanager
    async def turn(self, key_id: str, answers: int = 1) -> AsyncIterator[None]:
        """Wait for room for ``answers``, then hold it. Raises TooManyWaiting at once."""
        await self._acquire(key_id, answers)
        try:
            yield
        finally:
            self._release(answers)

    async def _acquire(self, key_id: str, answers: int) -> None:
        if self._waiters == 0 and self._fits(answers):
            self._start(answers)
            return
        if self._waiters >= self._maximum_waiting:
            raise TooManyWaiting
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (answers, granted)
        self._waiting.setdefault(key_id, deque()).append(entry)
        self._waiters += 1
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self._release(answers)
            else:
                self._forget(key_id, entry)
                self._grant()
            raise

    def _fits(self, answers: int) -> bool:
        # A request for more than there is at all runs alone.
        return answers <= self._free or self.running == 0

    def _start(self, answers: int) -> None:
        self._free -= answers
        self.running += answers

    def _release(self, answers: int) -> None:
        self._free += answers
        self.running -= answers
        self._grant()

    def _grant(self) -> None:
        while self._waiting:
            key_id, queue = next(iter(self._waiting.items()))
            answers, granted = queue[0]
            if not self._fits(answers):
                return
            queue.popleft()
            self._waiters -= 1
            # The key's next one comes after those of all others.
            del self._waiting[key_id]
            if queue:
                self._waiting[key_id] = queue
            self._start(answers)
            granted.set_result(None)

    def _forget(self, key_id: str, entry: tuple[int, asyncio.Future[None]]) -> None:
        queue = self._waiting[key_id]
        queue.remove(entry)
        self._waiters -= 1
        if not queue:
            del self._waiting[key_id]
