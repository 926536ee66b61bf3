"""The cheapest chain among nodes that said how busy they are: costs and the choice; pure.

Costs are seconds for one token. Delays between nodes are not known to a client: the triangle of the
client and two nodes bounds them, and the middle of these bounds is taken.

Who is asked at all is in ``swarm.routing``, the asking in ``client.router``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from swarm.protocol.identity import PeerId
from swarm.protocol.messages import LoadReport
from swarm.protocol.records import NodeRecord
from swarm.routing import UNKNOWN_BLOCK_S, ChainPlan, Hop, local_hosts, no_route, uncovered

HAND_OVER_S = 0.001
"""What a hop costs beside compute and the link: framing, copies, waking tasks."""
APART_S = 60.0
"""What a link costs in the choice between two nodes that had better not be neighbours: more than
any detour."""
IDLE_SESSION_SHARE = 0.25
"""A session counts at least this much, even if its node is idle: most of these are just opened."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a peer is, as seen from the client."""

    round_trip_s: float
    hosts: frozenset[str] = frozenset()
    """Of ``local_hosts``."""
    peer: PeerId | None = None
    """Who is there; None for the client."""


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
    return Place(round_trip_s, local_hosts(record.addresses), record.peer_id)


def one_way_s(one: Place, other: Place) -> float:
    """The delay of a link. Between two nodes: the middle of what the triangle with the client
    allows, ``|a - b| / 2 .. (a + b) / 2`` for their round trips a and b; 0 on one machine.
    """
    if one.hosts and one.hosts & other.hosts:
        return 0.0
    return max(one.round_trip_s, other.round_trip_s) / 2


def link_s(one: Place, other: Place, apart: Collection[frozenset[PeerId]]) -> float:
    """What a link costs in the choice: its delay, and more between two that are ``apart``."""
    delay_s = one_way_s(one, other)
    if apart and one.peer is not None and other.peer is not None:
        delay_s += APART_S * (frozenset((one.peer, other.peer)) in apart)
    return delay_s


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
    apart: Collection[frozenset[PeerId]] = (),
) -> ChainPlan:
    """The cheapest chain over ``[first_block, end_block)``, with the links to what is around it.

    Pairs that are ``apart`` become neighbours only where there is no other way.

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
        node: (
            link_s(previous, places[node], apart) + entry_s[node],
            _Visit(node, first_block, None),
        )
        for node in nodes
        if starts[node] == first_block
    }
    for boundary, next_boundary in pairwise(boundaries):
        if boundary > first_block:
            ways = _handed_over(ways, boundary, nodes, starts, ends, places, entry_s, apart)
        size = next_boundary - boundary
        ways = {node: (cost + size * block_s[node], way) for node, (cost, way) in ways.items()}
    total_s, visit = min(
        (
            (cost + link_s(places[node], following, apart), way)
            for node, (cost, way) in ways.items()
        ),
        key=lambda reached: reached[0],
    )
    hops: list[Hop] = []
    end = end_block
    step: _Visit | None = visit
    while step is not None:
        record = records[step.node]
        hops.append(
            Hop(
                record.peer_id,
                record.display_name,
                record.addresses,
                step.first_block,
                end,
                block_s=block_s[step.node],
            )
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
    apart: Collection[frozenset[PeerId]],
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
            cost += link_s(places[source], places[node], apart) + entry_s[node]
            if (best is None or cost < best[0]) and not way.includes(node):
                best = (cost, _Visit(node, boundary, way))
        if best is not None:
            after[node] = best
    return after
