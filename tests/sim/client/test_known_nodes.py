"""What a client remembers of nodes, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from swarm.client.known_nodes import LONGER_TRIP_WEIGHT, MEASUREMENT_AGE_S, OPENING_S, SMOOTHING_S
from swarm.routing import UNKNOWN_ROUND_TRIP_S

QuietSwarm = Any
Simulate = Callable[[Coroutine[Any, Any, None]], None]


def test_a_shorter_round_trip_counts_at_once(
    quiet_swarm: type[QuietSwarm], simulate: Simulate
) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        peer = (await swarm.add()).peer.peer_id
        known = swarm.client().known
        assert known.round_trip_s(peer) == UNKNOWN_ROUND_TRIP_S
        for measured_s, remembered_s in (
            (0.5, 0.5),
            (0.1, 0.1),
            (0.3, 0.1 + 0.2 * LONGER_TRIP_WEIGHT),
        ):
            known.measured_round_trip(peer, measured_s)
            assert known.round_trip_s(peer) == pytest.approx(remembered_s)

    simulate(story())


def test_measured_speed(quiet_swarm: type[QuietSwarm], simulate: Simulate) -> None:
    """The node announces 1 ms for a block, and a tenth more for each other step in the batch."""

    async def story() -> None:
        swarm = quiet_swarm()
        node = await swarm.add()
        peer, known = node.peer.peer_id, swarm.client().known
        assert known.slowness(node.record) == 1.0
        known.served(peer, blocks=10, step_s=0.02)
        assert known.slowness(node.record) == pytest.approx(2.0)
        known.served(peer, blocks=10, step_s=0.04)  # the mean of both
        assert known.slowness(node.record) == pytest.approx(3.0)
        for _ in range(6000):  # the mean of the last minute
            await asyncio.sleep(0.1)
            known.served(peer, blocks=10, step_s=0.01)
        assert known.slowness(node.record) == pytest.approx(1.0, abs=0.01)
        await asyncio.sleep(SMOOTHING_S)
        known.served(peer, blocks=10, step_s=0.05)
        assert known.slowness(node.record) == pytest.approx(5.0)
        await asyncio.sleep(MEASUREMENT_AGE_S + 1)
        assert known.slowness(node.record) == 1.0

    simulate(story())


def test_a_busy_node_is_not_a_slow_one(quiet_swarm: type[QuietSwarm], simulate: Simulate) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        node = await swarm.add()
        known = swarm.client().known
        known.reported(node.peer.peer_id, others=10)
        known.served(node.peer.peer_id, blocks=10, step_s=0.02)
        assert known.slowness(node.record) == pytest.approx(1.0)

    simulate(story())


def test_openings_are_counted_for_a_moment(
    quiet_swarm: type[QuietSwarm], simulate: Simulate
) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        one, other = (await swarm.add()).peer.peer_id, (await swarm.add()).peer.peer_id
        known = swarm.client().known
        for _ in range(3):
            known.opening(one)
        assert (known.openings(one), known.openings(other)) == (3, 0)
        await asyncio.sleep(OPENING_S)
        assert known.openings(one) == 0

    simulate(story())


def test_reads_at_the_same_time_are_one(quiet_swarm: type[QuietSwarm], simulate: Simulate) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        await swarm.add()
        known = swarm.client().known
        assert (
            await asyncio.gather(*(known.refresh(older_than_s=60) for _ in range(5))) == [True] * 5
        )
        assert not await known.refresh(older_than_s=60)
        assert swarm.shards_read == 1

    simulate(story())


def test_a_slow_read_keeps_nobody_waiting_who_has_a_young_view(
    quiet_swarm: type[QuietSwarm], simulate: Simulate
) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        await swarm.add()
        known, loop = swarm.client().known, asyncio.get_running_loop()
        await known.refresh(older_than_s=0)
        await asyncio.sleep(30)
        reading = asyncio.create_task(known.refresh(older_than_s=10))
        await asyncio.sleep(0.01)
        started_s = loop.time()
        assert not await known.refresh(older_than_s=60)
        assert loop.time() == started_s
        assert await reading

    simulate(story())
