"""A toy engine and a small swarm in memory, for tests of everything but the arithmetic.

In the toy model each output depends on every cached entry of its block and row, through SHA-256:
one token lost, doubled, reordered or at a wrong position changes all that follow.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import pytest

from swarm.client.chain import Chain, ChainObserver, ChainTimeouts, SessionRequest
from swarm.memory_network import MemoryNetwork, MemoryPeer, MemorySettings
from swarm.node.engine.api import (
    CacheRequest,
    EngineLoad,
    SessionCache,
    StepInput,
    StepOutput,
)
from swarm.node.service import NodeService, ServiceLimits
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.tensors import DType, WireTensor
from swarm.routing import ChainPlan
from swarm.routing import Hop as PlannedHop
from swarm.virtual_time import LoopClock

HIDDEN = 4
TOKEN_BYTES = HIDDEN * 4


class ToyBlocks:
    """Blocks ``[first, end)`` and their caches: the reference, and the core of the engine."""

    def __init__(self, first: int, end: int, rows: int) -> None:
        self._blocks = range(first, end)
        self._rows = rows
        self._cache: dict[tuple[int, int], list[bytes]] = {
            (block, row): [] for block in self._blocks for row in range(rows)
        }

    def step(self, data: bytes, tokens: int, position: int, row_order: Sequence[int] = ()) -> bytes:
        """Bytes of ``[rows, tokens, hidden]`` through all blocks."""
        for entries in self._cache.values():
            del entries[position:]
        if row_order:
            self._cache = {
                (block, row): list(self._cache[block, row_order[row]]) for block, row in self._cache
            }
        output = bytearray()
        for row in range(self._rows):
            for token in range(tokens):
                offset = (row * tokens + token) * TOKEN_BYTES
                value = bytes(data[offset : offset + TOKEN_BYTES])
                for block in self._blocks:
                    entries = self._cache[block, row]
                    entries.append(value)
                    digest = hashlib.sha256(b"%d" % block)
                    for entry in entries:
                        digest.update(entry)
                    value = digest.digest()[:TOKEN_BYTES]
                output += value
        return bytes(output)


@dataclass
class ToyCache:
    blocks: ToyBlocks
    tokens: int
    engine: ToyEngine
    closed: bool = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.engine.free_tokens += self.tokens


@dataclass
class ToyEngine:
    """Implements ``swarm.node.engine.api.Engine`` in virtual time."""

    first_block: int
    end_block: int
    total_tokens: int = 4096
    step_s: float = 0.001
    maximum_step_tokens: int = 8
    hidden_size: int = HIDDEN
    free_tokens: int = field(init=False)
    fail_next: Exception | None = None

    def __post_init__(self) -> None:
        self.free_tokens = self.total_tokens

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(self.total_tokens, self.free_tokens, 0, 0.0)

    def reserve(self, request: CacheRequest) -> ToyCache:
        tokens = request.rows * request.maximum_tokens
        if tokens > self.free_tokens:
            raise ProtocolError(ErrorCode.NO_CAPACITY)
        self.free_tokens -= tokens
        blocks = ToyBlocks(request.first_block, request.end_block, request.rows)
        return ToyCache(blocks, tokens, self)

    async def step(self, cache: SessionCache, step: StepInput) -> StepOutput:
        assert isinstance(cache, ToyCache)
        await asyncio.sleep(self.step_s)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        rows, tokens, hidden = step.activations.shape
        output = cache.blocks.step(
            bytes(step.activations.data), tokens, step.position, step.row_order
        )
        kept = b"".join(
            output[
                ((row + 1) * tokens - step.output_tokens) * TOKEN_BYTES : (row + 1)
                * tokens
                * TOKEN_BYTES
            ]
            for row in range(rows)
        )
        return StepOutput(
            WireTensor(DType.FLOAT32, (rows, step.output_tokens, hidden), kept), 10, 20
        )

    async def close(self) -> None:
        return None


REVISION = bytes(range(32))


class Counted:
    """A node's observer that only adds up."""

    def __init__(self) -> None:
        self.opened = self.closed = self.steps = 0
        self.codes: list[ErrorCode] = []

    def session_opened(self) -> None:
        self.opened += 1

    def session_closed(self) -> None:
        self.closed += 1

    def refused(self, code: ErrorCode) -> None:
        self.codes.append(code)

    def bytes_moved(self, *, sent: int, received: int) -> None:
        return None

    def step_done(self, *, rows: int, tokens: int, queue_us: int, compute_us: int) -> None:
        self.steps += 1


@dataclass
class ToyNode:
    peer: MemoryPeer
    engine: ToyEngine
    service: NodeService
    counted: Counted


class ToySwarm:
    """Nodes and one client in a memory network; use inside of ``virtual_time.run``."""

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        *,
        seed: int = 1,
        settings: MemorySettings | None = None,
        limits: ServiceLimits | None = None,
    ) -> None:
        self.network = MemoryNetwork(seed, settings or MemorySettings())
        self.clock = LoopClock()
        self.client = self.network.join(Identity.generate())
        self.nodes = []
        for first, end in spans:
            peer = self.network.join(Identity.generate())
            engine, counted = ToyEngine(first, end), Counted()
            service = NodeService(
                peer,
                engine,
                model_revision=REVISION,
                resolve=self._resolve,
                observer=counted,
                clock=self.clock,
                limits=limits,
            )
            self.nodes.append(ToyNode(peer, engine, service, counted))
        self.number_of_blocks = max(end for _, end in spans)

    async def _resolve(self, peer: PeerId) -> Sequence[str] | None:
        return () if any(node.peer.peer_id == peer for node in self.nodes) else None

    async def start(self) -> None:
        for node in self.nodes:
            await node.service.start()

    def plan(self, *indices: int) -> ChainPlan:
        """A chain over these nodes (all by default), each with its whole span."""
        nodes = [self.nodes[index] for index in indices or range(len(self.nodes))]
        return ChainPlan(
            tuple(
                PlannedHop(
                    peer_id=node.peer.peer_id,
                    display_name="",
                    addresses=(),
                    first_block=node.engine.first_block,
                    end_block=node.engine.end_block,
                )
                for node in nodes
            ),
            expected_step_s=0.0,
        )

    @asynccontextmanager
    async def chain(
        self,
        *indices: int,
        rows: int = 1,
        maximum_tokens: int = 128,
        observer: ChainObserver | None = None,
        timeouts: ChainTimeouts | None = None,
    ) -> AsyncIterator[Chain]:
        chain = Chain(
            self.client,
            self.plan(*indices),
            SessionRequest(REVISION, HIDDEN, rows, maximum_tokens, DType.FLOAT32),
            clock=self.clock,
            observer=observer,
            timeouts=timeouts,
        )
        running = asyncio.create_task(chain.run())
        try:
            await chain.opened()
            yield chain
        finally:
            await chain.close()
            await running

    async def assert_nothing_left(self) -> None:
        """All sessions and reservations end; whoever leaks one fails here by deadlock."""
        for node in self.nodes:
            if self.network.peer(node.peer.peer_id) is None:
                continue
            while node.service.sessions or node.engine.free_tokens < node.engine.total_tokens:
                await asyncio.sleep(1)
                if self.clock.monotonic_s() > 24 * 3600:
                    raise AssertionError("a session is never freed")
            assert node.counted.opened == node.counted.closed


def toy_tensor(random: Random, rows: int, tokens: int) -> WireTensor:
    return WireTensor(
        DType.FLOAT32, (rows, tokens, HIDDEN), random.randbytes(rows * tokens * TOKEN_BYTES)
    )


@pytest.fixture
def toy_swarm() -> type[ToySwarm]:
    return ToySwarm


@pytest.fixture
def toy_blocks() -> type[ToyBlocks]:
    return ToyBlocks


@pytest.fixture
def make_tensor() -> Callable[[Random, int, int], WireTensor]:
    return toy_tensor
