"""What a peer knows of a model's nodes."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from swarm.memory_network import LinkSettings, MemoryNetwork, MemoryPeer, MemorySettings
from swarm.nodes_view import NodesView, ViewSettings
from swarm.ports import DirectoryEntry
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.records import (
    MAX_LIFETIME_S,
    ModelIndexRecord,
    NodeRecord,
    expected_key,
    shard_key,
    sign_record,
)
from swarm.virtual_time import LoopClock, run

REVISION = b"r" * 32
CLOCK = LoopClock()

MakeIdentity = Callable[[int], Identity]
MakeRecord = Callable[..., NodeRecord]


class World:
    """Nodes whose records the tests store by hand, and one reader."""

    def __init__(
        self, network: MemoryNetwork, identity: MakeIdentity, make_record: MakeRecord
    ) -> None:
        self.network = network
        self.reader = network.join(identity(1000))
        self._identity = identity
        self._make_record = make_record
        self._peers: dict[int, MemoryPeer] = {}

    def view(self, **options: Any) -> NodesView:
        return NodesView(self.reader, CLOCK, REVISION, dice=random.Random(1), **options)

    async def announce(self, number: int, *, shards: int = 1, **changes: Any) -> PeerId:
        owner = self._identity(number)
        if number not in self._peers:
            self._peers[number] = self.network.join(owner)
        expires_unix_s = int(CLOCK.unix_s()) + changes.pop("lifetime_s", 90)
        fields = {"shards": shards, "expires_unix_s": expires_unix_s, **changes}
        record = self._make_record(owner, **fields)
        index = ModelIndexRecord(
            owner.peer_id,
            "model",
            REVISION,
            30,
            shards,
            576,
            record.sequence,
            expires_unix_s,
        )
        for item in (record, index):
            value = sign_record(owner, item)
            assert await self._peers[number].store(expected_key(item), value, expires_unix_s)
        return owner.peer_id


@pytest.fixture
def simulate(
    identity: MakeIdentity, node_record: MakeRecord
) -> Callable[[Callable[[World], Awaitable[None]]], None]:
    def simulate(story: Callable[[World], Awaitable[None]]) -> None:
        async def main() -> None:
            network = MemoryNetwork(1, MemorySettings(link=LinkSettings(latency_s=0.02)))
            await story(World(network, identity, node_record))

        run(main())

    return simulate


Simulate = Callable[[Callable[[World], Awaitable[None]]], None]


def test_a_small_swarm_is_known_whole(simulate: Simulate) -> None:
    async def story(world: World) -> None:
        peers = [await world.announce(number) for number in range(1, 6)]
        view = world.view()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(view.run())
            await view.ready()
            assert [record.peer_id for record in view.records()] == sorted(peers)
            assert (view.shards, view.shards_read) == (1, 1)
            late = await world.announce(6)
            await asyncio.sleep(35)
            assert late in {record.peer_id for record in view.records()}
            await asyncio.sleep(90)
            assert view.records() == []
            task.cancel()

    simulate(story)


def test_a_large_swarm_is_known_in_part_and_at_a_bounded_rate(simulate: Simulate) -> None:
    async def story(world: World) -> None:
        for number in range(1, 65):
            await world.announce(number, shards=64, lifetime_s=600)
        slow = ViewSettings(bytes_per_s=300.0)
        view = world.view(settings=slow)
        before = world.reader.directory_bytes_received
        started_s = CLOCK.monotonic_s()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(view.run())
            await asyncio.sleep(540)
            assert 0 < view.shards_read < view.shards == 64
            assert 0 < len(view.records()) < 64
            spent_s = CLOCK.monotonic_s() - started_s
            rate = (world.reader.directory_bytes_received - before) / spent_s
            assert rate < 1000
            task.cancel()

    simulate(story)


def test_crowded_shards_take_as_long_as_their_records_cost(simulate: Simulate) -> None:
    async def story(world: World) -> None:
        for number in range(1, 401):
            await world.announce(number, shards=4)
        settings = ViewSettings(maximum_shards=1)
        view = world.view(settings=settings)
        await view.read()
        assert 64 < len(view.records()) < 200
        assert view.pass_s * settings.bytes_per_s > 500 * len(view.records())

    simulate(story)


def test_a_view_may_be_kept_small(simulate: Simulate) -> None:
    async def story(world: World) -> None:
        for number in range(1, 41):
            await world.announce(number, shards=8)
        view = world.view(settings=ViewSettings(maximum_shards=4))
        await view.read()
        assert view.shards_read == 4
        assert 0 < len(view.records()) < 40
        pool = world.view(settings=ViewSettings(maximum_shards=4, maximum_nodes=5))
        await pool.read()
        assert len(pool.records()) == 5

    simulate(story)


def test_who_answers_with_less_makes_nobody_disappear(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        peer = await world.announce(1)
        view = world.view()
        await view.read()
        get = world.reader.get

        async def censored(
            key: str, *, until_unix_s: float = math.inf
        ) -> Mapping[PeerId, DirectoryEntry]:
            entries = dict(await get(key, until_unix_s=until_unix_s))
            return {} if key == shard_key(REVISION, 0) else entries

        monkeypatch.setattr(world.reader, "get", censored)
        await view.read()
        assert [record.peer_id for record in view.records()] == [peer]
        await asyncio.sleep(91)
        assert view.records() == []

    simulate(story)


def test_fewer_shards_are_believed_only_when_the_old_ones_are_empty(simulate: Simulate) -> None:
    async def story(world: World) -> None:
        await world.announce(1, shards=4)
        view = world.view()
        await view.read()
        assert view.shards == 4
        await world.announce(1, shards=2, sequence=2, lifetime_s=91)
        await view.read()
        assert view.shards == 4
        await asyncio.sleep(MAX_LIFETIME_S + 1)
        await world.announce(1, shards=2, sequence=3)
        await view.read()
        assert view.shards == 2

    simulate(story)


def test_uptime_is_what_a_node_says_unless_we_know_better(simulate: Simulate) -> None:
    async def story(world: World) -> None:
        day_ago = int(CLOCK.unix_s()) - 86400
        await world.announce(1, started_unix_s=day_ago)
        await world.announce(2)
        view = world.view()
        await view.read()
        await asyncio.sleep(10)
        liar = await world.announce(3, started_unix_s=day_ago)
        await view.read()
        await asyncio.sleep(10)
        uptimes_s = {node.record.peer_id: node.uptime_s(CLOCK.unix_s()) for node in view.nodes()}
        assert uptimes_s.pop(liar) == pytest.approx(10, abs=1)
        assert sorted(uptimes_s.values()) == [0.0, pytest.approx(86420, abs=2)]

    simulate(story)


def test_a_directory_that_fails_is_asked_again(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        await world.announce(1)
        get, failures = world.reader.get, iter([True] * 3)

        async def flaky(
            key: str, *, until_unix_s: float = math.inf
        ) -> Mapping[PeerId, DirectoryEntry]:
            if next(failures, False):
                raise NetworkError("the seed is down")
            return await get(key, until_unix_s=until_unix_s)

        monkeypatch.setattr(world.reader, "get", flaky)
        view = world.view()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(view.run())
            await view.ready()
            assert len(view.records()) == 1
            task.cancel()

    simulate(story)


def test_one_node_can_be_looked_up(simulate: Simulate) -> None:
    async def story(world: World) -> None:
        peer = await world.announce(1)
        view = world.view()
        assert view.record(peer) is None
        found = await view.look_up(peer)
        assert found is not None
        assert found.peer_id == peer
        assert view.record(peer) == found

    simulate(story)
