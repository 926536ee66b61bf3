"""Honest and evil nodes around one client that audits, in a memory network and virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.client.app import Network, SwarmClient
from swarm.client.auditing import Finding
from swarm.client.chain import Chain
from swarm.client.hops import SessionRequest
from swarm.ledger import node_books
from swarm.ledger.audit_rule import Floats, to_array
from swarm.ledger.commits import DirectCommits
from swarm.ledger.node_books import LedgerStore
from swarm.ledger.reputation import Found
from swarm.membership import Announcer
from swarm.memory_network import MemoryNetwork
from swarm.node.accounts import LedgerTerms, NodeLedger
from swarm.node.engine.api import Engine
from swarm.node.neighbours import Neighbours
from swarm.node.service import NodeService
from swarm.ports import Transport
from swarm.protocol.errors import ErrorCode, SwarmError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType
from swarm.simulation.evil import OVER_CLAIMED_FACTOR, Behaviour, EvilEngine
from swarm.simulation.evil_frames import EvilTransport, Foul
from swarm.simulation.numeric_engine import (
    NUMERIC_HIDDEN,
    NumericBlocks,
    NumericEngine,
    from_array,
)
from swarm.virtual_time import LoopClock

REVISION = b"n" * 32
BLOCKS = 6
SPANS = ((0, 2), (2, 4), (4, 6))
MOST_TOKENS = 64


def identity(number: int) -> Identity:
    """The same peers in each run."""
    return Identity(Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big")))


class Silent:
    """An observer that counts nothing."""

    def session_opened(self) -> None: ...
    def session_closed(self) -> None: ...
    def refused(self, code: ErrorCode) -> None: ...
    def bytes_moved(self, *, sent: int, received: int) -> None: ...
    def step_done(
        self, *, rows: int, tokens: int, blocks: int, queue_us: int, compute_us: int
    ) -> None: ...
    def replayed(self, *, tokens: int) -> None: ...


@dataclass
class EvilNode:
    peer_id: PeerId
    behaviour: Behaviour | Foul | None
    service: NodeService


class EvilSwarm:
    """Three nodes for each span, of which those named are evil."""

    spans: Sequence[tuple[int, int]] = SPANS
    revision = REVISION
    hidden_size = NUMERIC_HIDDEN

    def __init__(self, evil: Sequence[Behaviour | Foul | None], seed: int = 1) -> None:
        """One entry per span; that span's last node behaves so. None: all three are honest."""
        self.clock = LoopClock()
        self.network = MemoryNetwork(seed, clock=self.clock)
        self.nodes: list[EvilNode] = []
        self.books: dict[PeerId, DirectCommits] = {}
        self.operators: tuple[bytes, ...] = ()
        """Whose allowances the nodes trust."""
        self.adapters: tuple[str, ...] = ()
        """What the nodes announce; clients bring it to those that lack it."""
        self.seed = seed
        self._evil = evil
        self._stack = AsyncExitStack()

    @asynccontextmanager
    async def running(self, *, audits: bool = True) -> AsyncIterator[SwarmClient]:
        """Its nodes announced, and a client that audits or does not."""
        async with self.nodes_running() as stack:
            client_peer = await self._join(stack, identity(1000))
            client = SwarmClient(client_peer, clock=self.clock, seed=self.seed, audits=audits)
            try:
                yield client
            finally:
                await client.close()

    @asynccontextmanager
    async def nodes_running(self) -> AsyncIterator[AsyncExitStack]:
        """Its nodes announced; the stack is closed after them."""
        announcing: list[asyncio.Task[None]] = []
        async with AsyncExitStack() as stack:
            for index in range(3 * len(self.spans)):
                span = self.spans[index // 3]
                behaviour = self._evil[index // 3] if index % 3 == 2 else None
                own = identity(1 + index)
                peer = await self._join(stack, own)
                announcing.append(await self._add(stack, own, peer, span, behaviour))
            await self._announced()
            try:
                yield stack
            finally:
                for task in announcing:
                    task.cancel()
                await asyncio.gather(*announcing, return_exceptions=True)

    async def _join(self, stack: AsyncExitStack, own: Identity) -> Network:
        return self.network.join(own)

    def _tokens_per_s(self, behaviour: Behaviour | Foul | None) -> int:
        """What a node announces."""
        if isinstance(behaviour, Foul):
            return 2000  # clients like it
        return 1000 * (OVER_CLAIMED_FACTOR if behaviour is Behaviour.OVER_CLAIMED else 1)

    async def _engine(self, stack: AsyncExitStack, span: tuple[int, int]) -> Engine:
        return NumericEngine(*span)

    def _books(self, node: PeerId) -> DirectCommits:
        self.books[node] = DirectCommits(node_books.SCHEMA)
        return self.books[node]

    async def _announced(self) -> None:
        """Wait until every node can be found."""
        await self.clock.sleep(5.0)

    def _addresses(self, peer: Network) -> tuple[str, ...]:
        return ()

    async def _add(
        self,
        stack: AsyncExitStack,
        own: Identity,
        peer: Network,
        span: tuple[int, int],
        behaviour: Behaviour | Foul | None,
    ) -> asyncio.Task[None]:
        engine = await self._engine(stack, span)
        transport: Transport = peer
        if isinstance(behaviour, Behaviour):
            engine = EvilEngine(engine, behaviour, seed=self.seed)
        elif behaviour is not None:
            transport = EvilTransport(peer, behaviour)
        ledger = NodeLedger(
            own,
            LedgerStore(self._books(own.peer_id)),
            LedgerTerms(
                self.revision,
                mflop_per_block_token=1,
                dtype_class="float32",
                operators=self.operators,
            ),
            self.clock,
        )
        service = NodeService(
            transport,
            engine,
            model_revision=self.revision,
            resolve=Neighbours(peer, self.clock, self.revision).resolve,
            observer=Silent(),
            clock=self.clock,
            ledger=ledger,
        )
        await service.start()
        stack.push_async_callback(service.close)
        tokens_per_s = self._tokens_per_s(behaviour)
        record = NodeRecord(
            peer_id=own.peer_id,
            model_name="numeric",
            model_revision=self.revision,
            number_of_blocks=self.spans[-1][1],
            shards=1,
            first_block=span[0],
            end_block=span[1],
            state=NodeState.ONLINE,
            dtype=DType.FLOAT32,
            minimum_version=1,
            maximum_version=1,
            sequence=0,
            expires_unix_s=0,
            decode_tokens_per_s=tokens_per_s,
            batched_tokens_per_s=tokens_per_s,
            cache_tokens_total=1 << 16,
            cache_tokens_free=1 << 16,
            addresses=self._addresses(peer),
            adapters=self.adapters,
        )
        announcer = Announcer(own, peer, self.clock, record, hidden_size=self.hidden_size)
        self.nodes.append(EvilNode(own.peer_id, behaviour, service))
        return asyncio.create_task(announcer.run())

    @property
    def evil(self) -> set[PeerId]:
        return {node.peer_id for node in self.nodes if node.behaviour is not None}


@dataclass(frozen=True)
class Outcome:
    """One answer: whether it was right, who served it, and what the audit found."""

    right: bool
    peers: tuple[PeerId, ...]
    findings: tuple[Finding, ...]

    @property
    def is_trusted(self) -> bool:
        """What a client can see: nobody of its chain was found wrong."""
        suspects = {each.peer_id for each in self.findings if each.found is not Found.PASSED}
        return not suspects & set(self.peers)


async def ask(client: SwarmClient, seed: int, prompt: int = 12, tokens: int = 20) -> Outcome:
    """A generation: each output is the next input; compared with the model run here."""
    request = SessionRequest(REVISION, NUMERIC_HIDDEN, 1, MOST_TOKENS, DType.FLOAT32)
    chain: Chain = await client.open_chain(request, number_of_blocks=BLOCKS)
    try:
        right = await converse(chain, seed, prompt, tokens)
        findings = await client.auditor.audit(chain)
        return Outcome(right, tuple(hop.peer_id for hop in chain.plan.hops), tuple(findings))
    finally:
        await chain.close()


async def converse(chain: Chain, seed: int, prompt: int, tokens: int) -> bool:
    """Whether a generation is right."""
    right_blocks = NumericBlocks(0, BLOCKS)
    drawn = np.random.default_rng(seed).normal(size=(1, prompt, NUMERIC_HIDDEN))
    states: Floats = drawn.astype(np.float32)
    position, right = 0, True
    for _ in range(tokens):
        output = to_array(await chain.step(from_array(states), position, output_tokens=1))
        expected = right_blocks.compute(states, position)[:, -1:]
        right &= bool(np.allclose(output, expected, atol=1e-3))
        position += states.shape[1]
        states = np.tanh(output).astype(np.float32)  # what a client makes of what it got
    return right


async def ask_until_trusted(client: SwarmClient, seed: int, attempts: int = 12) -> list[Outcome]:
    """What a careful client does: what was found wrong is asked again, of others."""
    outcomes: list[Outcome] = []
    dice = random.Random(seed)
    for _ in range(attempts):
        try:
            outcomes.append(await ask(client, dice.randrange(1 << 30)))
        except SwarmError:
            continue
        if outcomes[-1].is_trusted:
            break
    return outcomes
