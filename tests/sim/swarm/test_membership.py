from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from swarm.membership import (
    Announcer,
    ModelSummary,
    coverage,
    list_models,
    read_nodes,
)
from swarm.memory_network import LinkSettings, MemoryNetwork, MemorySettings
from swarm.ports import DirectoryEntry
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.records import (
    ModelIndexRecord,
    NodeRecord,
    NodeState,
    expected_key,
    model_index_key,
    sign_record,
)
from swarm.virtual_time import LoopClock, run

REVISION = b"r" * 32
CLOCK = LoopClock()

MakeIdentity = Callable[[int], Identity]
MakeRecord = Callable[..., NodeRecord]
MakeAnnouncer = Callable[..., Announcer]


@pytest.fixture
def make_announcer(identity: MakeIdentity, node_record: MakeRecord) -> MakeAnnouncer:
    def make(network: MemoryNetwork, number: int, **changes: Any) -> Announcer:
        owner = identity(number)
        record = node_record(owner, **changes)
        return Announcer(owner, network.join(owner), CLOCK, record, hidden_size=576)

    return make


@asynccontextmanager
async def running(*announcers: Announcer) -> AsyncIterator[list[asyncio.Task[None]]]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(announcer.run()) for announcer in announcers]
        yield tasks
        for task in tasks:
            task.cancel()


def simulate(story: Callable[[MemoryNetwork], Awaitable[None]]) -> None:
    async def main() -> None:
        link = LinkSettings(latency_s=0.02, jitter_s=0.01)
        await story(MemoryNetwork(1, MemorySettings(link=link)))

    run(main())


def test_nodes_and_their_model_are_found_and_stay(
    make_announcer: MakeAnnouncer, identity: MakeIdentity
) -> None:
    async def story(network: MemoryNetwork) -> None:
        reader = network.join(identity(100))
        thirds = [(0, 10), (10, 20), (20, 30)]
        announcers = [
            make_announcer(network, number, first_block=first, end_block=end)
            for number, (first, end) in enumerate(thirds, 1)
        ]
        assert await list_models(reader, CLOCK) == []
        assert await read_nodes(reader, REVISION, CLOCK) == []
        async with running(*announcers):
            for pause_s in (1, 600):
                await asyncio.sleep(pause_s)
                nodes = await read_nodes(reader, REVISION, CLOCK)
                assert coverage(nodes, 30) == [1] * 30
                assert await list_models(reader, CLOCK) == [
                    ModelSummary("model", REVISION, 30, 576, 1)
                ]

    simulate(story)


def test_a_crashed_node_is_forgotten_after_three_periods(
    make_announcer: MakeAnnouncer, identity: MakeIdentity
) -> None:
    async def story(network: MemoryNetwork) -> None:
        reader = network.join(identity(100))
        announcer = make_announcer(network, 1)
        async with running(announcer):
            await asyncio.sleep(1)
        network.crash(identity(1).peer_id)
        await asyncio.sleep(85)
        assert len(await read_nodes(reader, REVISION, CLOCK)) == 1
        await asyncio.sleep(10)
        assert await read_nodes(reader, REVISION, CLOCK) == []
        assert await list_models(reader, CLOCK) == []

    simulate(story)


def test_a_change_of_state_is_announced_at_once(
    make_announcer: MakeAnnouncer, identity: MakeIdentity
) -> None:
    async def story(network: MemoryNetwork) -> None:
        reader = network.join(identity(100))
        announcer = make_announcer(network, 1, state=NodeState.JOINING)
        async with running(announcer):
            await asyncio.sleep(1)
            announcer.update(replace(announcer.record, cache_tokens_total=5, cache_tokens_free=5))
            await asyncio.sleep(1)
            (node,) = await read_nodes(reader, REVISION, CLOCK)
            assert (node.state, node.cache_tokens_free) == (NodeState.JOINING, 0)
            announcer.update(replace(announcer.record, state=NodeState.ONLINE))
            await asyncio.sleep(1)
            (node,) = await read_nodes(reader, REVISION, CLOCK)
            assert (node.state, node.cache_tokens_free) == (NodeState.ONLINE, 5)

    simulate(story)


def test_load_rides_along_with_the_next_announcement(
    make_announcer: MakeAnnouncer, identity: MakeIdentity
) -> None:
    async def story(network: MemoryNetwork) -> None:
        reader = network.join(identity(100))
        announcer = make_announcer(network, 1, cache_tokens_total=9)
        async with running(announcer):
            await asyncio.sleep(1)
            announcer.update(replace(announcer.record, cache_tokens_free=9))
            await asyncio.sleep(31)
            (node,) = await read_nodes(reader, REVISION, CLOCK)
            assert node.cache_tokens_free == 9

    simulate(story)


def test_who_leaves_is_not_routed_to_any_more(
    make_announcer: MakeAnnouncer, identity: MakeIdentity
) -> None:
    async def story(network: MemoryNetwork) -> None:
        reader = network.join(identity(100))
        announcer = make_announcer(network, 1)
        async with running(announcer):
            await asyncio.sleep(10)
        await announcer.leave()
        network.crash(identity(1).peer_id)
        (node,) = await read_nodes(reader, REVISION, CLOCK)
        assert node.state is NodeState.DRAINING
        assert coverage([node], 30) == [0] * 30
        # and back again, with the same identity
        again = make_announcer(network, 1)
        async with running(again):
            await asyncio.sleep(5)
            (node,) = await read_nodes(reader, REVISION, CLOCK)
            assert node.state is NodeState.ONLINE

    simulate(story)


def test_a_cut_node_comes_back(make_announcer: MakeAnnouncer, identity: MakeIdentity) -> None:
    async def story(network: MemoryNetwork) -> None:
        reader = network.join(identity(100))
        for number in range(101, 106):
            network.join(identity(number))
        async with running(make_announcer(network, 1)):
            await asyncio.sleep(1)
            network.partition([identity(1).peer_id])
            await asyncio.sleep(100)
            assert await read_nodes(reader, REVISION, CLOCK) == []
            network.heal()
            await asyncio.sleep(31)
            assert len(await read_nodes(reader, REVISION, CLOCK)) == 1

    simulate(story)


def test_a_directory_that_fails_is_tried_again(
    make_announcer: MakeAnnouncer,
    identity: MakeIdentity,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def story(network: MemoryNetwork) -> None:
        announcer = make_announcer(network, 1)
        peer = network.peer(identity(1).peer_id)
        assert peer is not None
        get, failures = peer.get, iter([True, True])

        async def flaky(
            key: str, *, until_unix_s: float = math.inf
        ) -> Mapping[PeerId, DirectoryEntry]:
            if next(failures, False):
                raise NetworkError("the seed is down")
            return await get(key, until_unix_s=until_unix_s)

        monkeypatch.setattr(peer, "get", flaky)
        async with running(announcer):
            await asyncio.sleep(5)
            assert len(await read_nodes(peer, REVISION, CLOCK)) == 1

    simulate(story)
    assert "the seed is down" in caplog.text


def test_only_some_list_the_model(
    make_announcer: MakeAnnouncer, identity: MakeIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarm.membership.INDEX_PUBLISHERS", 4)

    async def story(network: MemoryNetwork) -> None:
        reader = network.join(identity(100))
        announcers = [make_announcer(network, number) for number in range(1, 11)]
        async with running(*announcers):
            await asyncio.sleep(1)
            assert len(await reader.get(model_index_key())) == 10  # all began at once
            for _ in range(5):
                await asyncio.sleep(100)
                assert len(await reader.get(model_index_key())) == 4
                assert len(await read_nodes(reader, REVISION, CLOCK)) == 10

    simulate(story)


def test_a_crowded_shard_is_split_and_nobody_is_lost(
    make_announcer: MakeAnnouncer, identity: MakeIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarm.membership.CROWDED_SHARD", 9)
    monkeypatch.setattr("swarm.membership.EMPTY_SHARD", 2)

    async def story(network: MemoryNetwork) -> None:
        reader = network.join(identity(100))
        announcers = [make_announcer(network, number) for number in range(1, 13)]
        async with running(*announcers):
            for _ in range(20):
                await asyncio.sleep(10)
                assert len(await read_nodes(reader, REVISION, CLOCK)) == 12
            (model,) = await list_models(reader, CLOCK)
            assert model.shards == 2
            nodes = await read_nodes(reader, REVISION, CLOCK)
            assert {node.shards for node in nodes} == {2}

    simulate(story)


def test_of_many_shards_some_are_read(identity: MakeIdentity, node_record: MakeRecord) -> None:
    async def story(network: MemoryNetwork) -> None:
        reader = network.join(identity(100))
        expires_unix_s = int(CLOCK.unix_s()) + 60
        peers = {number: network.join(identity(number)) for number in range(1, 41)}
        for number, peer in peers.items():
            owner = identity(number)
            index = ModelIndexRecord(
                owner.peer_id, "model", REVISION, 30, 16, 576, 1, expires_unix_s
            )
            node = node_record(owner, shards=16, expires_unix_s=expires_unix_s)
            for record in (index, node):
                assert await peer.store(
                    expected_key(record), sign_record(owner, record), expires_unix_s
                )
        some = await read_nodes(reader, REVISION, CLOCK, dice=random.Random(1))
        other = await read_nodes(reader, REVISION, CLOCK, dice=random.Random(2))
        assert 0 < len(some) < 40
        assert some != other
        everybody = await read_nodes(reader, REVISION, CLOCK, maximum_shards=16)
        assert len(everybody) == 40

    simulate(story)
