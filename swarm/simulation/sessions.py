"""A small swarm with everything real but torch, and clients that check every token.

Real: records and their Ed25519 signatures, announcing, shards, placement of those who join, the
router and its questions, chains, node services, healing. Modelled: the network
(``swarm.memory_network``: links between cities, cuts), the engine (``toy_engine``) and the owners,
who crash and come back. After the run every answer was compared with the undisturbed one.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm import virtual_time
from swarm.block_vectors import PlacedNode, block_vectors, placed_nodes
from swarm.client.app import SwarmClient
from swarm.client.hops import SessionRequest
from swarm.membership import Announcer, read_nodes
from swarm.memory_network import LinkSettings, MemoryNetwork, MemoryPeer
from swarm.node.neighbours import Neighbours
from swarm.node.service import NodeService
from swarm.placement import choose_span, loading_s
from swarm.protocol.errors import ErrorCode, NetworkError, SwarmError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType, WireTensor
from swarm.protocol.version import MAXIMUM_VERSION, MINIMUM_VERSION
from swarm.simulation.population import (
    CITIES,
    MODELS,
    Volunteer,
    dice_of,
    draw_round_trips_s,
    draw_volunteers,
)
from swarm.simulation.toy_engine import HIDDEN, TOKEN_BYTES, ToyEngine, reference
from swarm.virtual_time import LoopClock

REVISION = hashlib.sha256(b"simulated model").digest()
PROMPT_TOKENS = 24
NEW_TOKENS = 40
ABSENCE_S = 60.0
LOAD_S = 5.0
SETTLED_S = 90.0


@dataclass(frozen=True, slots=True)
class SessionRun:
    """What to simulate."""

    nodes: int = 20
    blocks: int = 32
    clients: int = 3
    minutes: float = 10.0
    crash_every_s: float = 60.0
    """Mean time between two crashes anywhere."""
    partition_every_s: float = 240.0
    """Mean time between two partitions, which cut off a city for ten seconds."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SessionResult:
    """What clients saw."""

    answers: int
    wrong_tokens: int
    failed: int
    """Answers that ended with an error."""
    reasons: tuple[tuple[str, int], ...]
    crashes: int
    partitions: int
    control_bytes_per_node_s: float
    """Everything that went over streams and is not an activation is small: all bytes."""
    digest: str
    """Of everything that happened in the network: equal runs have equal ones."""


def simulate_sessions(run: SessionRun) -> SessionResult:
    """In virtual time; the same run always gives the same result."""
    return virtual_time.run(_Simulation(run).simulate())


def simulated_identity(seed: int, name: str) -> Identity:
    """A key that is the same in every run."""
    secret = hashlib.sha256(f"simulated {seed} {name}".encode()).digest()
    return Identity(Ed25519PrivateKey.from_private_bytes(secret))


class _NodeCounter:
    """Observer of a service that counts nothing."""

    def session_opened(self) -> None: ...
    def session_closed(self) -> None: ...
    def refused(self, code: ErrorCode) -> None: ...
    def bytes_moved(self, *, sent: int, received: int) -> None: ...
    def step_done(
        self, *, rows: int, tokens: int, blocks: int, queue_us: int, compute_us: int
    ) -> None: ...
    def replayed(self, *, tokens: int) -> None: ...


class _Simulation:
    def __init__(self, run: SessionRun) -> None:
        self._run = run
        self._clock = LoopClock()
        self._trace = hashlib.sha256()
        self._sent_bytes = 0
        self._dice = dice_of(run.seed, "faults")
        self._round_trips_s = draw_round_trips_s(dice_of(run.seed, "where"))
        self._city: dict[PeerId, int] = {}
        self._network = MemoryNetwork(run.seed, clock=self._clock, on_event=self._record)
        self._answers = self._wrong = self._crashes = self._partitions = 0
        self._reasons: Counter[str] = Counter()

    def _record(self, now_s: float, event: str) -> None:
        self._trace.update(f"{now_s:.9f} {event}\n".encode())
        if event.startswith("send "):
            self._sent_bytes += int(event.rsplit(" ", 1)[1])

    async def simulate(self) -> SessionResult:
        run = self._run
        volunteers = draw_volunteers(run.nodes, MODELS[run.blocks], dice_of(run.seed, "who"))
        identities = [simulated_identity(run.seed, v.peer_id) for v in volunteers]
        async with asyncio.TaskGroup() as group:
            running = {
                identity.peer_id: group.create_task(self._host(volunteer, identity, settled=True))
                for volunteer, identity in zip(volunteers, identities, strict=True)
            }
            await asyncio.sleep(SETTLED_S)
            asking = [group.create_task(self._ask(number)) for number in range(run.clients)]
            faults = [
                group.create_task(self._crash(group, running, volunteers, identities)),
                group.create_task(self._cut_off_cities()),
            ]
            await asyncio.sleep(60 * run.minutes)
            for task in (*faults, *asking, *running.values()):
                task.cancel()
        return SessionResult(
            answers=self._answers,
            wrong_tokens=self._wrong,
            failed=sum(self._reasons.values()),
            reasons=tuple(sorted(self._reasons.items())),
            crashes=self._crashes,
            partitions=self._partitions,
            control_bytes_per_node_s=self._sent_bytes / run.nodes / (60 * run.minutes + SETTLED_S),
            digest=self._trace.hexdigest(),
        )

    # --- nodes -----------------------------------------------------------------------------------
    def _join(self, identity: Identity, city: int) -> MemoryPeer:
        peer = self._network.join(identity)
        self._city[identity.peer_id] = city
        for other, other_city in self._city.items():
            if other != identity.peer_id:
                latency_s = self._round_trips_s[city][other_city] / 2
                link = LinkSettings(latency_s=latency_s, jitter_s=latency_s / 10)
                self._network.set_link(identity.peer_id, other, link)
        return peer

    async def _host(self, volunteer: Volunteer, identity: Identity, *, settled: bool) -> None:
        """One life of a node; a crash cancels it."""
        peer = self._join(identity, volunteer.city)
        dice = dice_of(self._run.seed, volunteer.peer_id, str(self._crashes))
        if settled:  # not all at the same moment: each sees those before it
            await self._clock.sleep(3.0 * int(volunteer.peer_id[-5:]))
        else:
            await self._clock.sleep(dice.uniform(0.0, 3.0))
        records = await read_nodes(peer, REVISION, self._clock)
        first, end = self._span(volunteer, records)
        record = _record(volunteer, identity, (first, end), self._run.blocks)
        announcer = Announcer(identity, peer, self._clock, record, hidden_size=HIDDEN)
        engine = ToyEngine(first, end, block_s=1 / volunteer.speed_one_session)
        service = NodeService(
            peer,
            engine,
            model_revision=REVISION,
            resolve=Neighbours(peer, self._clock, REVISION).resolve,
            observer=_NodeCounter(),
            clock=self._clock,
        )
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            stack.push_async_callback(service.close)
            group.create_task(announcer.run())
            await self._clock.sleep(LOAD_S)
            await service.start()
            announcer.update(replace(announcer.record, state=NodeState.ONLINE))

    def _span(self, volunteer: Volunteer, records: Sequence[NodeRecord]) -> tuple[int, int]:
        nodes = placed_nodes(records, now_unix_s=self._clock.unix_s())
        me = PlacedNode(
            volunteer.peer_id,
            0,
            volunteer.size,
            volunteer.speed,
            organisation=volunteer.organisation,
            country=volunteer.country,
        )
        nothing_to_load = loading_s(self._run.blocks, range(self._run.blocks), 0.0)
        choice = choose_span(
            block_vectors(nodes, self._run.blocks), me, volunteer.size, nothing_to_load
        )
        return choice.first_block, choice.end_block

    # --- faults ----------------------------------------------------------------------------------
    async def _crash(
        self,
        group: asyncio.TaskGroup,
        running: dict[PeerId, asyncio.Task[None]],
        volunteers: Sequence[Volunteer],
        identities: Sequence[Identity],
    ) -> None:
        """Power failures; the node comes back a minute later with an empty memory."""
        while True:
            await self._clock.sleep(self._dice.expovariate(1 / self._run.crash_every_s))
            index = self._dice.randrange(len(identities))
            peer_id = identities[index].peer_id
            if self._network.peer(peer_id) is None:
                continue
            self._crashes += 1
            self._network.crash(peer_id)
            running[peer_id].cancel()

            async def come_back(index: int = index) -> None:
                await self._clock.sleep(ABSENCE_S)
                await self._host(volunteers[index], identities[index], settled=False)

            running[peer_id] = group.create_task(come_back())

    async def _cut_off_cities(self) -> None:
        while True:
            await self._clock.sleep(self._dice.expovariate(1 / self._run.partition_every_s))
            self._partitions += 1
            city = self._dice.randrange(CITIES)
            inside = [peer for peer, where in self._city.items() if where == city]
            self._network.partition(inside)
            await self._clock.sleep(10.0)
            self._network.heal()

    # --- clients ---------------------------------------------------------------------------------
    async def _ask(self, number: int) -> None:
        """One generation after the other."""
        dice = dice_of(self._run.seed, "client", str(number))
        identity = simulated_identity(self._run.seed, f"client {number}")
        peer = self._join(identity, number % CITIES)
        async with SwarmClient(peer, clock=self._clock, seed=number) as client:
            while True:
                prompt = dice.randbytes(PROMPT_TOKENS * TOKEN_BYTES)
                try:
                    await self._generate(client, prompt)
                except SwarmError as error:
                    self._reasons[type(error).__name__] += 1
                    await self._clock.sleep(2.0)
                else:
                    self._answers += 1

    async def _generate(self, client: SwarmClient, prompt: bytes) -> None:
        """Greedy: each output is the next input. Every one is compared with the reference."""
        total = PROMPT_TOKENS + NEW_TOKENS
        request = SessionRequest(REVISION, HIDDEN, 1, total, DType.FLOAT32)
        right = reference(self._run.blocks, total)
        chain = await client.open_chain(request, number_of_blocks=self._run.blocks)
        try:
            value, position = prompt, 0
            for _ in range(NEW_TOKENS):
                tokens = len(value) // TOKEN_BYTES
                tensor = WireTensor(DType.FLOAT32, (1, tokens, HIDDEN), value)
                output = await chain.step(tensor, position, output_tokens=1)
                expected = right.compute(value, position)[-TOKEN_BYTES:]
                self._wrong += bytes(output.data) != expected
                value, position = expected, position + tokens
        finally:
            with suppress(NetworkError):
                await chain.close()


def _record(
    volunteer: Volunteer, identity: Identity, span: tuple[int, int], blocks: int
) -> NodeRecord:
    return NodeRecord(
        peer_id=identity.peer_id,
        model_name="simulated",
        model_revision=REVISION,
        number_of_blocks=blocks,
        shards=1,
        first_block=span[0],
        end_block=span[1],
        state=NodeState.JOINING,
        dtype=DType.FLOAT32,
        minimum_version=MINIMUM_VERSION,
        maximum_version=MAXIMUM_VERSION,
        sequence=0,
        expires_unix_s=0,
        decode_tokens_per_s=int(volunteer.speed_one_session),
        batched_tokens_per_s=int(volunteer.speed),
        cache_tokens_total=8192,
        cache_tokens_free=8192,
        organisation=volunteer.organisation,
        country=volunteer.country,
    )
