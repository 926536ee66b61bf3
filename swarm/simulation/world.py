"""What is true of a simulated swarm, and what its directory says of it.

The directory is a model: an announcement is seen by whoever reads afterwards; the record of a
crashed node is believed until neighbours or the record's expiry disagree. A read may be 30 s old as
long as fewer than 1 % of the nodes have changed. In a swarm with more shards than a node reads
(``swarm.nodes_view``) everybody knows a sample of the others.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from swarm.block_vectors import BlockVectors, PlacedNode, block_vectors
from swarm.placement import DEFAULTS, decision_interval_s
from swarm.protocol.identity import PeerId
from swarm.simulation.optimum import best_throughput, fewest_hops, weakest_stretch
from swarm.simulation.petals import SharedBalances
from swarm.virtual_time import LoopClock

STANDS_ALONE = 1.5
"""A country that hosts so many copies of the model should be covered by its own nodes."""
VIEW_AGE_S = 30.0
WATCH_S = 8.0
"""Between two looks for lost nodes, in a small swarm."""
VIEW_CHANGES = 0.01
"""Share of the nodes."""
VIEW_NODES = 800
"""What the shards hold that one node reads in one pass."""
SAMPLES = 8
"""Of the nodes of a large swarm; each reader meets one of them."""
SAMPLE_AGE_S = 240.0
SAMPLE_GROWTH = 1.05
"""A swarm that has grown by more is looked at anew."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The directory at one moment."""

    nodes: Mapping[PeerId, PlacedNode]
    vectors: BlockVectors


@dataclass(slots=True)
class Samples:
    """Measured from time to time."""

    weakest_stretch: list[float] = field(default_factory=list)
    weakest_block: list[float] = field(default_factory=list)
    redundancy: list[float] = field(default_factory=list)
    fewest_hops: list[int] = field(default_factory=list)
    present: list[int] = field(default_factory=list)
    outlives_organisation: list[bool] = field(default_factory=list)
    """Whether every block has a node outside of the largest organisation."""
    could_outlive: list[bool] = field(default_factory=list)
    """Whether the nodes outside of it host enough blocks for that at all."""
    country_alone: list[bool] = field(default_factory=list)
    """For each country with 1.5x the nodes that it needs: whether these cover the model."""


class World:
    """All nodes of one model."""

    def __init__(self, number_of_blocks: int) -> None:
        self.number_of_blocks = number_of_blocks
        self.samples = Samples()
        self.balances = SharedBalances(number_of_blocks)
        self.seconds = 0.0
        """Measured so far."""
        self.seconds_with: dict[int, float] = {1: 0.0, 2: 0.0}
        """For how long every block had so many replicas."""
        self.moves = 0
        self.joins = 0
        self.leaves = 0
        self.blocks_loaded = 0
        self._clock = LoopClock()
        self._replicas = np.zeros(number_of_blocks, dtype=np.int64)
        self._serving: dict[PeerId, PlacedNode] = {}
        self._present: dict[PeerId, PlacedNode] = {}
        self._announced: dict[PeerId, tuple[PlacedNode, float]] = {}
        self._changes = 0
        self._digest = hashlib.sha256()
        self._snapshot: tuple[float, Snapshot] | None = None
        self._sampled: dict[int, tuple[float, Snapshot]] = {}
        self._sampled_of = 1
        self._emergency = asyncio.Event()
        self._watched = block_vectors([], number_of_blocks)
        self._weakest_since_s = 0.0

    # --- what is true ------------------------------------------------------------------------
    @property
    def serving(self) -> Mapping[PeerId, PlacedNode]:
        return self._serving

    @property
    def present(self) -> Mapping[PeerId, PlacedNode]:
        """All computers that are on, whether they serve or load."""
        return self._present

    def arrive(self, node: PlacedNode) -> None:
        self._present[node.peer_id] = node

    def serve(self, node: PlacedNode) -> None:
        """From now on, instead of whatever it served before."""
        self._count()
        self._remove(node.peer_id)
        self._serving[node.peer_id] = node
        self._replicas[node.first_block : node.end_block] += 1

    def stop_serving(self, peer_id: PeerId) -> None:
        self._count()
        self._remove(peer_id)

    def depart(self, peer_id: PeerId) -> None:
        """The computer is off."""
        self.stop_serving(peer_id)
        del self._present[peer_id]

    def least_replicas(self) -> int:
        return int(self._replicas.min())

    def uncovered_blocks(self) -> int:
        return int((self._replicas == 0).sum())

    def unclaimed_blocks(self) -> int:
        """That no computer serves or is about to, whatever the directory says."""
        claimed = self._replicas > 0
        for peer_id, (node, _) in self._announced.items():
            if peer_id in self._present:
                claimed[slice(*node.planned)] = True
        return int((~claimed).sum())

    def _remove(self, peer_id: PeerId) -> None:
        node = self._serving.pop(peer_id, None)
        if node is not None:
            self._replicas[node.first_block : node.end_block] -= 1

    def _count(self) -> None:
        now_s = self._clock.monotonic_s()
        passed_s, self._weakest_since_s = now_s - self._weakest_since_s, now_s
        least = self.least_replicas()
        self.seconds += passed_s
        for wanted in self.seconds_with:
            if least >= wanted:
                self.seconds_with[wanted] += passed_s

    # --- what the directory says -----------------------------------------------------------------
    def announce(self, node: PlacedNode) -> None:
        """``node.uptime_s`` is its uptime now."""
        now_s = self._clock.monotonic_s()
        self._announced[node.peer_id] = node, now_s - node.uptime_s
        self._record(f"{now_s} {node}")

    def withdraw(self, peer_id: PeerId) -> None:
        if self._announced.pop(peer_id, None) is not None:
            self._record(f"{self._clock.monotonic_s()} {peer_id} gone")

    def read(self, dice: random.Random) -> Snapshot:
        """What a node that reads the directory now would see."""
        if len(self._announced) > 2 * VIEW_NODES:
            return self._sample(dice)
        return self._everything()

    def _everything(self) -> Snapshot:
        now_s = self._clock.monotonic_s()
        if (
            self._snapshot is None
            or now_s - self._snapshot[0] > VIEW_AGE_S
            or self._changes > VIEW_CHANGES * len(self._announced)
        ):
            self._snapshot = now_s, self._snapshot_of(self._announced)
            self._changes = 0
        return self._snapshot[1]

    def _sample(self, dice: random.Random) -> Snapshot:
        now_s = self._clock.monotonic_s()
        number = dice.randrange(SAMPLES)
        known = self._sampled.get(number)
        growth = len(self._announced) / self._sampled_of
        if known is None or now_s - known[0] > SAMPLE_AGE_S or growth > SAMPLE_GROWTH:
            if growth > SAMPLE_GROWTH:
                self._sampled.clear()
                self._sampled_of = len(self._announced)
            chosen = dice.sample(list(self._announced), VIEW_NODES)
            known = now_s, self._snapshot_of(chosen)
            self._sampled[number] = known
        return known[1]

    def _snapshot_of(self, peers: Iterable[PeerId]) -> Snapshot:
        now_s = self._clock.monotonic_s()
        nodes = {}
        for peer_id in peers:
            node, started_s = self._announced[peer_id]
            nodes[peer_id] = replace(node, uptime_s=now_s - started_s)
        return Snapshot(nodes, block_vectors(nodes.values(), self.number_of_blocks))

    def digest(self) -> str:
        """Of all announcements so far and their times."""
        return self._digest.hexdigest()

    def _record(self, event: str) -> None:
        self._digest.update(event.encode())
        self._changes += 1

    async def emergency(self) -> BlockVectors:
        """As ``node.rebalancing.Others``."""
        await self._emergency.wait()
        return self._watched

    async def watch(self, dice: random.Random, period_s: float = WATCH_S) -> None:
        """Look for emergencies as often as nodes read who was lost; until cancelled."""
        while True:
            self._watched = self.read(dice).vectors
            if decision_interval_s(self._watched) < DEFAULTS.interval_s:
                self._emergency.set()
            else:
                self._emergency.clear()
            await self._clock.sleep(period_s)

    # --- measuring ---------------------------------------------------------------------------
    def begin_measuring(self) -> None:
        """Forget what was counted before."""
        self._count()
        self.seconds = 0.0
        self.seconds_with = dict.fromkeys(self.seconds_with, 0.0)
        self.moves = self.joins = self.leaves = self.blocks_loaded = 0

    def measure(self) -> None:
        """Take one sample of throughput, hops, organisations and countries."""
        self._count()
        total = self.number_of_blocks
        serving, present = list(self._serving.values()), self._present.values()
        optimum = best_throughput(present, total)
        reached = best_throughput(serving, total)
        vectors = block_vectors(serving, total)
        even = vectors.throughput
        samples = self.samples
        samples.weakest_stretch.append(weakest_stretch(serving, total) * reached / optimum)
        samples.weakest_block.append(float(max(even.min(), 0.0)) / optimum)
        samples.redundancy.append(sum(n.end_block - n.first_block for n in present) / total)
        samples.fewest_hops.append(fewest_hops(serving, total))
        samples.present.append(len(present))
        samples.outlives_organisation.append(outlives_largest_organisation(vectors))
        samples.could_outlive.append(could_outlive_largest_organisation(vectors))
        samples.country_alone += countries_alone(vectors)


def outlives_largest_organisation(vectors: BlockVectors) -> bool:
    """Whether all blocks stay covered without the organisation that hosts most."""
    return bool(vectors.outside_largest_organisation().min() > 0)


def could_outlive_largest_organisation(vectors: BlockVectors) -> bool:
    """Whether some placement of the same nodes would let that organisation go.

    Spans may be laid anywhere, so that one after the other they cover as many blocks as they have.
    """
    return int(vectors.outside_largest_organisation().sum()) >= vectors.number_of_blocks


def countries_alone(vectors: BlockVectors) -> list[bool]:
    """For each country whose nodes host the model 1.5 times: whether they cover it."""
    enough = STANDS_ALONE * vectors.number_of_blocks
    return [
        not vectors.lacking_in(country).any()
        for country, hosted in sorted(vectors.hosted_in_country.items())
        if hosted >= enough
    ]
