from __future__ import annotations

import asyncio

import pytest

from swarm.client.gateway.limits import Allowance, KeyLimits, Usages
from swarm.client.gateway.turns import TooManyWaiting, Turns

LIMITS = KeyLimits(requests_per_minute=60, tokens_per_minute=600, answers=2)


def test_an_allowance_fills_evenly() -> None:
    allowance = Allowance(60, 60, 0)
    for _ in range(60):
        assert allowance.wait_s(0) == 0
        allowance.take(0, 1)
    assert allowance.wait_s(0) == pytest.approx(1)
    assert allowance.wait_s(0.5) == pytest.approx(0.5)
    assert allowance.wait_s(1) == 0
    allowance.take(1000, 1)
    assert allowance.level == 59


def test_an_allowance_may_be_overdrawn_once() -> None:
    tokens = Allowance(600, 600, 0)
    assert tokens.wait_s(0, 5000) == 0  # more than there ever is: when it is full
    tokens.take(0, 5000)
    assert tokens.wait_s(0, 1) == pytest.approx(440.1)


def test_a_clock_that_goes_back_gives_nothing() -> None:
    allowance = Allowance(60, 0, 100)
    assert allowance.wait_s(50) == pytest.approx(1)
    assert allowance.wait_s(100.5) == pytest.approx(0.5)


def test_usages_are_forgotten_when_they_do_not_matter() -> None:
    usages = Usages()
    usages.of("busy", LIMITS, 0).answers = 1
    for number in range(1000):
        usages.of(str(number), LIMITS, 1).requests.take(1, 1)
    assert usages.of("busy", LIMITS, 500).answers == 1
    assert len(usages._usages) == 1
    doubled = KeyLimits(120, 600, 2)
    assert usages.of("busy", doubled, 500).requests.per_minute == 120
    assert usages.of("busy", doubled, 500).answers == 1


async def test_keys_take_turns() -> None:
    turns = Turns(1, 10)
    order: list[str] = []

    async def answer(key: str) -> None:
        async with turns.turn(key):
            order.append(key)
            await asyncio.sleep(0)

    async with turns.turn("first"):
        tasks = [asyncio.create_task(answer(key)) for key in "aaaabc"]
        await asyncio.sleep(0)
        assert (turns.running, turns.waiting) == (1, 6)
    await asyncio.gather(*tasks)
    assert "".join(order) == "abcaaa"
    assert (turns.running, turns.waiting) == (0, 0)


async def test_several_answers_wait_for_room_for_all() -> None:
    turns = Turns(3, 10)
    async with turns.turn("a", 2):
        large, small = turns.turn("b", 2), turns.turn("c", 1)
        waiting = [asyncio.create_task(turn.__aenter__()) for turn in (large, small)]
        await asyncio.sleep(0)
        # The small one would fit, but then large ones would wait for ever.
        assert not any(task.done() for task in waiting)
    await asyncio.gather(*waiting)
    assert turns.running == 3


async def test_more_than_there_is_runs_alone() -> None:
    turns = Turns(2, 10)
    async with turns.turn("a", 5):
        assert turns.running == 5


async def test_those_that_give_up_leave_nothing() -> None:
    turns = Turns(1, 10)
    async with turns.turn("a"):
        waiting = [asyncio.create_task(turns.turn("b").__aenter__()) for _ in range(3)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert turns.waiting == 0
    # Cancelled in the moment in which it was granted.
    async with turns.turn("a"):
        late = asyncio.create_task(turns.turn("b").__aenter__())
        await asyncio.sleep(0)
    late.cancel()
    await asyncio.gather(late, return_exceptions=True)
    assert (turns.running, turns.waiting) == (0, 0)


async def test_a_full_queue_refuses() -> None:
    turns = Turns(1, 1)
    async with turns.turn("a"):
        waiting = asyncio.create_task(turns.turn("a").__aenter__())
        await asyncio.sleep(0)
        with pytest.raises(TooManyWaiting):
            await turns.turn("b").__aenter__()
    await waiting
