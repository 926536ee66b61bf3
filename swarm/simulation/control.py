"""Control traffic of a node in swarms of any size.

Real: ``Announcer``, ``NodesView`` and ``Buddies`` of some nodes (the actors), their signed records,
shards, record validation, over ``swarm.memory_network``, which counts what lookups, stores and
answers of the directory cost. Of all other nodes there are the peer, which keeps directory entries
and answers pings, and a record that was announced at the start. Since every node causes what an
actor causes, the traffic of all peers divided by the actors is what each node sends, what it does
for others included.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from swarm import virtual_time
from swarm.buddies import Buddies
from swarm.connection import Connection
from swarm.membership import Announcer
from swarm.memory_network import LinkSettings, MemoryNetwork, MemoryPeer, MemorySettings
from swarm.nodes_view import NodesView
from swarm.ports import DirectoryEntry, Stream
from swarm.protocol.identity import Identity
from swarm.protocol.messages import Ping, Pong
from swarm.protocol.records import (
    MAX_LIFETIME_S,
    ModelIndexRecord,
    NodeRecord,
    NodeState,
    expected_key,
    sign_record,
)
from swarm.protocol.tensors import DType
from swarm.protocol.version import MAXIMUM_VERSION, MINIMUM_VERSION, STREAM_PROTOCOL
from swarm.simulation.population import dice_of
from swarm.simulation.sessions import simulated_identity
from swarm.virtual_time import LoopClock

REVISION = bytes(31) + b"1"
RECORDS_PER_SHARD = 64
INDEX_PUBLISHERS = 16
ANSWER_TIMEOUT_S = 5.0
LINK = LinkSettings(latency_s=0.02, jitter_s=0.005)


@dataclass(frozen=True, slots=True)
class ControlResult:
    """For one node; every byte counts once, so that a node sends as many and receives as many."""

    shards: int
    known_nodes: float
    """That a view holds, at the end."""
    directory_bytes_per_s: float
    stream_bytes_per_s: float
    """Pings between buddies."""
    bytes_per_s: float


def simulate_control(
    nodes: int, *, seed: int = 0, actors: int = 32, seconds: float = 600.0
) -> ControlResult:
    """In virtual time, at most the lifetime of a record."""
    if seconds >= MAX_LIFETIME_S - 60:
        raise ValueError("the records of the other nodes would expire")
    return virtual_time.run(_simulate(nodes, seed, min(actors, nodes), seconds))


async def _simulate(nodes: int, seed: int, actors: int, seconds: float) -> ControlResult:
    clock = LoopClock()
    stream_bytes = 0

    def count(now_s: float, event: str) -> None:
        nonlocal stream_bytes
        if event.startswith("send "):
            stream_bytes += int(event.rsplit(" ", 1)[1])

    network = MemoryNetwork(seed, MemorySettings(link=LINK), clock=clock, on_event=count)
    shards, listed = 1, 0
    while nodes / shards > 2 * RECORDS_PER_SHARD:
        shards *= 2
    identities = [simulated_identity(seed, f"node {number}") for number in range(nodes)]
    peers = [network.join(identity) for identity in identities]
    acting = dice_of(seed, "actors").sample(range(nodes), actors)
    for number, (identity, peer) in enumerate(zip(identities, peers, strict=True)):
        await peer.serve(STREAM_PROTOCOL, _answer_pings)
        if number in acting:
            continue  # announces itself
        expires_unix_s = int(clock.unix_s()) + MAX_LIFETIME_S - 10
        record = replace(_record(identity, number), shards=shards, expires_unix_s=expires_unix_s)
        _keep(network, peer, record, sign_record(identity, record))
        if listed < INDEX_PUBLISHERS:
            listed += 1
            index = ModelIndexRecord(
                identity.peer_id, "model", REVISION, 80, shards, 8192, 1, expires_unix_s
            )
            _keep(network, peer, index, sign_record(identity, index))
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        views = []
        tasks = []
        for number in acting:
            identity, peer = identities[number], peers[number]
            stack.push_async_callback(peer.close)
            dice = dice_of(seed, "actor", str(number))
            announcer = Announcer(
                identity, peer, clock, _record(identity, number), hidden_size=8192
            )
            view = NodesView(peer, clock, REVISION, own=identity.peer_id, dice=dice)
            buddies = Buddies(identity, peer, peer, clock, view, model_revision=REVISION, dice=dice)
            views.append(view)
            tasks += [group.create_task(part()) for part in (announcer.run, view.run, buddies.run)]
        await asyncio.sleep(120.0)  # the first reads are faster than the later ones
        directory_before, stream_before = _directory_bytes(peers), stream_bytes
        await asyncio.sleep(seconds)
        directory = (_directory_bytes(peers) - directory_before) / actors / seconds
        streams = (stream_bytes - stream_before) / actors / seconds
        known = sum(len(view.records()) for view in views) / actors
        for task in tasks:
            task.cancel()
    return ControlResult(shards, known, directory, streams, directory + streams)


def _directory_bytes(peers: list[MemoryPeer]) -> int:
    return sum(peer.directory_bytes_sent for peer in peers)


def _keep(
    network: MemoryNetwork,
    peer: MemoryPeer,
    record: NodeRecord | ModelIndexRecord,
    value: bytes,
) -> None:
    """Lay an entry down where it belongs, without traffic."""
    key = expected_key(record)
    entry = DirectoryEntry(value, record.expires_unix_s)
    nearest = network.nearest(key, peer)
    for _ in range(network.settings.directory_replicas):
        keeper = next(nearest, None)
        if keeper is not None:
            keeper.keep(key, peer.peer_id, entry)


async def _answer_pings(stream: Stream) -> None:
    """What a node's service does with a buddy's stream."""
    async with Connection(stream) as connection:
        await connection.answer_hello(ANSWER_TIMEOUT_S)
        while True:
            ping = await connection.receive_only(Ping)
            await connection.send(Pong(nonce=ping.nonce))


def _record(identity: Identity, number: int) -> NodeRecord:
    first_block = number * 7 % 60
    return NodeRecord(
        peer_id=identity.peer_id,
        model_name="an organisation/a model of common size",
        model_revision=REVISION,
        number_of_blocks=80,
        shards=1,
        first_block=first_block,
        end_block=first_block + 20,
        state=NodeState.ONLINE,
        dtype=DType.BFLOAT16,
        minimum_version=MINIMUM_VERSION,
        maximum_version=MAXIMUM_VERSION,
        sequence=1,
        expires_unix_s=0,
        decode_tokens_per_s=500,
        prefill_tokens_per_s=9000,
        batched_tokens_per_s=4000,
        cache_tokens_total=100_000,
        cache_tokens_free=60_000,
        addresses=(
            "/ip4/203.0.113.77/tcp/31337",
            "/ip4/203.0.113.77/udp/31337/quic",
        ),
        software="0.1.0",
        display_name=f"volunteer {number}",
        organisation="an organisation",
        country="KE",
        started_unix_s=1,
    )
