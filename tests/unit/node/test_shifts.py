"""A node's working hours, by a clock that the test sets."""

from __future__ import annotations

import asyncio
from datetime import datetime

import pytest

from swarm.node import shifts
from swarm.node.hours import parse_hours
from swarm.virtual_time import run

NIGHT = parse_hours("20:00-08:00")


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local time starts at 19:00 and goes with the loop's virtual clock."""

    def now() -> datetime:
        start = datetime.fromisoformat("2026-03-01T19:00:00")
        return datetime.fromtimestamp(start.timestamp() + asyncio.get_running_loop().time())

    monkeypatch.setattr(shifts, "_local_now", now)


@pytest.mark.usefixtures("at")
def test_a_node_rests_until_its_hours_begin_and_works_until_they_end() -> None:
    async def days() -> None:
        leaving, said = asyncio.Event(), set[str]()
        began = asyncio.get_running_loop().time()
        for day in range(2):
            assert await shifts.rested(NIGHT, leaving, said.add)
            clock = asyncio.get_running_loop().time() - began
            assert clock == pytest.approx((day * 24 + 1) * 3600, abs=1)
            async with shifts.shift(NIGHT, leaving) as over:
                await over.wait()
            clock = asyncio.get_running_loop().time() - began
            assert clock == pytest.approx((day * 24 + 13) * 3600, abs=1)
        assert said == {"20:00"}

    run(days())


@pytest.mark.usefixtures("at")
def test_the_owner_may_leave_for_good_at_any_time() -> None:
    async def leave() -> None:
        leaving = asyncio.Event()
        resting = asyncio.create_task(shifts.rested(NIGHT, leaving, lambda until: None))
        await asyncio.sleep(10)
        leaving.set()
        assert await resting is False
        leaving.clear()
        assert await shifts.rested(NIGHT, leaving, lambda until: None)
        async with shifts.shift(NIGHT, leaving) as over:
            await asyncio.sleep(10)
            assert not over.is_set()
            leaving.set()
            await over.wait()

    run(leave())
