"""What the nodes of a model add up to, block by block: all that placement looks at.

A node counts where it will be: JOINING and MOVING nodes at their target, DRAINING ones nowhere.
Only ``staying`` is about now. All blocks are half-open intervals ``[first_block, end_block)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from swarm.protocol.identity import PeerId
from swarm.protocol.records import NodeRecord, NodeState

Vector = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PlacedNode:
    """What placement needs to know of a node."""

    peer_id: PeerId
    first_block: int
    end_block: int
    speed: float
    """Tokens per second through one block, batched."""
    state: NodeState = NodeState.ONLINE
    target: tuple[int, int] | None = None
    """Where a MOVING node goes."""
    organisation: str = ""
    """Nodes without one count as one organisation each."""
    country: str = ""
    uptime_s: float = 0.0

    @property
    def planned(self) -> tuple[int, int]:
        """The span that this node will serve."""
        return self.target or (self.first_block, self.end_block)

    @property
    def staying(self) -> tuple[int, int]:
        """The blocks that this node serves now and does not mean to leave; may be empty."""
        start, end = self.planned
        start = max(start, self.first_block)
        end = max(min(end, self.end_block), start)
        return (start, start) if self.state is NodeState.JOINING else (start, end)

    @property
    def availability(self) -> float:
        """Chance to live for ten more minutes; who was up for long will be up for long."""
        weight_s = max(self.uptime_s, 0.0) + 1800.0
        return weight_s / (weight_s + 600.0)

    @classmethod
    def from_record(cls, record: NodeRecord, *, now_unix_s: float) -> PlacedNode:
        """A node as it announces itself; all of it is a claim. The speed may be unknown: 0."""
        moves = record.state is NodeState.MOVING
        return cls(
            peer_id=record.peer_id,
            first_block=record.first_block,
            end_block=record.end_block,
            speed=float(record.batched_tokens_per_s or record.decode_tokens_per_s),
            state=record.state,
            target=record.placed_span if moves else None,
            organisation=record.organisation,
            country=record.country,
            uptime_s=now_unix_s - record.started_unix_s if record.started_unix_s else 0.0,
        )


def placed_nodes(records: Iterable[NodeRecord], *, now_unix_s: float) -> list[PlacedNode]:
    """The nodes as placement counts them: who has not measured its speed yet has the mean one."""
    nodes = [PlacedNode.from_record(record, now_unix_s=now_unix_s) for record in records]
    usual = typical_speed(nodes)
    return [node if node.speed else replace(node, speed=usual) for node in nodes]


def typical_speed(nodes: Iterable[PlacedNode]) -> float:
    """The mean of the known speeds; 1 when none is known."""
    known = [node.speed for node in nodes if node.speed > 0]
    return sum(known) / len(known) if known else 1.0


@dataclass(frozen=True, slots=True)
class BlockVectors:
    """Sums over nodes for each block; all arrays are ``[number_of_blocks]``."""

    throughput: Vector
    """Tokens per second, each node's speed spread evenly over its blocks."""
    replicas: Vector
    """Expected number that still live in ten minutes."""
    planned: Counts
    """Nodes that serve the block or will."""
    staying: Counts
    """Nodes that serve the block now and do not mean to leave it."""
    single_nodes: Counts
    """Nodes without an organisation."""
    of_organisation: Mapping[str, Counts] = field(default_factory=dict)
    of_country: Mapping[str, Vector] = field(default_factory=dict)
    """Throughput of the nodes in one country."""
    hosted_in_country: Mapping[str, int] = field(default_factory=dict)
    """Blocks that the nodes of a country host together."""
    nodes: int = 0

    @property
    def number_of_blocks(self) -> int:
        return len(self.throughput)

    @property
    def redundancy(self) -> float:
        """Blocks hosted / blocks of the model."""
        return float(self.planned.sum()) / self.number_of_blocks

    @property
    def speed(self) -> float:
        """Of all nodes together."""
        return float(self.throughput.sum())

    def organisations(self) -> Counts:
        """Independent organisations of each block."""
        count = self.single_nodes.copy()
        for replicas in self.of_organisation.values():
            count += replicas > 0
        return count

    def lacking_in(self, country: str) -> npt.NDArray[np.bool_]:
        """Blocks that no node in ``country`` hosts ``[number_of_blocks]``."""
        throughput = self.of_country.get(country)
        if throughput is None:
            return np.ones(self.number_of_blocks, dtype=bool)
        # Sums and differences leave rounding errors where nothing is.
        return np.asarray(throughput <= 1e-6 * self.speed / self.number_of_blocks)

    def outside_largest_organisation(self) -> Counts:
        """Nodes of each block that do not belong to the organisation that hosts most."""
        if not self.of_organisation:
            return self.planned
        largest = max(self.of_organisation.values(), key=lambda replicas: int(replicas.sum()))
        return np.asarray(self.planned - largest, dtype=np.int64)


def block_vectors(nodes: Iterable[PlacedNode], number_of_blocks: int) -> BlockVectors:
    """Aggregate what nodes announce; DRAINING ones count for nothing any more."""
    counted = [node for node in nodes if node.state is not NodeState.DRAINING]
    planned = [node.planned for node in counted]
    spans = np.array(planned, dtype=np.int64).reshape(len(counted), 2)
    sizes = spans[:, 1] - spans[:, 0]
    share = np.array([node.speed for node in counted]) / np.maximum(sizes, 1)
    staying = np.array([node.staying for node in counted], dtype=np.int64)

    def covered(bounds: Counts, weights: Vector) -> Vector:
        size = number_of_blocks + 1
        started = np.bincount(bounds[:, 0], weights, minlength=size)
        ended = np.bincount(bounds[:, 1], weights, minlength=size)
        return np.asarray(np.cumsum(started - ended)[:number_of_blocks], dtype=np.float64)

    def counts(bounds: Counts) -> Counts:
        return np.rint(covered(bounds, np.ones(len(bounds)))).astype(np.int64)

    of_organisation = {}
    for organisation, members in _groups(node.organisation for node in counted).items():
        of_organisation[organisation] = counts(spans[members])
    of_country = {}
    hosted_in_country = {}
    for country, members in _groups(node.country for node in counted).items():
        of_country[country] = covered(spans[members], share[members])
        hosted_in_country[country] = int(sizes[members].sum())
    single_nodes = of_organisation.pop("", np.zeros(number_of_blocks, dtype=np.int64))
    of_country.pop("", None)
    hosted_in_country.pop("", None)
    return BlockVectors(
        throughput=covered(spans, share),
        replicas=covered(spans, np.array([node.availability for node in counted])),
        planned=counts(spans),
        staying=counts(staying.reshape(len(counted), 2)),
        single_nodes=single_nodes,
        of_organisation=of_organisation,
        of_country=of_country,
        hosted_in_country=hosted_in_country,
        nodes=len(counted),
    )


def _groups(labels: Iterable[str]) -> dict[str, list[int]]:
    members: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    return members


def with_node(vectors: BlockVectors, node: PlacedNode) -> BlockVectors:
    """The vectors with one node more."""
    return _changed(vectors, node, 1)


def without(vectors: BlockVectors, node: PlacedNode) -> BlockVectors:
    """The vectors of all others; ``node`` must be as it was counted."""
    return _changed(vectors, node, -1)


def _changed(vectors: BlockVectors, node: PlacedNode, sign: int) -> BlockVectors:
    start, end = node.planned
    span = slice(start, end)
    throughput, replicas = vectors.throughput.copy(), vectors.replicas.copy()
    planned, staying = vectors.planned.copy(), vectors.staying.copy()
    share = sign * node.speed / max(end - start, 1)
    throughput[span] = np.maximum(throughput[span] + share, 0.0)
    replicas[span] = np.maximum(replicas[span] + sign * node.availability, 0.0)
    planned[span] += sign
    staying[slice(*node.staying)] += sign
    single_nodes = vectors.single_nodes
    of_organisation = dict(vectors.of_organisation)
    of_country = dict(vectors.of_country)
    hosted_in_country = dict(vectors.hosted_in_country)
    if node.organisation:
        known = of_organisation.get(node.organisation)
        organisation = np.zeros_like(planned) if known is None else known.copy()
        organisation[span] += sign
        of_organisation[node.organisation] = organisation
    else:
        single_nodes = single_nodes.copy()
        single_nodes[span] += sign
    if node.country:
        there = of_country.get(node.country)
        country = np.zeros_like(throughput) if there is None else there.copy()
        country[span] = np.maximum(country[span] + share, 0.0)
        of_country[node.country] = country
        hosted_in_country[node.country] = hosted_in_country.get(node.country, 0) + sign * (
            end - start
        )
    return BlockVectors(
        throughput,
        replicas,
        planned,
        staying,
        single_nodes,
        of_organisation,
        of_country,
        hosted_in_country,
        vectors.nodes + sign,
    )
