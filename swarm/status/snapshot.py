"""What the page knows at one moment: read-only, made once per period, shared by all requests."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from swarm.membership import ModelSummary
from swarm.protocol.records import NodeRecord
from swarm.status.block_map import WeakSpan


@dataclass(frozen=True, slots=True)
class Crawl:
    """What the directory said at one moment."""

    at_unix_s: float
    heard_unix_s: float
    """When the newest of it was announced: long ago when the directory does not answer."""
    stale_after_s: float
    """News older than this are no news."""
    models: tuple[tuple[ModelSummary, tuple[NodeRecord, ...]], ...]


class Standing(StrEnum):
    """What a node does."""

    JOINING = "joining"
    ONLINE = "online"
    MOVING = "moving"
    DRAINING = "draining"
    LOST = "lost"
    """It was there within the last day, and is not any more."""

    @property
    def serves(self) -> bool:
        return self in (Standing.ONLINE, Standing.MOVING)


@dataclass(frozen=True, slots=True)
class Work:
    """What a node, a model or a swarm has done, in so far as nodes announce it."""

    generated_tokens: float = 0.0
    """Of answers. Of a node: tokens x its share of the model's blocks, so that nodes add up."""
    prompt_tokens: float = 0.0
    energy_j: float = 0.0
    co2_g: float = 0.0
    metered_tokens: float = 0.0
    """Tokens, generated and of prompts, of nodes that say what energy they need."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.generated_tokens + other.generated_tokens,
            self.prompt_tokens + other.prompt_tokens,
            self.energy_j + other.energy_j,
            self.co2_g + other.co2_g,
            self.metered_tokens + other.metered_tokens,
        )

    @property
    def tokens(self) -> float:
        return self.generated_tokens + self.prompt_tokens

    @property
    def joules_per_token(self) -> float | None:
        """Through the whole model; None where nobody declares energy."""
        return self.energy_j / self.metered_tokens if self.metered_tokens else None


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node and the model that it serves; texts as strangers declared them, made plain."""

    peer_id: str
    name: str
    organisation: str
    country: str
    model_name: str
    revision: str
    number_of_blocks: int
    first_block: int
    end_block: int
    precision: str
    tokens_per_s: float
    """Through its span, one session, as announced."""
    standing: Standing
    adapters: tuple[str, ...]
    software: str
    registered_unix_s: float
    """When this page saw it first."""
    seen_unix_s: float
    uptime_24h: float | None
    """Share of the time in which the page looked; None before it has."""
    uptime_30d: float | None
    energy_source: str
    """measured, declared or empty."""
    work: Work
    """Since it was registered."""

    @property
    def title(self) -> str:
        """Its name, or the end of its key."""
        return self.name or f"…{self.peer_id[-8:]}"

    @property
    def last_block(self) -> int:
        return self.end_block - 1


@dataclass(frozen=True, slots=True)
class ProbeHop:
    """Who served a part of a probe."""

    peer_id: str
    name: str
    first_block: int
    end_block: int


@dataclass(frozen=True, slots=True)
class Probe:
    """A canary session through the whole model, as any user would open it."""

    revision: str
    at_unix_s: float
    succeeded: bool
    time_to_first_token_s: float = 0.0
    tokens_per_s: float = 0.0
    tokens: int = 0
    problem: str = ""
    """One of the words of ``probing.Problem``; empty when it succeeded."""
    hops: tuple[ProbeHop, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model revision."""

    name: str
    revision: str
    number_of_blocks: int
    replicas: tuple[int, ...]
    """Serving nodes of each block."""
    nodes_serving: int
    verdict: str
    """Name of a ``model_health.Verdict``, in lower case."""
    copies: float
    weak_spans: tuple[WeakSpan, ...]
    announced_tokens_per_s: float
    """Of one session on the fastest node of each block, the network left out; 0: not whole."""
    announced_batch_tokens_per_s: float
    """Of all sessions together, where the blocks are slowest."""
    adapters: tuple[str, ...]
    work_today: Work
    probe: Probe | None = None

    @property
    def is_whole(self) -> bool:
        return min(self.replicas, default=0) > 0

    @property
    def least_replicas(self) -> int:
        return min(self.replicas, default=0)


@dataclass(frozen=True, slots=True)
class Incident:
    """Something that users notice, from when to when."""

    number: int
    kind: str
    """blocks_missing, probe_failing, nodes_lost or page_blind."""
    revision: str
    model_name: str
    detail: str
    """Blocks as ``0-9, 12``, a count of nodes, or a probe's problem."""
    opened_unix_s: float
    closed_unix_s: float | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """A swarm in numbers, as national programmes report them."""

    volunteers_registered: int = 0
    volunteers_online: int = 0
    organisations: int = 0
    countries: int = 0
    models: int = 0
    models_whole: int = 0
    adapters: int = 0
    nodes_with_energy: int = 0
    today: Work = Work()
    month: Work = Work()
    ever: Work = Work()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that pages are made from."""

    version: int
    taken_unix_s: float
    heard_unix_s: float
    period_s: float
    stale_after_s: float = math.inf
    totals: Totals = Totals()
    models: tuple[ModelStatus, ...] = ()
    nodes: tuple[NodeStatus, ...] = ()
    """In the order of models and their blocks."""
    incidents: tuple[Incident, ...] = ()
    """Latest first."""
    of_peer: dict[str, tuple[NodeStatus, ...]] = field(default_factory=dict)

    def age_s(self, now_unix_s: float) -> float:
        """How old the newest of what is shown is."""
        return max(0.0, now_unix_s - self.heard_unix_s)

    def is_stale(self, now_unix_s: float) -> bool:
        return self.age_s(now_unix_s) > self.stale_after_s

    def model(self, revision: str) -> ModelStatus | None:
        return next((model for model in self.models if model.revision == revision), None)
