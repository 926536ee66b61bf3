"""Waits for the begin and the end of a node's working hours."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime

from swarm.node.hours import Hours

CLOCK_CHECK_S = 60.0
"""The owner's clock may be set, or the computer sleep: look at it again so often."""


async def rested(hours: Hours, leaving: asyncio.Event, resting: Callable[[str], None]) -> bool:
    """Wait until the hours begin; False when the owner leaves for good.

    ``resting`` is told when that will be, if there is anything to wait for.
    """
    while not leaving.is_set() and not _open(hours):
        resting(f"{hours.begin:%H:%M}")
        await _next_change(hours, leaving)
    return not leaving.is_set()


@asynccontextmanager
async def shift(hours: Hours, leaving: asyncio.Event) -> AsyncIterator[asyncio.Event]:
    """An event that is set when the hours end or the owner leaves for good."""
    over = asyncio.Event()

    async def watch() -> None:
        while not leaving.is_set() and _open(hours):
            await _next_change(hours, leaving)
        over.set()

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch())
        yield over
        watching.cancel()


def _open(hours: Hours) -> bool:
    return hours.contains(_local_now().time())


async def _next_change(hours: Hours, leaving: asyncio.Event) -> None:
    left_s = min(hours.seconds_to_change(_local_now()), CLOCK_CHECK_S)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(left_s):
            await leaving.wait()


def _local_now() -> datetime:
    return datetime.now()
