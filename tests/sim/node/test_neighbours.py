"""A node sends on only to peers that announce its model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.membership import Announcer
from swarm.memory_network import MemoryNetwork
from swarm.node.neighbours import FRESH_S, Neighbours
from swarm.nodes_view import NodesView
from swarm.protocol.identity import Identity
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType
from swarm.virtual_time import LoopClock, run

REVISION, OTHER_REVISION = b"r" * 32, b"o" * 32
ADDRESSES = ("/ip4/192.0.2.7/tcp/1",)


def identity(number: int) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big")))


def announcer(network: MemoryNetwork, owner: Identity, revision: bytes) -> Announcer:
    record = NodeRecord(
        peer_id=owner.peer_id,
        model_name="model",
        model_revision=revision,
        number_of_blocks=4,
        shards=1,
        first_block=0,
        end_block=4,
        state=NodeState.ONLINE,
        dtype=DType.FLOAT32,
        minimum_version=1,
        maximum_version=1,
        sequence=0,
        expires_unix_s=0,
        addresses=ADDRESSES,
    )
    return Announcer(owner, network.join(owner), LoopClock(), record, hidden_size=8)


def simulate(story: Callable[[MemoryNetwork, Neighbours], Awaitable[None]]) -> None:
    async def main() -> None:
        network = MemoryNetwork(1)
        asker = network.join(identity(9))
        await story(network, Neighbours(asker, LoopClock(), REVISION))

    run(main())


@pytest.mark.parametrize(
    ("revision", "found"), [(REVISION, ADDRESSES), (OTHER_REVISION, None)], ids=["ours", "other"]
)
def test_only_hosts_of_our_model_are_found(revision: bytes, found: tuple[str, ...] | None) -> None:
    async def story(network: MemoryNetwork, neighbours: Neighbours) -> None:
        host = announcer(network, identity(1), revision)
        running = asyncio.ensure_future(host.run())
        await host.announced()
        assert await neighbours.resolve(identity(1).peer_id) == found
        assert await neighbours.resolve(identity(2).peer_id) is None
        running.cancel()

    simulate(story)


def test_who_is_gone_is_forgotten() -> None:
    async def story(network: MemoryNetwork, neighbours: Neighbours) -> None:
        peer = identity(1).peer_id
        host = announcer(network, identity(1), REVISION)
        running = asyncio.ensure_future(host.run())
        await host.announced()
        assert await neighbours.resolve(peer) == ADDRESSES
        running.cancel()
        network.crash(peer)
        assert await neighbours.resolve(peer) == ADDRESSES  # remembered
        await asyncio.sleep(FRESH_S + 900)
        assert await neighbours.resolve(peer) is None

    simulate(story)


def test_whom_the_view_knows_is_not_looked_up() -> None:
    async def main() -> None:
        network = MemoryNetwork(1)
        host = announcer(network, identity(1), REVISION)
        asker = network.join(identity(9))
        view = NodesView(asker, LoopClock(), REVISION)
        neighbours = Neighbours(asker, LoopClock(), REVISION, view)
        task = asyncio.create_task(host.run())
        await host.announced()
        await view.read()
        read_bytes = asker.directory_bytes_received
        assert await neighbours.resolve(identity(1).peer_id) == ADDRESSES
        assert asker.directory_bytes_received == read_bytes
        late = announcer(network, identity(2), REVISION)
        late_task = asyncio.create_task(late.run())
        await late.announced()
        assert await neighbours.resolve(identity(2).peer_id) == ADDRESSES
        assert asker.directory_bytes_received > read_bytes
        for running in (task, late_task):
            running.cancel()
        await asyncio.wait((task, late_task))

    run(main())
