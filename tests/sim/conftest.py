"""A toy engine and a small swarm in memory, for tests of everything but the arithmetic.

In the toy model each output depends on every cached entry of its block and row, through SHA-256:
one token lost, doubled, reordered or at a wrong position changes all that follow.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import pytest

from swarm.client.adapter_push import AdapterSource
from swarm.client.bans import FailureKind
from swarm.client.chain import Chain, ChainObserver, ChainTimeouts
from swarm.client.hops import SessionRequest
from swarm.client.purse import AskGrant
from swarm.client.vouchers import issue_for_ourselves
from swarm.journal import JournalBudget
from swarm.ledger import node_books
from swarm.ledger.commits import DirectCommits
from swarm.ledger.node_books import LedgerReader, LedgerStore
from swarm.memory_network import MemoryNetwork, MemoryPeer, MemorySettings
from swarm.node.accounts import LedgerTerms, NodeLedger
from swarm.node.engine.api import (
    CacheRegion,
    CacheRequest,
    CacheState,
    EngineLoad,
    SessionCache,
    StepInput,
    StepOutput,
)
from swarm.node.service import NodeService, ServiceLimits
from swarm.protocol.adapter_index import AdapterIndex, ModuleSpec, TensorSpec
from swarm.protocol.errors import ErrorCode, NoRouteError, ProtocolError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.policy import Policy
from swarm.protocol.tensors import DType, WireTensor
from swarm.routing import ChainPlan
from swarm.routing import Hop as PlannedHop
from swarm.simulation.toy_engine import HIDDEN, TOKEN_BYTES, finite_token
from swarm.virtual_time import LoopClock


class ToyBlocks:
    """Blocks ``[first, end)`` and their caches: the reference, and the core of the engine."""

    def __init__(self, first: int, end: int, rows: int, adapter_id: bytes = b"") -> None:
        self.blocks = range(first, end)
        self.adapter_id = adapter_id
        self.rows = rows
        self._cache: dict[tuple[int, int], list[bytes]] = {
            (block, row): [] for block in self.blocks for row in range(rows)
        }

    @property
    def length(self) -> int:
        return min(map(len, self._cache.values()))

    def cut(self, position: int) -> None:
        for entries in self._cache.values():
            del entries[position:]

    def read(self, region: CacheRegion) -> bytes:
        positions = slice(region.first_position, region.end_position)
        return b"".join(
            entry
            for row in range(self.rows)
            for entry in self._cache[region.first_block, row][positions]
        )

    def write(self, region: CacheRegion, data: bytes) -> None:
        """Positions that nobody has written yet are zeros, as in a real cache."""
        count = region.end_position - region.first_position
        for row in range(self.rows):
            entries = self._cache[region.first_block, row]
            entries += [bytes(TOKEN_BYTES)] * (region.end_position - len(entries))
            for index in range(count):
                start = (row * count + index) * TOKEN_BYTES
                entries[region.first_position + index] = data[start : start + TOKEN_BYTES]

    def step(self, data: bytes, tokens: int, position: int, row_order: Sequence[int] = ()) -> bytes:
        """Bytes of ``[rows, tokens, hidden]`` through all blocks."""
        self.cut(position)
        if row_order:
            self._cache = {
                (block, row): list(self._cache[block, row_order[row]]) for block, row in self._cache
            }
        output = bytearray()
        for row in range(self.rows):
            for token in range(tokens):
                offset = (row * tokens + token) * TOKEN_BYTES
                value = bytes(data[offset : offset + TOKEN_BYTES])
                for block in self.blocks:
                    entries = self._cache[block, row]
                    entries.append(value)
                    seen = b"".join((b"%d" % block, self.adapter_id, *entries))
                    value = finite_token(hashlib.sha256(seen).digest())
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
class ToyAdapters:
    """Adapters by their ids alone; tensors are checked like those of real ones."""

    engine: ToyEngine
    adapter_ids: list[bytes] = field(default_factory=list)
    refusal: ErrorCode | None = None

    def __contains__(self, adapter_id: bytes) -> bool:
        return adapter_id in self.adapter_ids

    def admit(self, index: AdapterIndex) -> ToyIncoming:
        if self.refusal is not None:
            raise ProtocolError(self.refusal)
        return ToyIncoming(self, index)


@dataclass
class ToyIncoming:
    adapters: ToyAdapters
    index: AdapterIndex
    taken: int = 0

    @property
    def wanted(self) -> Sequence[ModuleSpec]:
        engine = self.adapters.engine
        return self.index.of_blocks(engine.first_block, engine.end_block)

    async def load_module(self, module: ModuleSpec, tensors: Sequence[bytes | bytearray]) -> None:
        for spec, data in zip(module.tensors, tensors, strict=True):
            if hashlib.sha256(data).digest() != spec.sha256:
                raise ProtocolError(ErrorCode.ADAPTER_REFUSED)
        self.taken += 1

    def finish(self) -> None:
        assert self.taken == len(self.wanted)
        self.adapters.adapter_ids.append(self.index.adapter_id)

    def abandon(self) -> None:
        pass


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
    imported_positions: int = 0
    """Positions of single blocks that came from another engine's cache."""

    def __post_init__(self) -> None:
        self.free_tokens = self.total_tokens
        self.adapters = ToyAdapters(self)

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(self.total_tokens, self.free_tokens, 0, 0.0)

    def reserve(self, request: CacheRequest) -> ToyCache:
        tokens = request.rows * request.maximum_tokens
        if request.adapter_id and request.adapter_id not in self.adapters:
            raise ProtocolError(ErrorCode.ADAPTER_MISSING)
        if tokens > self.free_tokens:
            raise ProtocolError(ErrorCode.NO_CAPACITY)
        self.free_tokens -= tokens
        blocks = ToyBlocks(request.first_block, request.end_block, request.rows, request.adapter_id)
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
            WireTensor(DType.FLOAT32, (rows, step.output_tokens, hidden), kept),
            10,
            round(self.step_s * 1e6),
        )

    def pieces(
        self, cache: SessionCache, first_position: int, end_position: int
    ) -> Sequence[CacheRegion]:
        assert isinstance(cache, ToyCache)
        return [
            CacheRegion(block, block + 1, position, min(position + 4, end_position))
            for block in cache.blocks.blocks
            for position in range(first_position, end_position, 4)
        ]

    async def export_state(self, cache: SessionCache) -> CacheState:
        assert isinstance(cache, ToyCache)
        return CacheState(cache.blocks.length, (0,) * cache.blocks.rows)

    async def export_region(self, cache: SessionCache, region: CacheRegion) -> WireTensor:
        assert isinstance(cache, ToyCache)
        await asyncio.sleep(self.step_s / 10)
        content, length = cache.blocks.read(region), cache.blocks.length
        if region.end_position > length:
            raise ProtocolError(ErrorCode.BAD_POSITION, f"{length} positions are cached")
        positions = region.end_position - region.first_position
        return WireTensor(DType.FLOAT32, (cache.blocks.rows, positions, HIDDEN), content)

    async def import_region(
        self, cache: SessionCache, region: CacheRegion, content: WireTensor
    ) -> None:
        assert isinstance(cache, ToyCache)
        await asyncio.sleep(self.step_s / 10)
        cache.blocks.write(region, bytes(content.data))
        self.imported_positions += region.end_position - region.first_position

    async def import_state(self, cache: SessionCache, state: CacheState) -> None:
        assert isinstance(cache, ToyCache)
        cache.blocks.cut(state.length)
        if cache.blocks.length != state.length:
            raise ProtocolError(ErrorCode.BAD_POSITION, f"{cache.blocks.length} were imported")

    async def close(self) -> None:
        return None


REVISION = bytes(range(32))


class Counted:
    """A node's observer that only adds up."""

    def __init__(self) -> None:
        self.opened = self.closed = self.steps = self.replayed_tokens = 0
        self.codes: list[ErrorCode] = []

    def session_opened(self) -> None:
        self.opened += 1

    def session_closed(self) -> None:
        self.closed += 1

    def refused(self, code: ErrorCode) -> None:
        self.codes.append(code)

    def bytes_moved(self, *, sent: int, received: int) -> None:
        return None

    def step_done(
        self, *, rows: int, tokens: int, blocks: int, queue_us: int, compute_us: int
    ) -> None:
        self.steps += 1

    def replayed(self, *, tokens: int) -> None:
        self.replayed_tokens += tokens


@dataclass
class ToyNode:
    peer: MemoryPeer
    engine: ToyEngine
    service: NodeService
    counted: Counted
    books: sqlite3.Connection
    identity: Identity


class ToyPlanner:
    """Chooses the nodes of a toy swarm in a fixed order of preference, living ones first."""

    def __init__(self, swarm: ToySwarm, preferred: Sequence[int]) -> None:
        others = [index for index in range(len(swarm.nodes)) if index not in preferred]
        self._order = [*preferred, *others]
        self._swarm = swarm
        self.failures: list[tuple[PeerId, FailureKind]] = []
        self.quarrels: list[frozenset[PeerId]] = []
        self.first_failure: asyncio.Future[PeerId] = asyncio.get_running_loop().create_future()
        self.fails_to_see: set[int] = set()
        """Nodes that it does not know of (yet)."""
        self.longest_blocks = len(swarm.nodes) * 8
        """It never asks one hop for more than these."""
        self.promised_block_s = 0.0
        """What it expects of every node; 0: it promises nothing, and knows how long steps take."""

    async def plan(
        self,
        first_block: int,
        end_block: int,
        *,
        excluded: Collection[PeerId] = (),
        previous: PeerId | None = None,
        following: PeerId | None = None,
    ) -> ChainPlan:
        failed = {peer for peer, _ in self.failures}.union(*self.quarrels)
        hops: list[PlannedHop] = []
        start = first_block
        while start < end_block:
            for index in sorted(self._order, key=self._is_failed(failed)):
                engine, peer = self._swarm.nodes[index].engine, self._swarm.nodes[index].peer
                usable = index not in self.fails_to_see and peer.peer_id not in excluded
                twice = any(hop.peer_id == peer.peer_id for hop in hops)
                if usable and not twice and engine.first_block <= start < engine.end_block:
                    end = min(engine.end_block, end_block, start + self.longest_blocks)
                    hop = PlannedHop(
                        peer.peer_id,
                        f"node {index}",
                        self._swarm.addresses,
                        start,
                        end,
                        block_s=self.promised_block_s,
                    )
                    hops.append(hop)
                    start = end
                    break
            else:
                raise NoRouteError(f"block {start} is served by nobody", missing_blocks=(start,))
        step_s = sum(
            hop.promised_s or self._swarm.node_of(hop.peer_id).engine.step_s for hop in hops
        )
        return ChainPlan(tuple(hops), step_s)

    def _is_failed(self, failed: set[PeerId]) -> Callable[[int], bool]:
        return lambda index: self._swarm.nodes[index].peer.peer_id in failed

    async def is_online(self) -> bool:
        network, client = self._swarm.network, self._swarm.client.peer_id
        return any(not network.is_cut(client, node.peer.peer_id) for node in self._swarm.nodes)

    def failed(self, peer: PeerId, kind: FailureKind) -> None:
        self.failures.append((peer, kind))
        if not self.first_failure.done():
            self.first_failure.set_result(peer)

    def quarrelled(self, peers: Collection[PeerId]) -> None:
        self.quarrels.append(frozenset(peers))

    def passed(
        self, hops: Sequence[PlannedHop], reported_s: Sequence[float], step_s: float
    ) -> None:
        return None

    def measured_round_trip(self, peer: PeerId, round_trip_s: float) -> None:
        return None


class ToySwarm:
    """Nodes and one client in a memory network; use inside of ``virtual_time.run``."""

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        *,
        seed: int = 1,
        settings: MemorySettings | None = None,
        limits: ServiceLimits | None = None,
        on_event: Callable[[float, str], None] | None = None,
        books: bool = True,
        identities: Sequence[Identity] = (),
        operators: Collection[bytes] = (),
    ) -> None:
        """``books``: nodes want vouchers, and the client signs them.

        ``operators``: whose allowances nodes take.
        """
        self._books = books
        self.addresses: tuple[str, ...] = ()
        """What all nodes say of themselves."""
        self.network = MemoryNetwork(seed, settings or MemorySettings(), on_event=on_event)
        self.clock = LoopClock()
        self.client = self.network.join(Identity.generate())
        self.nodes = []
        for index, (first, end) in enumerate(spans):
            identity = identities[index] if identities else Identity.generate()
            peer = self.network.join(identity)
            engine, counted = ToyEngine(first, end), Counted()
            commits = DirectCommits(node_books.SCHEMA)
            ledger = NodeLedger(
                identity,
                LedgerStore(commits),
                LedgerTerms(
                    REVISION, mflop_per_block_token=7, dtype_class="float32", operators=operators
                ),
                self.clock,
            )
            service = NodeService(
                peer,
                engine,
                model_revision=REVISION,
                resolve=self._resolve,
                observer=counted,
                clock=self.clock,
                limits=limits,
                ledger=ledger if books else None,
            )
            self.nodes.append(ToyNode(peer, engine, service, counted, commits.database, identity))
        self.number_of_blocks = max(end for _, end in spans)

    async def _resolve(self, peer: PeerId, *, afresh: bool = False) -> Sequence[str] | None:
        return () if any(node.peer.peer_id == peer for node in self.nodes) else None

    async def start(self) -> None:
        for node in self.nodes:
            await node.service.start()

    def node_of(self, peer: PeerId) -> ToyNode:
        return next(node for node in self.nodes if node.peer.peer_id == peer)

    def planner(self, *preferred: int) -> ToyPlanner:
        """Prefers these nodes, in this order."""
        return ToyPlanner(self, preferred)

    @asynccontextmanager
    async def chain(
        self,
        *indices: int,
        rows: int = 1,
        maximum_tokens: int = 128,
        observer: ChainObserver | None = None,
        timeouts: ChainTimeouts | None = None,
        planner: ToyPlanner | None = None,
        journal_budget: JournalBudget | None = None,
        adapter: AdapterSource | None = None,
        policy: Policy | None = None,
        ask_grant: AskGrant | None = None,
    ) -> AsyncIterator[Chain]:
        """A chain that prefers these nodes, in this order; all by default.

        ``ask_grant`` gives the session's first allowance and fresh ones.
        """
        grant = issue_for_ourselves(self.clock.unix_s()) if self._books else None
        chain = Chain(
            self.client,
            planner or ToyPlanner(self, indices),
            SessionRequest(
                REVISION,
                HIDDEN,
                rows,
                maximum_tokens,
                DType.FLOAT32,
                adapter=adapter,
                policy=policy,
            ),
            self.number_of_blocks,
            journal_budget=journal_budget,
            clock=self.clock,
            observer=observer,
            timeouts=timeouts,
            grant=await ask_grant() if ask_grant is not None else grant,
            renew=ask_grant,
        )
        running = asyncio.create_task(chain.run())
        try:
            await chain.opened()
            yield chain
        finally:
            await chain.close()
            await running

    async def assert_nothing_left(self) -> None:
        """The same, and no honest client was taken for one who does not vouch."""
        await self.assert_nothing_left_but_refusals()
        for node in self.nodes:
            assert ErrorCode.VOUCHER_MISSING not in node.counted.codes

    async def assert_nothing_left_but_refusals(self) -> None:
        """Nothing is held any more, and the books of each node add up."""
        await self.assert_nothing_held()
        for node in self.nodes:
            if self.network.peer(node.peer.peer_id) is not None:
                LedgerReader(node.books).verify()

    async def assert_nothing_held(self) -> None:
        """All sessions and reservations end; whoever leaks one fails here by deadlock."""
        for node in self.nodes:
            if self.network.peer(node.peer.peer_id) is None:
                continue
            service, engine = node.service, node.engine
            while (
                service.sessions
                or service.session_streams
                or service.journals.used_bytes
                or engine.free_tokens < engine.total_tokens
            ):
                await asyncio.sleep(1)
                if self.clock.monotonic_s() > 24 * 3600:
                    raise AssertionError("a session is never freed")
            assert node.counted.opened == node.counted.closed


class ToyAdapter:
    """Random tensors for one linear layer of each block; a source as ``client`` wants it."""

    def __init__(self, seed: int, number_of_blocks: int = 6, catalogue_name: str = "") -> None:
        random = Random(seed)
        self.catalogue_name = catalogue_name
        self.tensors: list[list[bytes]] = []
        modules = []
        for block in range(number_of_blocks):
            shapes = ((2, HIDDEN), (HIDDEN, 2))
            data = [random.randbytes(4 * rows * columns) for rows, columns in shapes]
            a, b = (
                TensorSpec(DType.FLOAT32, shape, hashlib.sha256(each).digest())
                for shape, each in zip(shapes, data, strict=True)
            )
            self.tensors.append(data)
            modules.append(ModuleSpec(block, "self_attn.q_proj", 1.0, a, b))
        self.index = AdapterIndex(b"", tuple(modules))

    def read(self, module: ModuleSpec) -> list[bytes]:
        return self.tensors[module.block]


def toy_tensor(random: Random, rows: int, tokens: int) -> WireTensor:
    return WireTensor(
        DType.FLOAT32, (rows, tokens, HIDDEN), random.randbytes(rows * tokens * TOKEN_BYTES)
    )


@pytest.fixture
def toy_adapter() -> type[ToyAdapter]:
    return ToyAdapter


@pytest.fixture
def toy_planner() -> type[ToyPlanner]:
    return ToyPlanner


@pytest.fixture
def toy_swarm() -> type[ToySwarm]:
    return ToySwarm


@pytest.fixture
def toy_blocks() -> type[ToyBlocks]:
    return ToyBlocks


@pytest.fixture
def make_tensor() -> Callable[[Random, int, int], WireTensor]:
    return toy_tensor


@pytest.fixture
def toy_engine() -> type[ToyEngine]:
    return ToyEngine


@pytest.fixture
def counted_observer() -> type[Counted]:
    return Counted
