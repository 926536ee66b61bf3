"""Which nodes may serve a request, which of these are asked, and where a new node goes: pure.

Nothing here asks anybody or rolls dice of its own. The way of a client (``client.router``):

1. ``obstacle`` drops nodes that may not serve the session, whatever their load.
2. ``sample_nodes`` draws some of the rest by lot. Announced loads are old: if all clients took the
   best node by them, all would take the same.
3. The client asks these for their load; ``swarm.chain_choice`` finds the cheapest chain among them.
4. ``no_route`` says why there is none.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from ipaddress import ip_address
from itertools import groupby
from math import ceil
from statistics import median

from swarm.protocol.errors import NoRouteError
from swarm.protocol.identity import PeerId
from swarm.protocol.passport import Passport
from swarm.protocol.policy import Policy
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType
from swarm.protocol.version import MAXIMUM_VERSION, MINIMUM_VERSION

UNKNOWN_ROUND_TRIP_S = 0.1
"""Of a peer that was never asked: dearer than most, so that measured ones are preferred."""
UNKNOWN_BLOCK_S = 0.01
"""One token through one block on a node that does not say how fast it is."""
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

ADAPTER_ODDS = 100.0
"""How much more often nodes are asked that announce the session's adapter."""

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
    block_s: float = field(default=0.0, compare=False)
    """One token through one block, as it was expected when the hop was chosen; 0: unknown."""

    @property
    def promised_s(self) -> float:
        """One token through all of its blocks, as it was expected; 0: unknown."""
        return self.block_s * (self.end_block - self.first_block)


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


PassportOf = Callable[[PeerId], Passport | None]


def _no_passport(_: PeerId) -> Passport | None:
    return None


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
    """Hints (``adapter_hint``) that a node must announce."""
    preferred_adapter: bytes = b""
    """Id of an adapter that the client brings to nodes that lack it; those that have it are
    preferred."""
    versions: tuple[int, int] = (MINIMUM_VERSION, MAXIMUM_VERSION)
    route_seed: bytes = b""
    """The draw of a subsidised allowance: nodes that it can pay are preferred."""
    policy: Policy | None = None
    """Who may see anything of the session; None: everybody."""
    passport_of: PassportOf = _no_passport
    """What the swarm's authority says of a peer; None: nothing that is known."""


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


def adapter_hint(adapter_id: bytes) -> str:
    """How nodes announce a loaded adapter: half of its id, in hexadecimal."""
    return adapter_id.hex()[: len(adapter_id)]


def permitted(record: NodeRecord, needs: Needs) -> tuple[NodeRecord, str]:
    """The record with the blocks that the policy lets its node compute, or why there are none."""
    policy = needs.policy
    if policy is None:
        return record, ""
    passport = needs.passport_of(record.peer_id)
    refusal = policy.refusal(record.peer_id, passport)
    if refusal:
        return record, refusal
    first_block, end_block = policy.allowed_blocks(
        record.first_block, record.end_block, needs.number_of_blocks, passport
    )
    if first_block >= end_block:
        return record, "below the policy's tier for the first and last blocks"
    if (first_block, end_block) == (record.first_block, record.end_block):
        return record, ""
    return replace(record, first_block=first_block, end_block=end_block), ""


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
    adapter_id: bytes = b"",
) -> list[NodeRecord]:
    """Nodes to ask for their load: all of a small swarm, of a large one some drawn by lot.

    Weighted by speed, nearness, span and load, without replacement. As many as ``SAMPLE``, more
    where spans are small, and more again until they cover the blocks if ``records`` do. Those that
    announce the adapter are drawn more often.
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
        if adapter_id and adapter_hint(adapter_id) in record.adapters:
            odds *= ADAPTER_ODDS
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
