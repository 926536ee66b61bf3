"""Who has given how much: by node and by organisation; pure.

Where the ledger of the swarm has settled figures they rank; else what the nodes announced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter

from swarm.status.snapshot import NodeStatus, Work

MOST_ROWS = 50


@dataclass(frozen=True, slots=True)
class LeaderRow:
    """A node, or an organisation with all its nodes."""

    name: str
    organisation: str
    peer_id: str
    nodes: int
    work: Work
    settled: float
    share: float
    """Of everything that ranks."""


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """Highest first."""

    settled: bool
    """Whether the order is that of a ledger."""
    nodes: tuple[LeaderRow, ...]
    organisations: tuple[LeaderRow, ...]


def leaderboard(
    nodes: Iterable[NodeStatus], settled: Mapping[str, float] | None = None
) -> Leaderboard:
    """``settled``: credits by peer."""
    by_peer: dict[str, list[NodeStatus]] = {}
    for node in nodes:
        by_peer.setdefault(node.peer_id, []).append(node)
    of_ledger = settled or {}
    rows = [
        LeaderRow(
            name=own[0].title,
            organisation=own[0].organisation,
            peer_id=peer,
            nodes=1,
            work=sum((node.work for node in own), Work()),
            settled=of_ledger.get(peer, 0.0),
            share=0.0,
        )
        for peer, own in by_peer.items()
    ]
    rank = attrgetter("settled" if settled else "work.tokens")
    of_organisation: dict[str, LeaderRow] = {}
    for row in rows:
        known = of_organisation.get(row.organisation)
        of_organisation[row.organisation] = LeaderRow(
            name=row.organisation,
            organisation=row.organisation,
            peer_id="",
            nodes=row.nodes + (known.nodes if known else 0),
            work=row.work + (known.work if known else Work()),
            settled=row.settled + (known.settled if known else 0.0),
            share=0.0,
        )
    return Leaderboard(
        settled=bool(settled),
        nodes=_ranked(rows, rank),
        organisations=_ranked(of_organisation.values(), rank),
    )


def _ranked(rows: Iterable[LeaderRow], rank: attrgetter[float]) -> tuple[LeaderRow, ...]:
    ordered = sorted((row for row in rows if rank(row) > 0), key=lambda row: (-rank(row), row.name))
    total = sum(map(rank, ordered))
    return tuple(
        LeaderRow(
            row.name,
            row.organisation,
            row.peer_id,
            row.nodes,
            row.work,
            row.settled,
            rank(row) / total,
        )
        for row in ordered[:MOST_ROWS]
    )
