"""Which nodes serve a request, and where a new node should go: pure choices.

Nothing here asks anybody or rolls dice of its own. The way of a client (``client.router``):

1. ``obstacle`` drops nodes that may not serve the session, whatever their load.
2. ``sample_nodes`` draws some of the rest by lot. Announced loads are old: if all clients took the
   best node by them, all would take the same.
3. The client asks these for their load, and ``candidate`` turns each answer into costs.
4. ``choose_chain`` finds the cheapest chain among them; ``no_route`` says why there is none.

Costs are seconds for one token. Delays between nodes are not known to a client: the triangle of
the client and two nodes bounds them, and the middle of these bounds is taken.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address
from itertools import accumulate, groupby, pairwise
from math import ceil
from statistics import median

from swarm.protocol.errors import NoRouteError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import LoadReport
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType
from swarm.protocol.version import MAXIMUM_VERSION, MINIMUM_VERSION

HAND_OVER_S = 0.001
"""What a hop costs beside compute and the link: framing, copies, waking tasks."""
UNKNOWN_ROUND_TRIP_S = 0.1
"""Of a peer that was never asked: dearer than most, so that measured ones are preferred."""
UNKNOWN_BLOCK_S = 0.01
"""One token through one block on a node that does not say how fast it is."""
IDLE_SESSION_SHARE = 0.25
"""A session counts at least this much, even if its node is idle: most of these are just opened."""
RETRY_AFTER_MS = 2000

SAMPLE = 32
"""Nodes that are asked for one chain. Of so few one rarely finds no chain among them."""
SAMPLE_DEPTH = 8
"""If spans are small: so many nodes for each block, as a mean."""
LARGEST_SAMPLE = 160
NEAR_S = 0.005
"""Added to the delay in the odds of a draw: among near nodes distance should not decide."""
BOAST = 10.0
"""A node that announces more than so many times the median speed is not drawn more often."""

SERVING_STATES = (NodeState.ONLINE, NodeState.MOVING)
NO_ROOM = "without room"


@dataclass(frozen=True, slots=True)
class Hop:
    """One node of a chain and the blocks ``[first_block, end_block)`` that it computes there."""

    peer_id: PeerId
    display_name: str
    addresses: tuple[str, ...]
    first_block: int
    end_block: int


@dataclass(frozen=True, slots=True)
class ChainPlan:
    """Hops whose spans follow on each other and cover all blocks asked for."""

    hops: tuple[Hop, ...]
    expected_step_s: float
    """For one token."""


def is_one_machine(plan: ChainPlan) -> bool:
    """Whether all hops run on one computer, by a local address that they have in common.

    A public address in common says nothing: many computers share one behind a NAT.
    """
    hosts = [local_hosts(hop.addresses) for hop in plan.hops]
    return bool(frozenset.intersection(*hosts)) if hosts else False


@lru_cache(maxsize=4096)
def local_hosts(addresses: tuple[str, ...]) -> frozenset[str]:
    """The IP addresses among multiaddresses that mean something in one network only."""
    hosts = set()
    for address in addresses:
        parts = address.split("/")
        if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
            continue
        try:
            if not ip_address(parts[2]).is_global:
                hosts.add(parts[2])
        except ValueError:
            continue
    return frozenset(hosts)


def block_ranges(blocks: Iterable[int]) -> str:
    """Ascending block numbers as people write them: ``0-4, 9``."""
    ranges = []
    for _, group in groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0]):
        members = [block for _, block in group]
        ranges.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return ", ".join(ranges)


# --- who may serve -------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Needs:
    """What a session demands of every node of its chain."""

    model_revision: bytes
    number_of_blocks: int
    """Of the whole model."""
    tokens: int = 0
    """Rows x positions for which each hop must have room."""
    dtype: DType | None = None
    """In which nodes must compute; None: any."""
    adapters: tuple[str, ...] = ()
    versions: tuple[int, int] = (MINIMUM_VERSION, MAXIMUM_VERSION)


def obstacle(record: NodeRecord, needs: Needs) -> str:
    """Why a node cannot serve, as people read it; empty if it can. The one place for such rules.

    Free room and load are not looked at: a record is too old to tell.
    """
    if record.model_revision != needs.model_revision:
        return "of another revision"
    if record.number_of_blocks != needs.number_of_blocks:
        return "of another model"
    if record.state not in SERVING_STATES:
        return record.state.name.lower()
    oldest, newest = needs.versions
    if record.minimum_version > newest or record.maximum_version < oldest:
        return "of another protocol version"
    if needs.dtype is not None and record.dtype is not needs.dtype:
        return "of another dtype"
    if not set(needs.adapters) <= set(record.adapters):
        return "without the adapter"
    if record.cache_tokens_total < needs.tokens:
        return NO_ROOM
    return ""


def overlaps(record: NodeRecord, first_block: int, end_block: int) -> bool:
    """Whether a node hosts any of these blocks."""
    return record.first_block < end_block and record.end_block > first_block


def uncovered(records: Iterable[NodeRecord], first_block: int, end_block: int) -> tuple[int, ...]:
    """The blocks of ``[first_block, end_block)`` that none of the nodes hosts, ascending."""
    missing: list[int] = []
    reached = first_block
    for record in sorted(records, key=lambda record: record.first_block):
        if record.first_block >= end_block:
            break
        missing += range(reached, record.first_block)
        reached = max(reached, record.end_block)
    missing += range(reached, end_block)
    return tuple(missing)


def no_route(
    records: Iterable[NodeRecord],
    reasons: Mapping[PeerId, str],
    first_block: int,
    end_block: int,
    *,
    retry_after_ms: int = RETRY_AFTER_MS,
) -> NoRouteError:
    """The error that says which blocks are missing, or that there is only no room.

    ``reasons`` has a text for each node that cannot be used: ``NO_ROOM`` or why else.
    """
    known = [record for record in records if overlaps(record, first_block, end_block)]
    willing = [record for record in known if reasons.get(record.peer_id, "") in ("", NO_ROOM)]
    missing = uncovered(willing, first_block, end_block)
    if not missing:
        return NoRouteError(
            "the swarm has no room for this session now; "
            f"try again in {max(1, ceil(retry_after_ms / 1000))} s",
            retry_after_ms=retry_after_ms,
        )
    message = f"blocks {block_ranges(missing)} are served by nobody"
    others = Counter(
        reasons[record.peer_id]
        for record in known
        if reasons.get(record.peer_id) and any(_hosts(record, block) for block in missing)
    )
    if others:
        message += " else (" + ", ".join(f"{n} {why}" for why, n in sorted(others.items())) + ")"
    return NoRouteError(message, missing_blocks=missing)


def _hosts(record: NodeRecord, block: int) -> bool:
    return record.first_block <= block < record.end_block


# --- who is asked --------------------------------------------------------------------------------
def sample_nodes(
    records: Sequence[NodeRecord],
    first_block: int,
    end_block: int,
    *,
    dice: random.Random,
    round_trip_s: Mapping[PeerId, float] | None = None,
) -> list[NodeRecord]:
    """Nodes to ask for their load: all of a small swarm, of a large one some drawn by lot.

    Weighted by speed, nearness, span and load, without replacement. As many as ``SAMPLE``, more where
    spans are small, and more again until they cover ``[first_block, end_block)`` if ``records`` do.
    """
    hosts = [record for record in records if overlaps(record, first_block, end_block)]
    if len(hosts) <= SAMPLE:
        return hosts
    spans = sum(
        min(record.end_block, end_block) - max(record.first_block, first_block) for record in hosts
    )
    count = ceil(SAMPLE_DEPTH * (end_block - first_block) * len(hosts) / spans)
    count = min(max(count, SAMPLE), LARGEST_SAMPLE)
    trips_s = round_trip_s or {}
    fastest = BOAST * median(record.decode_tokens_per_s for record in hosts)
    drawn: list[tuple[float, NodeRecord]] = []
    for record in hosts:
        # The smallest of exponential variables at these rates: the same draw as Gumbel's top k.
        trip_s = trips_s.get(record.peer_id, UNKNOWN_ROUND_TRIP_S)
        odds = _odds(record, first_block, end_block, trip_s, fastest)
        drawn.append((dice.expovariate(1.0) / odds, record))
    drawn.sort(key=lambda pair: pair[0])
    ordered = [record for _, record in drawn]
    while count < len(ordered) and uncovered(ordered[:count], first_block, end_block):
        count *= 2
    return ordered[:count]


def _odds(
    record: NodeRecord, first_block: int, end_block: int, round_trip_s: float, fastest: float
) -> float:
    """Weight of a node in the draw: by how fast it would pass blocks as a hop, how many, and how
    free it was when it announced itself.

    Long spans count twice, since a chain of few hops is rarely beaten.
    """
    blocks = min(record.end_block, end_block) - max(record.first_block, first_block)
    speed = min(record.decode_tokens_per_s, fastest) or 1 / UNKNOWN_BLOCK_S
    hop_s = NEAR_S + round_trip_s / 2 + blocks / speed
    room = record.cache_tokens_free / max(1, record.cache_tokens_total)
    idle = (1 - record.busy_permille / 1000) / (1 + record.queued_steps)
    return blocks**2 / hop_s * max(0.05, room) * max(0.05, idle)


# --- what they cost ------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Place:
    """Where a peer is, as seen from the client."""

    round_trip_s: float
    hosts: frozenset[str] = frozenset()
    """Of ``local_hosts``."""


CLIENT = Place(0.0)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that may be a hop, and what it would cost."""

    record: NodeRecord
    place: Place
    block_s: float
    """One token through one block, together with what other sessions compute at that time."""
    wait_s: float
    """Until the device is done with what it does when the token arrives."""


def place_of(record: NodeRecord, round_trip_s: float) -> Place:
    return Place(round_trip_s, local_hosts(record.addresses))


def one_way_s(one: Place, other: Place) -> float:
    """The delay of a link. Between two nodes: the middle of what the triangle with the client
    allows, ``|a - b| / 2 .. (a + b) / 2`` for their round trips a and b; 0 on one machine.
    """
    if one.hosts and one.hosts & other.hosts:
        return 0.0
    return max(one.round_trip_s, other.round_trip_s) / 2


def others_in_batch(load: LoadReport, in_flight: int = 0) -> float:
    """So many steps of other sessions a step will meet in its batch.

    ``in_flight`` are sessions that the client itself is opening there, which the node did not count
    yet: without them a burst of sessions would all go to the same node.
    """
    active = max(load.busy_permille / 1000, IDLE_SESSION_SHARE)
    return max(load.sessions * active, load.queued_steps) + in_flight


def announced_block_s(record: NodeRecord, others: float) -> float:
    """One token through one block in a batch with ``others`` more, by what the node announces."""
    speed, batched = record.decode_tokens_per_s, record.batched_tokens_per_s
    alone_s = 1 / speed if speed else UNKNOWN_BLOCK_S
    each_s = 1 / batched if batched > speed else alone_s
    return alone_s + others * each_s


def candidate(
    record: NodeRecord,
    load: LoadReport,
    *,
    round_trip_s: float,
    in_flight: int = 0,
    slowness: float = 1.0,
) -> Candidate:
    """The costs of a node, by its announced speed and its answer.

    ``slowness`` corrects the announced speed: what the client measured over what it expected.
    """
    others = others_in_batch(load, in_flight)
    block_s = slowness * announced_block_s(record, others)
    hosted = record.end_block - record.first_block
    return Candidate(
        record,
        place_of(record, round_trip_s),
        block_s,
        # Half a step, if one is being computed.
        wait_s=hosted * block_s * load.busy_permille / 1000 / 2,
    )


def charged_s(step_s: float, reported_s: Sequence[float], places: Sequence[Place]) -> list[float]:
    """How long each hop of a chain took for a step that the client saw take ``step_s``.

    ``reported_s`` is the hops' own word. Time that neither this nor the links explain is charged to
    all hops alike: who reports less than it took gains nothing where it is the only liar, and
    honest hops meet it in one chain only.
    """
    way = [CLIENT, *places, CLIENT]
    links_s = sum(one_way_s(one, other) for one, other in pairwise(way))
    explained_s = links_s + sum(reported_s) + HAND_OVER_S * len(places)
    unexplained_s = max(0.0, step_s - explained_s) / len(places)
    return [hop_s + unexplained_s for hop_s in reported_s]


# --- the chain -----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Visit:
    """The hops of a way, the latest first."""

    node: int
    first_block: int
    before: _Visit | None

    def includes(self, node: int) -> bool:
        visit: _Visit | None = self
        while visit is not None:
            if visit.node == node:
                return True
            visit = visit.before
        return False


def choose_chain(
    candidates: Sequence[Candidate],
    first_block: int,
    end_block: int,
    *,
    previous: Place = CLIENT,
    following: Place = CLIENT,
) -> ChainPlan:
    """The cheapest chain over ``[first_block, end_block)``, with the links to what is around it.

    Of equal chains the one with earlier candidates. Raises NoRouteError for uncovered blocks.

    Dynamic programming over block boundaries: for each node the cheapest way to come so far with
    this node as the latest hop. A node is left or entered where one of both spans begins or ends:
    costs are linear in the place of a hand-over, so the best place is an extreme one. It takes
    O(K^2) for K nodes. A way never returns to a node; where the cheapest would, a dearer one is
    taken.
    """
    if not first_block < end_block:
        raise ValueError(f"no blocks to route: [{first_block}, {end_block})")
    records = [entry.record for entry in candidates]
    missing = uncovered(records, first_block, end_block)
    if missing:
        raise no_route(records, {}, first_block, end_block)
    starts = [max(record.first_block, first_block) for record in records]
    ends = [min(record.end_block, end_block) for record in records]
    nodes = [node for node in range(len(records)) if starts[node] < ends[node]]
    places = [entry.place for entry in candidates]
    block_s = [entry.block_s for entry in candidates]
    entry_s = [HAND_OVER_S + entry.wait_s for entry in candidates]

    boundaries = sorted({starts[node] for node in nodes} | {ends[node] for node in nodes})
    ways: dict[int, tuple[float, _Visit]] = {
        node: (one_way_s(previous, places[node]) + entry_s[node], _Visit(node, first_block, None))
        for node in nodes
        if starts[node] == first_block
    }
    for boundary, next_boundary in pairwise(boundaries):
        if boundary > first_block:
            ways = _handed_over(ways, boundary, nodes, starts, ends, places, entry_s)
        size = next_boundary - boundary
        ways = {node: (cost + size * block_s[node], way) for node, (cost, way) in ways.items()}
    total_s, visit = min(
        ((cost + one_way_s(places[node], following), way) for node, (cost, way) in ways.items()),
        key=lambda reached: reached[0],
    )
    hops: list[Hop] = []
    end = end_block
    step: _Visit | None = visit
    while step is not None:
        record = records[step.node]
        hops.append(
            Hop(record.peer_id, record.display_name, record.addresses, step.first_block, end)
        )
        end, step = step.first_block, step.before
    return ChainPlan(tuple(reversed(hops)), total_s)


def _handed_over(
    ways: Mapping[int, tuple[float, _Visit]],
    boundary: int,
    nodes: Sequence[int],
    starts: Sequence[int],
    ends: Sequence[int],
    places: Sequence[Place],
    entry_s: Sequence[float],
) -> dict[int, tuple[float, _Visit]]:
    """The ways at ``boundary``, each node either kept or entered from the best one before."""
    leaving = [node for node in ways if ends[node] == boundary]
    after: dict[int, tuple[float, _Visit]] = {}
    for node in nodes:
        if not starts[node] <= boundary < ends[node]:
            continue
        best = ways.get(node)
        from_nodes: Iterable[int] = ways if starts[node] == boundary else leaving
        for source in from_nodes:
            cost, way = ways[source]
            cost += one_way_s(places[source], places[node]) + entry_s[node]
            if (best is None or cost < best[0]) and not way.includes(node):
                best = (cost, _Visit(node, boundary, way))
        if best is not None:
            after[node] = best
    return after


# --- where a new node goes -----------------------------------------------------------------------
def weakest_span(
    replicas_per_block: Sequence[int], number_of_blocks_to_host: int
) -> tuple[int, int]:
    """Where a joining node helps most: ``(first_block, end_block)``.

    The stretch with most uncovered blocks, then the lowest total of replicas, then the first one.
    """
    total = len(replicas_per_block)
    size = min(number_of_blocks_to_host, total)
    if size < 1:
        raise ValueError("a span has at least one block")
    replicas = [0, *accumulate(replicas_per_block)]
    empty = [0, *accumulate(int(count == 0) for count in replicas_per_block)]

    def weakness(first: int) -> tuple[int, int]:
        end = first + size
        return empty[first] - empty[end], replicas[end] - replicas[first]

    first_block = min(range(total - size + 1), key=weakness)
    return first_block, first_block + size
