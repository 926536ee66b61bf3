"""Nodes that only say how busy they are, and sessions that only count: enough to test routing."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.client.known_nodes import KnownNodes
from swarm.client.router import Router
from swarm.connection import Connection
from swarm.memory_network import LinkSettings, MemoryNetwork, MemoryPeer, MemorySettings
from swarm.ports import DirectoryEntry, Stream
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.messages import AskLoad, LoadReport
from swarm.protocol.records import (
    ModelIndexRecord,
    NodeRecord,
    NodeState,
    model_index_key,
    shard_key,
    shard_of,
    sign_record,
)
from swarm.protocol.tensors import DType
from swarm.protocol.version import STREAM_PROTOCOL
from swarm.routing import ChainPlan, Needs
from swarm.virtual_time import LoopClock, run

REVISION = b"r" * 32
BLOCKS = 30
LINK = LinkSettings(latency_s=0.01, jitter_s=0.002)


def identity(number: int) -> Identity:
    """The same peers in each run."""
    return Identity(Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big")))


@dataclass
class QuietNode:
    """Answers how busy it is, and counts what it is asked and who uses it."""

    identity: Identity
    peer: MemoryPeer
    record: NodeRecord
    block_s: float = 0.001
    """What it really takes for a block, alone."""
    claims: float = 1.0
    """What it reports of a step, as a share of the time that it took."""
    answers_after_s: float = 0.0
    accepting: bool = True
    questions: int = 0
    sessions: int = 0
    served: int = 0

    async def serve(self, stream: Stream) -> None:
        async with Connection(stream) as connection:
            await connection.answer_hello(1.0)
            await connection.receive_only(AskLoad)
            self.questions += 1
            await asyncio.sleep(self.answers_after_s)
            await connection.send(
                LoadReport(
                    accepting=int(self.accepting),
                    queued_steps=0,
                    cache_tokens_free=self.record.cache_tokens_free,
                    busy_permille=min(1000, 500 * self.sessions),
                    sessions=self.sessions,
                )
            )

    def step_s(self, blocks: int) -> float:
        """Others cost a tenth, as in a batch."""
        return blocks * self.block_s * (1 + 0.1 * max(0, self.sessions - 1))


class QuietSwarm:
    """Nodes in a memory network and one directory for all clients; use in virtual time."""

    def __init__(self, *, shards: int = 1) -> None:
        self.network = MemoryNetwork(1, MemorySettings(link=LINK, dial_timeout_s=10.0))
        self.nodes: list[QuietNode] = []
        self.shards = shards
        self.shards_read = 0
        self.unreachable = False
        self.lifetime_s = 90.0

    async def add(
        self,
        *,
        first_block: int = 0,
        end_block: int = BLOCKS,
        latency_s: float | None = None,
        **changes: Any,
    ) -> QuietNode:
        own = identity(1 + len(self.nodes))
        node = QuietNode(own, self.network.join(own), self._record(own, first_block, end_block))
        for name, value in changes.items():
            if hasattr(node, name):
                setattr(node, name, value)
            else:
                node.record = replace(node.record, **{name: value})
        await node.peer.serve(STREAM_PROTOCOL, node.serve)
        self.nodes.append(node)
        if latency_s is not None:
            for client in range(50):
                link = LinkSettings(latency_s=latency_s)
                self.network.set_link(identity(10**6 + client).peer_id, own.peer_id, link)
        return node

    def client(self, number: int = 0, **needs: Any) -> QuietClient:
        own = identity(10**6 + number)
        peer = self.network.peer(own.peer_id) or self.network.join(own)
        return QuietClient(self, peer, seed=number, needs=Needs(REVISION, BLOCKS, **needs))

    def node(self, peer: PeerId) -> QuietNode:
        return next(node for node in self.nodes if node.peer.peer_id == peer)

    # --- Directory
    async def store(self, key: str, value: bytes, expires_unix_s: float) -> bool:
        raise NotImplementedError

    async def get(
        self, key: str, *, until_unix_s: float = math.inf
    ) -> Mapping[PeerId, DirectoryEntry]:
        """Signs only what is read: so there may be thousands of nodes."""
        self.shards_read += "/nodes/" in key
        await asyncio.sleep(0.05)
        if self.unreachable:
            raise NetworkError("nobody answers")
        expires_s = int(LoopClock().unix_s() + self.lifetime_s)
        entries: dict[PeerId, DirectoryEntry] = {}
        for node in self.nodes:
            record: NodeRecord | ModelIndexRecord
            if key == model_index_key() and len(entries) < 16:
                record = ModelIndexRecord(
                    node.peer.peer_id, "model", REVISION, BLOCKS, self.shards, 64, 1, expires_s
                )
            elif key == shard_key(REVISION, shard_of(node.peer.peer_id, self.shards)):
                record = replace(node.record, shards=self.shards, expires_unix_s=expires_s)
            else:
                continue
            value = sign_record(node.identity, record)
            entries[node.peer.peer_id] = DirectoryEntry(value, expires_s)
        return entries

    def _record(self, own: Identity, first_block: int, end_block: int) -> NodeRecord:
        return NodeRecord(
            peer_id=own.peer_id,
            model_name="model",
            model_revision=REVISION,
            number_of_blocks=BLOCKS,
            shards=1,
            first_block=first_block,
            end_block=end_block,
            state=NodeState.ONLINE,
            dtype=DType.FLOAT32,
            minimum_version=1,
            maximum_version=1,
            sequence=1,
            expires_unix_s=0,
            decode_tokens_per_s=1000,
            batched_tokens_per_s=10_000,
            cache_tokens_total=10_000,
            cache_tokens_free=10_000,
        )


class QuietClient:
    """A router, and sessions that last as long as they are told."""

    def __init__(self, swarm: QuietSwarm, peer: MemoryPeer, *, seed: int, needs: Needs) -> None:
        dice = random.Random(seed)
        self.swarm = swarm
        self.known = KnownNodes(swarm, REVISION, clock=LoopClock(), dice=dice)
        self.router = Router(peer, self.known, needs, clock=LoopClock(), dice=dice)

    async def session(self, lasting_s: float) -> ChainPlan:
        """Open a chain, use it for a while and close it."""
        plan = await self.router.plan(0, BLOCKS)
        await asyncio.sleep(4 * LINK.latency_s)
        nodes = [self.swarm.node(hop.peer_id) for hop in plan.hops]
        for node in nodes:
            node.sessions += 1
            node.served += 1
        await asyncio.sleep(lasting_s / 2)
        took_s = [
            node.step_s(hop.end_block - hop.first_block)
            for node, hop in zip(nodes, plan.hops, strict=True)
        ]
        reported_s = [node.claims * hop_s for node, hop_s in zip(nodes, took_s, strict=True)]
        self.router.passed(plan.hops, reported_s, sum(took_s) + 2 * LINK.latency_s)
        await asyncio.sleep(lasting_s / 2)
        for node in nodes:
            node.sessions -= 1
        return plan


@pytest.fixture
def quiet_swarm() -> type[QuietSwarm]:
    return QuietSwarm


@pytest.fixture
def simulate() -> Callable[[Coroutine[Any, Any, None]], None]:
    return run
