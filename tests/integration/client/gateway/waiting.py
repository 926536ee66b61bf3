"""Waits for conditions, with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

PERIOD_S = 0.005


async def until(condition: Callable[[], object], deadline_s: float = 10.0) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(PERIOD_S)


async def until_it_is(
    ask: Callable[[], Awaitable[float]], wanted: float, deadline_s: float = 10.0
) -> None:
    """Ask again until the answer is ``wanted``."""
    async with asyncio.timeout(deadline_s):
        while await ask() != wanted:  # noqa: ASYNC110
            await asyncio.sleep(10 * PERIOD_S)
