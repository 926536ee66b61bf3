"""Which nodes serve a request, and where a new node should go: pure choices.

Nothing here asks anybody or rolls dice of its own. A chain is the cheapest path through (block
boundary, node) edges. Round trips between nodes are not known to a client; it takes the way over
itself for an upper bound, so that a hop costs its own round trip.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import accumulate, groupby

from swarm.protocol.errors import NoRouteError
from swarm.protocol.identity import PeerId
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType
from swarm.protocol.version import MAXIMUM_VERSION, MINIMUM_VERSION

HAND_OVER_S = 0.001
"""What a hop costs beside compute and the link: framing, copies, waking tasks."""
UNKNOWN_ROUND_TRIP_S = 0.1
"""Of a peer that was never asked: dearer than most, so that measured ones are preferred."""
UNKNOWN_BLOCK_S = 0.01
"""One token through one block on a node that does not say how fast it is."""
RETRY_AFTER_MS = 2000


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
    hosts = [
        {
            host
            for address in hop.addresses
            if (host := _ip_address(address)) is not None and not host.is_global
        }
        for hop in plan.hops
    ]
    return bool(set.intersection(*hosts)) if hosts else False


def _ip_address(multiaddress: str) -> IPv4Address | IPv6Address | None:
    parts = multiaddress.split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
        return None
    try:
        return ip_address(parts[2])
    except ValueError:
        return None


def choose_chain(
    records: Iterable[NodeRecord],
    *,
    number_of_blocks: int,
    dtype: DType | None = None,
    versions: tuple[int, int] = (MINIMUM_VERSION, MAXIMUM_VERSION),
    excluded: Collection[PeerId] = (),
    round_trip_s: Mapping[PeerId, float] | None = None,
    tokens: int = 0,
    first_block: int = 0,
    end_block: int | None = None,
    dice: random.Random | None = None,
) -> ChainPlan:
    """The cheapest chain for ``[first_block, end_block)``; all blocks when not given.

    ``tokens`` of cache must be free on each hop, ``dtype`` (if given) be what it computes in.
    ``dice`` orders equal choices, so that clients do not all take the same one.
    Raises NoRouteError: with the missing blocks, or with a retry hint when only room is missing.
    """
    end_block = number_of_blocks if end_block is None else end_block
    if not 0 <= first_block < end_block <= number_of_blocks:
        raise ValueError(f"no blocks to route: [{first_block}, {end_block})")
    known = [record for record in records if record.number_of_blocks == number_of_blocks]
    obstacles = {record.peer_id: _obstacle(record, dtype, versions, excluded) for record in known}
    willing = [record for record in known if not obstacles[record.peer_id]]
    usable = [record for record in willing if record.cache_tokens_free >= tokens]
    wanted = range(first_block, end_block)
    if _uncovered(usable, wanted):
        raise _no_route(known, willing, wanted, obstacles)
    if dice is not None:
        dice.shuffle(usable)
    cost_s = _costs(usable, round_trip_s or {})
    return _cheapest_path(usable, first_block, end_block, cost_s)


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
    uncovered = [0, *accumulate(int(count == 0) for count in replicas_per_block)]

    def weakness(first: int) -> tuple[int, int]:
        end = first + size
        return uncovered[first] - uncovered[end], replicas[end] - replicas[first]

    first_block = min(range(total - size + 1), key=weakness)
    return first_block, first_block + size


def block_ranges(blocks: Iterable[int]) -> str:
    """Ascending block numbers as people write them: ``0-4, 9``."""
    ranges = []
    for _, group in groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0]):
        members = [block for _, block in group]
        ranges.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return ", ".join(ranges)


# --- filters -------------------------------------------------------------------------------------
def _obstacle(
    record: NodeRecord,
    dtype: DType | None,
    versions: tuple[int, int],
    excluded: Collection[PeerId],
) -> str:
    """Why a node cannot be used, whatever its room; empty if it can."""
    if record.peer_id in excluded:
        return "failed before"
    if record.state is not NodeState.ONLINE:
        return record.state.name.lower()
    if record.minimum_version > versions[1] or record.maximum_version < versions[0]:
        return "of another protocol version"
    if dtype is not None and record.dtype is not dtype:
        return "of another dtype"
    return ""


def _uncovered(records: Iterable[NodeRecord], wanted: Iterable[int]) -> tuple[int, ...]:
    covered = {block for record in records for block in range(record.first_block, record.end_block)}
    return tuple(block for block in wanted if block not in covered)


def _no_route(
    known: Sequence[NodeRecord],
    willing: Sequence[NodeRecord],
    wanted: range,
    obstacles: Mapping[PeerId, str],
) -> NoRouteError:
    missing = _uncovered(willing, wanted)
    if not missing:
        return NoRouteError(
            "the swarm has no room for this session now; try again in a moment",
            retry_after_ms=RETRY_AFTER_MS,
        )
    message = f"blocks {block_ranges(missing)} are served by nobody"
    reasons = Counter(
        obstacles[record.peer_id]
        for record in known
        if obstacles[record.peer_id] and _uncovered([record], missing) != missing
    )
    if reasons:
        message += " else (" + ", ".join(f"{n} {why}" for why, n in sorted(reasons.items())) + ")"
    return NoRouteError(message, missing_blocks=missing)


# --- path ----------------------------------------------------------------------------------------
def _costs(
    records: Iterable[NodeRecord], round_trip_s: Mapping[PeerId, float]
) -> Callable[[NodeRecord, int], float]:
    """Seconds that one token spends on a hop with so many blocks."""
    block_s: dict[PeerId, float] = {}
    entry_s: dict[PeerId, float] = {}
    for record in records:
        speed = record.decode_tokens_per_s
        block_s[record.peer_id] = 1 / speed if speed else UNKNOWN_BLOCK_S
        hosted = record.end_block - record.first_block
        entry_s[record.peer_id] = (
            HAND_OVER_S
            + round_trip_s.get(record.peer_id, UNKNOWN_ROUND_TRIP_S)
            + record.queued_steps * hosted * block_s[record.peer_id]
        )
    return lambda record, blocks: entry_s[record.peer_id] + blocks * block_s[record.peer_id]


def _cheapest_path(
    records: Sequence[NodeRecord],
    first_block: int,
    end_block: int,
    cost_s: Callable[[NodeRecord, int], float],
) -> ChainPlan:
    """Dynamic programming over block boundaries; every block is known to be covered.

    Only boundaries where some span begins or ends matter: the cost is linear in where one node
    hands over to the next, so the best place is an extreme one.
    """
    ends = {edge for record in records for edge in (record.first_block, record.end_block)}
    inside = sorted(edge for edge in ends if first_block < edge < end_block)
    boundaries = [first_block, *inside, end_block]
    best_s: dict[int, float] = {first_block: 0.0}
    came_by: dict[int, tuple[int, NodeRecord]] = {}
    for position, start in enumerate(boundaries[:-1]):
        for record in records:
            if not record.first_block <= start < record.end_block:
                continue
            for end in boundaries[position + 1 :]:
                if end > record.end_block:
                    break
                reached_s = best_s[start] + cost_s(record, end - start)
                if reached_s < best_s.get(end, float("inf")):
                    best_s[end] = reached_s
                    came_by[end] = (start, record)
    spans: list[tuple[NodeRecord, int, int]] = []
    end = end_block
    while end > first_block:
        start, record = came_by[end]
        spans.insert(0, (record, start, end))
        end = start
    spans = _without_returns(spans)
    return ChainPlan(
        hops=tuple(
            Hop(record.peer_id, record.display_name, record.addresses, start, end)
            for record, start, end in spans
        ),
        expected_step_s=sum(cost_s(record, end - start) for record, start, end in spans),
    )


def _without_returns(
    spans: Sequence[tuple[NodeRecord, int, int]],
) -> list[tuple[NodeRecord, int, int]]:
    """A node that would be visited twice takes what lies between as well; it hosts that too."""
    kept: list[tuple[NodeRecord, int, int]] = []
    for record, start, end in spans:
        for position, (visited, visited_start, _) in enumerate(kept):
            if visited.peer_id == record.peer_id:
                kept[position:] = []
                start = visited_start
                break
        kept.append((record, start, end))
    return kept
