from __future__ import annotations

import asyncio
import time

import pytest

from swarm.virtual_time import STARTED_UNIX_S, DeadlockError, LoopClock, run


def test_an_hour_takes_no_time() -> None:
    async def main() -> float:
        clock = LoopClock()
        began_s = clock.monotonic_s()
        await clock.sleep(3600)
        assert clock.unix_s() == STARTED_UNIX_S + clock.monotonic_s()
        return clock.monotonic_s() - began_s

    began_s = time.perf_counter()
    assert run(main()) == pytest.approx(3600)
    assert time.perf_counter() - began_s < 1


def test_timers_fire_in_their_order() -> None:
    async def main() -> list[float]:
        fired = []

        async def wait(duration_s: float) -> None:
            await asyncio.sleep(duration_s)
            fired.append(duration_s)

        async with asyncio.TaskGroup() as group:
            for duration_s in (3, 1, 2.5, 0.001):
                group.create_task(wait(duration_s))
        return fired

    assert run(main()) == [0.001, 1, 2.5, 3]


def test_waiting_for_nothing_is_an_error() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError):
        run(main())


def test_timeouts_work() -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.Event().wait()

    run(main())


async def test_the_clock_follows_a_real_loop() -> None:
    clock = LoopClock()
    assert abs(clock.unix_s() - time.time()) < 1
    assert clock.monotonic_s() == pytest.approx(asyncio.get_running_loop().time(), abs=1)
