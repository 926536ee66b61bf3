"""What one look at the swarm leaves behind, row by row."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.status.incidents import Finding
from swarm.status.presence import Interval
from swarm.status.snapshot import Incident, Work
from swarm.status.work import Counters

DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Declared:
    """What a node says of itself, as it is remembered and shown."""

    name: str
    organisation: str
    country: str
    model_name: str
    number_of_blocks: int
    first_block: int
    end_block: int
    precision: str
    tokens_per_s: float
    standing: str
    adapters: tuple[str, ...]
    software: str
    energy_source: str


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One node of one model."""

    peer_id: str
    revision: str
    registered_unix_s: float
    seen_unix_s: float
    declared: Declared
    counters: Counters
    work: Work


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One model in one look, to be added to its bin."""

    revision: str
    nodes: int
    least_replicas: int
    work: Work


@dataclass(frozen=True, slots=True)
class Look:
    """Everything to be written of one look."""

    at_unix_s: float
    previous_unix_s: float | None = None
    """Of the look before, if nothing was missed in between: what was seen then, and is not gone or
    changed, was seen again. Most of ten thousand nodes are neither."""
    watched: Interval | None = None
    nodes: tuple[NodeRow, ...] = ()
    """New ones, and those that have changed."""
    gone: tuple[tuple[str, str], ...] = ()
    """Peer and revision of nodes that were there at the look before."""
    presence: tuple[tuple[str, Interval], ...] = ()
    """Intervals that begin with this look."""
    gone_peers: tuple[str, ...] = ()
    work: tuple[tuple[str, str, Work], ...] = ()
    """Peer, revision, and what was added."""
    samples: tuple[SampleRow, ...] = ()
    opened: tuple[Finding, ...] = ()
    changed: tuple[tuple[Incident, Finding], ...] = ()
    closed: tuple[Incident, ...] = ()
    closed_at_once: tuple[Finding, ...] = ()
    """Incidents of a moment."""
