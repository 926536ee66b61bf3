"""Time per token of routing by sampled and asked candidates, against an oracle.

Real: who is sampled from what a client knows, what an answer costs, the choice of the chain
(``swarm.routing``). Modelled: clients' pools (random shards), answers without delay, and the load:
a closed loop of sessions of ``SESSION_TOKENS`` tokens, each followed by a new one.

Continuous batching makes a block take ``b = max(1/c, (1/c - 1/C) / (1 - u))`` on a node with speed
``c`` for one session, ``C`` batched, where ``u`` is the share of ``C`` that its sessions use; a
token waits for half a step of a busy node. The period of a session is the sum of that over its hops
and of the links, which in turn gives ``u``; both are brought together once a second.

The oracle knows all nodes, the true delays between them and every load at this moment.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from statistics import fmean

import numpy as np

from swarm.block_vectors import PlacedNode, Vector, block_vectors
from swarm.chain_choice import HAND_OVER_S, candidate, choose_chain
from swarm.placement import choose_span
from swarm.protocol.messages import LoadReport
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType
from swarm.protocol.version import MAXIMUM_VERSION, MINIMUM_VERSION
from swarm.routing import Hop, sample_nodes, uncovered
from swarm.simulation.population import (
    CITIES,
    MODELS,
    Volunteer,
    dice_of,
    draw_round_trips_s,
    draw_volunteers,
)

SESSION_TOKENS = 128
CLIENTS = 64
POOL_READ = 256
"""Records in the shards that a client reads at once."""
POOL_NODES = 512
POOL_AGE_S = 60.0
ANNOUNCE_S = 30.0
CACHE_TOKENS = 200_000
FULL = 0.98


class Strategy(StrEnum):
    """How clients choose."""

    ASKED = "asked"
    """As the product does."""
    ANNOUNCED = "announced"
    """The best chain of all nodes by their announced load."""
    ORACLE = "oracle"


@dataclass(frozen=True, slots=True)
class RoutingRun:
    """What to simulate."""

    nodes: int
    blocks: int
    load: float
    """Sessions, as a share of those that would use the whole speed of an idle swarm."""
    strategy: Strategy = Strategy.ASKED
    seed: int = 0
    seconds: int = 120
    warm_up_seconds: int = 60


@dataclass(frozen=True, slots=True)
class RoutingResult:
    """Means over the measured seconds."""

    sessions: int
    token_s: float
    """Between two tokens of a session."""
    token_s_p95: float
    hops: float
    asked: float
    """Nodes for one session."""
    misses: float
    """Share of samples in which no chain was found."""


@dataclass(slots=True)
class _Session:
    city: int
    hops: list[tuple[int, int]]
    """Node and blocks."""
    link_s: float
    tokens_left: float = SESSION_TOKENS
    token_s: float = 0.0


@dataclass(slots=True)
class _Client:
    city: int
    dice: random.Random
    known: dict[int, None] = field(default_factory=dict)
    """Nodes, those read first in front."""
    round_trip_s: dict[int, float] = field(default_factory=dict)
    read_s: float = -np.inf


def simulate_routing(run: RoutingRun) -> RoutingResult:
    """The same run always gives the same result."""
    return _Simulation(run).simulate()


def placed_volunteers(
    nodes: int, blocks: int, seed: int
) -> tuple[list[Volunteer], list[tuple[int, int]]]:
    """Volunteers and the spans that they took, one after the other, by ``swarm.placement``."""
    volunteers = draw_volunteers(nodes, MODELS[blocks], dice_of(seed, "who"))
    placed: list[PlacedNode] = []
    nothing_to_load = np.zeros(blocks)
    vectors, counted = block_vectors([], blocks), 0
    for volunteer in volunteers:
        if len(placed) > 1.01 * counted or not counted:
            vectors, counted = block_vectors(placed, blocks), len(placed)
        me = PlacedNode(
            volunteer.peer_id,
            0,
            volunteer.size,
            volunteer.speed,
            organisation=volunteer.organisation,
            country=volunteer.country,
            uptime_s=3600.0,
        )
        choice = choose_span(vectors, me, volunteer.size, nothing_to_load)
        placed.append(replace(me, first_block=choice.first_block, end_block=choice.end_block))
    return volunteers, [(node.first_block, node.end_block) for node in placed]


class _Simulation:
    def __init__(self, run: RoutingRun) -> None:
        self._run = run
        self._dice = dice_of(run.seed, "routing")
        self._delays_s = np.array(draw_round_trips_s(dice_of(run.seed, "where"))) / 2
        volunteers, spans = placed_volunteers(run.nodes, run.blocks, run.seed)
        self._cities = np.array([volunteer.city for volunteer in volunteers])
        self._starts = np.array([start for start, _ in spans])
        self._ends = np.array([end for _, end in spans])
        self._alone_s = np.array([1 / volunteer.speed_one_session for volunteer in volunteers])
        self._each_s = np.array([1 / volunteer.speed for volunteer in volunteers])
        self._records = [
            _record(volunteer, span, run.blocks)
            for volunteer, span in zip(volunteers, spans, strict=True)
        ]
        self._index = {record.peer_id: index for index, record in enumerate(self._records)}
        self._block_s = self._alone_s.copy()
        self._busy = np.zeros(run.nodes)
        self._sessions_of = np.zeros(run.nodes, dtype=np.int64)
        self._sessions: list[_Session] = []
        self._clients = [
            _Client(client % CITIES, dice_of(run.seed, "client", str(client)))
            for client in range(CLIENTS)
        ]
        self._next_client = 0
        self._asked: list[int] = []
        self._misses = 0
        choosers: dict[Strategy, Callable[[_Client, float], list[tuple[int, int]]]] = {
            Strategy.ASKED: self._ask,
            Strategy.ANNOUNCED: self._by_announcements,
            Strategy.ORACLE: self._by_oracle,
        }
        self._choose = choosers[run.strategy]

    def simulate(self) -> RoutingResult:
        run = self._run
        count = self._number_of_sessions()
        waiting = deque(sorted(self._dice.randrange(20) for _ in range(count)))
        token_s: list[float] = []
        hops: list[int] = []
        for second in range(run.warm_up_seconds + run.seconds):
            if second % ANNOUNCE_S == 0:
                self._announce()
            while waiting and waiting[0] <= second:
                waiting.popleft()
                self._open(float(second))
            self._settle()
            ended = [session for session in self._sessions if self._advance(session)]
            for session in ended:
                for node, _ in session.hops:
                    self._sessions_of[node] -= 1
                waiting.append(second + 1)
            self._sessions = [session for session in self._sessions if session.tokens_left > 0]
            if second >= run.warm_up_seconds:
                token_s += [session.token_s for session in ended]
                hops += [len(session.hops) for session in ended]
        return RoutingResult(
            sessions=count,
            token_s=fmean(token_s),
            token_s_p95=float(np.quantile(token_s, 0.95)),
            hops=fmean(hops),
            asked=fmean(self._asked) if self._asked else 0.0,
            misses=self._misses / max(1, len(self._asked)),
        )

    def _number_of_sessions(self) -> int:
        """As many as would use ``load`` of all speed if each had the idle swarm for itself."""
        run = self._run
        throughput = float((1 / self._each_s).sum()) / run.blocks
        idle_s = fmean(self._idle_period_s(_Client(city, self._dice)) for city in range(CITIES))
        return max(1, round(run.load * throughput * idle_s))

    def _idle_period_s(self, client: _Client) -> float:
        hops = self._by_oracle(client, 0.0)
        compute_s = sum(blocks * float(self._alone_s[node]) for node, blocks in hops)
        return compute_s + self._links_s(client.city, hops)

    # --- load ----------------------------------------------------------------------------------
    def _open(self, now_s: float) -> None:
        client = self._clients[self._next_client]
        self._next_client = (self._next_client + 1) % len(self._clients)
        hops = self._choose(client, now_s)
        for node, _ in hops:
            self._sessions_of[node] += 1
        session = _Session(client.city, hops, self._links_s(client.city, hops))
        session.token_s = session.link_s + sum(
            blocks * float(self._block_s[node]) for node, blocks in hops
        )
        self._sessions.append(session)

    def _links_s(self, city: int, hops: Sequence[tuple[int, int]]) -> float:
        cities = [city, *(int(self._cities[node]) for node, _ in hops), city]
        links = pairwise(cities)
        return sum(float(self._delays_s[one, other]) for one, other in links) + HAND_OVER_S * len(
            hops
        )

    def _settle(self) -> None:
        """Bring loads and periods together, a few rounds."""
        if not self._sessions:
            return
        sessions = np.repeat(
            np.arange(len(self._sessions)), [len(session.hops) for session in self._sessions]
        )
        nodes = np.array([node for session in self._sessions for node, _ in session.hops])
        blocks = np.array([size for session in self._sessions for _, size in session.hops])
        links_s = np.array([session.link_s for session in self._sessions])
        periods_s = np.array([session.token_s for session in self._sessions])
        size = self._run.nodes
        hosted = self._ends - self._starts
        for _ in range(4):
            rate = np.bincount(nodes, blocks / periods_s[sessions], minlength=size)
            used = np.minimum(rate * self._each_s, FULL)
            block_s = np.maximum(self._alone_s, (self._alone_s - self._each_s) / (1 - used))
            self._block_s = (self._block_s + block_s) / 2
            computing = rate * self._block_s
            self._busy = computing / (1 + computing)
            wait_s = hosted * self._block_s * self._busy / 2
            spent_s = blocks * self._block_s[nodes] + wait_s[nodes]
            periods_s = links_s + np.bincount(sessions, spent_s, minlength=len(links_s))
        for session, period_s in zip(self._sessions, periods_s, strict=True):
            session.token_s = float(period_s)

    def _advance(self, session: _Session) -> bool:
        """One second on; whether it ended."""
        session.tokens_left -= 1.0 / session.token_s
        return session.tokens_left <= 0

    def _announce(self) -> None:
        for index in range(len(self._records)):
            self._records[index] = replace(
                self._records[index], busy_permille=int(1000 * self._busy[index])
            )
        self._announced = [self._report(index) for index in range(len(self._records))]

    def _report(self, node: int) -> LoadReport:
        return LoadReport(
            accepting=1,
            queued_steps=0,
            cache_tokens_free=CACHE_TOKENS,
            busy_permille=int(1000 * self._busy[node]),
            sessions=int(self._sessions_of[node]),
        )

    # --- strategies ------------------------------------------------------------------------------
    def _ask(self, client: _Client, now_s: float) -> list[tuple[int, int]]:
        while True:
            self._read_shards(client, now_s)
            records = [self._records[node] for node in client.known]
            trips_s = {
                self._records[node].peer_id: trip_s
                for node, trip_s in client.round_trip_s.items()
                if node in client.known
            }
            sampled = sample_nodes(
                records, 0, self._run.blocks, dice=client.dice, round_trip_s=trips_s
            )
            self._asked.append(len(sampled))
            if not uncovered(sampled, 0, self._run.blocks):
                break
            self._misses += 1
            client.read_s = -np.inf
        candidates = []
        for record in sampled:
            node = self._index[record.peer_id]
            trip_s = 2 * float(self._delays_s[client.city, self._cities[node]])
            client.round_trip_s[node] = trip_s
            candidates.append(candidate(record, self._report(node), round_trip_s=trip_s))
        client.dice.shuffle(candidates)
        return self._hops(choose_chain(candidates, 0, self._run.blocks).hops)

    def _read_shards(self, client: _Client, now_s: float) -> None:
        if now_s - client.read_s < POOL_AGE_S:
            return
        client.read_s = now_s
        count = min(POOL_READ, self._run.nodes)
        for node in client.dice.sample(range(self._run.nodes), count):
            client.known.pop(node, None)
            client.known[node] = None
        for node in list(client.known)[: max(0, len(client.known) - POOL_NODES)]:
            del client.known[node]

    def _by_announcements(self, client: _Client, now_s: float) -> list[tuple[int, int]]:
        candidates = [
            candidate(
                record,
                load,
                round_trip_s=2 * float(self._delays_s[client.city, self._cities[node]]),
            )
            for node, (record, load) in enumerate(zip(self._records, self._announced, strict=True))
        ]
        return self._hops(choose_chain(candidates, 0, self._run.blocks).hops)

    def _hops(self, hops: Sequence[Hop]) -> list[tuple[int, int]]:
        return [(self._index[hop.peer_id], hop.end_block - hop.first_block) for hop in hops]

    def _by_oracle(self, client: _Client, now_s: float) -> list[tuple[int, int]]:
        """The cheapest chain over all nodes at their present load, with this session on them."""
        hosted = self._ends - self._starts
        block_s = self._block_s
        entry_s = HAND_OVER_S + hosted * block_s * self._busy / 2
        return cheapest_chain(
            self._starts,
            self._ends,
            self._cities,
            block_s,
            entry_s,
            self._delays_s,
            client.city,
            self._run.blocks,
        )


def cheapest_chain(
    starts: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    ends: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    cities: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    block_s: Vector,
    entry_s: Vector,
    delays_s: Vector,
    client_city: int,
    number_of_blocks: int,
) -> list[tuple[int, int]]:
    """Exact for true delays ``[city, city]``: ``(node, blocks)`` of each hop.

    Block by block: a node is entered from the cheapest node of each city, or goes on.
    """
    nodes = len(starts)
    cost_s = np.full(nodes, np.inf)
    entered = np.zeros((number_of_blocks, nodes), dtype=np.int64)
    """The node before, at the boundary where this node was entered; -1: the client."""
    since = np.zeros(nodes, dtype=np.int64)
    entered_at: list[Vector] = []
    for block in range(number_of_blocks):
        here = (starts <= block) & (block < ends)
        if block == 0:
            new_s = delays_s[client_city, cities] + entry_s
            before = np.full(nodes, -1)
        else:
            best_node = np.full(CITIES, -1)
            best_s = np.full(CITIES, np.inf)
            for city in range(CITIES):
                inside = np.where(cities == city, cost_s, np.inf)
                best_node[city] = int(np.argmin(inside))
                best_s[city] = inside[best_node[city]]
            arriving = best_s[:, None] + delays_s
            from_city = np.argmin(arriving, axis=0)
            new_s = arriving[from_city, np.arange(CITIES)][cities] + entry_s
            before = best_node[from_city][cities]
        staying = np.where(here, cost_s, np.inf)
        better = here & (new_s < staying)
        cost_s = np.where(better, new_s, staying) + block_s
        since = np.where(better, block, since)
        entered[block] = np.where(better, before, 0)
        entered_at.append(since.astype(np.float64))
    node = int(np.argmin(cost_s + delays_s[cities, client_city]))
    hops: list[tuple[int, int]] = []
    end = number_of_blocks
    while node >= 0:
        first = int(entered_at[end - 1][node])
        hops.append((node, end - first))
        node, end = int(entered[first][node]), first
    return hops[::-1]


def _record(volunteer: Volunteer, span: tuple[int, int], blocks: int) -> NodeRecord:
    return NodeRecord(
        peer_id=volunteer.peer_id,
        model_name="model",
        model_revision=bytes(32),
        number_of_blocks=blocks,
        shards=1,
        first_block=span[0],
        end_block=span[1],
        state=NodeState.ONLINE,
        dtype=DType.BFLOAT16,
        minimum_version=MINIMUM_VERSION,
        maximum_version=MAXIMUM_VERSION,
        sequence=1,
        expires_unix_s=1,
        decode_tokens_per_s=int(volunteer.speed_one_session),
        batched_tokens_per_s=int(volunteer.speed),
        cache_tokens_total=CACHE_TOKENS,
        cache_tokens_free=CACHE_TOKENS,
        organisation=volunteer.organisation,
        country=volunteer.country,
    )
