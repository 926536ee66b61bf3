"""What one peer knows of a model's nodes: read in the background, a little at a time.

Nodes use it for placement, for the coverage that they show and to find their neighbours (what
clients know is in ``client.known_nodes``). Reading is bounded by a rate: where all shards of a
swarm are too much for it, a view holds the nodes of some of them, drawn anew with each pass.

What a view has read it keeps until the record expires or the node is lost: a peer of the directory
that answers with less than it should makes nobody disappear.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace

from swarm.membership import (
    ANNOUNCE_PERIOD_S,
    FRESH_PERIODS,
    RecordReader,
    agreed_shards,
    announce_period_s,
)
from swarm.ports import Clock, Directory
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import PeerId
from swarm.protocol.records import (
    MAX_LIFETIME_S,
    NodeRecord,
    Record,
    TombstoneRecord,
    shard_key,
    shard_of,
    tombstone_groups,
    tombstone_key,
)
from swarm.tombstones import Accusations, Tombstones

logger = logging.getLogger(__name__)

RECORD_BYTES = 500
"""About; on the way."""
LOOKUP_BYTES = 2000
"""To find who keeps a key."""
SHARD_RECORDS = 64.0
"""Expected of a shard; those that were read may have had more."""
LOOKS_AT_THE_LOST = (2, 4, 8, 16)
"""Of the looks for lost nodes, those at which a lost one's record is read again."""
RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class ViewSettings:
    """How much to read, and how often."""

    refresh_s: float = 30.0
    """For a pass over the shards, in a small swarm."""
    tombstones_s: float = 8.0
    """Between two looks for lost nodes, in a small swarm."""
    bytes_per_s: float = 3100.0
    """Larger passes take longer."""
    maximum_shards: int = 64
    """Read in one pass."""
    maximum_nodes: int = 8192
    """Kept; those read last."""


NODE_VIEW = ViewSettings()


@dataclass(frozen=True, slots=True)
class KnownNode:
    """A node's newest record and what the reader knows beside it."""

    record: NodeRecord
    read_s: float
    """When it was read, on the reader's monotonic clock."""
    first_seen_unix_s: float
    """0 when it was there before the reader."""

    def uptime_s(self, now_unix_s: float) -> float:
        """Since it started, as it says; since it was first seen, if that is later."""
        started_unix_s = self.record.started_unix_s or now_unix_s
        return max(now_unix_s - max(started_unix_s, self.first_seen_unix_s), 0.0)


class NodesView:
    """The live nodes of one model revision; the owner runs ``run`` or calls ``read``."""

    def __init__(
        self,
        directory: Directory,
        clock: Clock,
        model_revision: bytes,
        *,
        settings: ViewSettings = NODE_VIEW,
        own: PeerId | None = None,
        on_accused: Callable[[], None] | None = None,
        dice: random.Random | None = None,
    ) -> None:
        """``on_accused`` is called when somebody takes ``own`` for dead."""
        self._clock = clock
        self._reader = RecordReader(directory, clock)
        self._revision = model_revision
        self._settings = settings
        self._own = own
        self._on_accused = on_accused
        self._dice = dice or random.Random()  # noqa: S311
        self._known: dict[PeerId, KnownNode] = {}
        self._testimonies: dict[int, list[TombstoneRecord]] = {}
        self._tombstones = Tombstones()
        self._next_group = 0
        self._looks_since_lost: dict[PeerId, int] = {}
        self._last_agreed_s = clock.monotonic_s()
        self._passes = 0
        self._shard_records = SHARD_RECORDS
        self._read = asyncio.Event()
        self.shards = 1
        """Of the swarm, as most say."""
        self.shards_read = 0
        """In the last pass; ``shards_read < shards``: the view holds a sample."""

    # --- what is known ---------------------------------------------------------------------------
    def records(self) -> list[NodeRecord]:
        """Of all nodes that are alive, in every state, by peer id."""
        return [node.record for node in self.nodes()]

    def nodes(self) -> list[KnownNode]:
        """As ``records``, with what is known beside them."""
        self._forget_expired()
        lost = self._tombstones.lost
        return [self._known[peer] for peer in sorted(self._known) if peer not in lost]

    def record(self, peer: PeerId) -> NodeRecord | None:
        """The newest record of a node, dead or alive; None when it is unknown or expired."""
        known = self._known.get(peer)
        if known is None or known.record.expires_unix_s <= self._clock.unix_s():
            return None
        return known.record

    @property
    def lost(self) -> Collection[PeerId]:
        """Nodes with a record that are taken for dead."""
        return self._tombstones.lost

    @property
    def accused(self) -> Accusations:
        """Whom somebody takes for dead, whether the witnesses suffice or not."""
        return self._tombstones.accused

    async def ready(self) -> None:
        """Wait until the shards were read once; ``run`` must be running."""
        await self._read.wait()

    # --- reading ---------------------------------------------------------------------------------
    async def run(self) -> None:
        """Read until cancelled. Network errors are logged and tried again, never raised."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat(self._pass))
            group.create_task(self._repeat(self._look_for_lost))

    async def read(self) -> None:
        """Read everything once, now. Raises NetworkError."""
        await self._read_shards(spread_s=0.0)
        for _ in range(tombstone_groups(self.shards)):
            await self._read_tombstones()

    async def look_up(self, peer: PeerId) -> NodeRecord | None:
        """The newest record of one node, from the directory. Raises NetworkError."""
        key = shard_key(self._revision, shard_of(peer, self.shards))
        self._add(await self._reader.read(key))
        return self.record(peer)

    async def _repeat(self, part: Callable[[], Awaitable[float]]) -> None:
        while True:
            try:
                pause_s = await part()
            except NetworkError as error:
                logger.info("the directory does not answer: %s", error)
                pause_s = RETRY_S
            await self._clock.sleep(pause_s)

    async def _pass(self) -> float:
        """Read the shards, spread over the time of a pass; returns what is left of it."""
        started_s = self._clock.monotonic_s()
        pass_s = self.pass_s if self._passes else 0.0
        await self._read_shards(spread_s=pass_s)
        return max(self.pass_s - (self._clock.monotonic_s() - started_s), 1.0)

    @property
    def pass_s(self) -> float:
        """How long one pass takes, so that the rate is kept."""
        size_bytes = self.shards_read * self._shard_bytes + LOOKUP_BYTES
        return max(self._settings.refresh_s, size_bytes / self._settings.bytes_per_s)

    @property
    def _shard_bytes(self) -> float:
        return self._shard_records * RECORD_BYTES + LOOKUP_BYTES

    async def _read_shards(self, spread_s: float) -> None:
        self._follow(
            agreed_shards(await self._reader.index(self._revision, until_unix_s=self._until()))
        )
        chosen = self._choose_shards()
        records_read = 0
        for shard in chosen:
            found = await self._read_shard(shard)
            records_read += len(found)
            self._add(found)
            if spread_s:
                await self._clock.sleep(spread_s / len(chosen))
        self.shards_read = len(chosen)
        self._shard_records = max(records_read / len(chosen), SHARD_RECORDS)
        self._passes += 1
        self._read.set()

    async def _read_shard(self, shard: int) -> list[Record]:
        key = shard_key(self._revision, shard)
        return await self._reader.read(key, until_unix_s=self._until())

    def _until(self) -> float:
        """A peer that keeps a shard has an entry in it that lives for so long.

        Who has begun to keep it lately has not heard of everybody: the first time all are asked.
        """
        if not self._passes:
            return math.inf
        period_s = announce_period_s(ANNOUNCE_PERIOD_S, self.shards)
        return self._clock.unix_s() + FRESH_PERIODS * period_s

    def _follow(self, agreed: int) -> None:
        """A lower number counts when no record of the time before can be alive any more."""
        now_s = self._clock.monotonic_s()
        if agreed >= self.shards:
            self._last_agreed_s = now_s
        if agreed >= self.shards or now_s - self._last_agreed_s > MAX_LIFETIME_S:
            self.shards = agreed

    def _choose_shards(self) -> Sequence[int]:
        # What is read lives for two periods at least; until then it should be read again.
        longest_pass_s = FRESH_PERIODS * announce_period_s(ANNOUNCE_PERIOD_S, self.shards)
        affordable = int(longest_pass_s * self._settings.bytes_per_s / self._shard_bytes)
        count = min(self.shards, self._settings.maximum_shards, max(affordable, 1))
        everything = range(self.shards)
        return everything if count == self.shards else self._dice.sample(everything, count)

    async def _look_for_lost(self) -> float:
        await self._read.wait()
        known = self.accused
        await self._read_tombstones()
        await self._look_again_for_lost()
        pause_s = announce_period_s(self._settings.tombstones_s, self.shards)
        # One witness seldom comes alone.
        return pause_s if self.accused.keys() <= known.keys() else pause_s / 4

    async def _read_tombstones(self) -> None:
        """Of one group; the others follow in turn."""
        groups = tombstone_groups(self.shards)
        group = self._next_group % groups
        self._next_group = group + 1
        key = tombstone_key(self._revision, group)
        found = await self._reader.read(key, until_unix_s=self._clock.unix_s())
        self._testimonies = {
            number: known for number, known in self._testimonies.items() if number < groups
        }
        self._testimonies[group] = [item for item in found if isinstance(item, TombstoneRecord)]
        self._judge()

    async def _look_again_for_lost(self) -> None:
        """Who is called dead and lives has announced itself again by now: do not miss that."""
        looks = {peer: self._looks_since_lost.get(peer, 0) + 1 for peer in sorted(self.lost)}
        self._looks_since_lost = looks
        due = (peer for peer, count in looks.items() if count in LOOKS_AT_THE_LOST)
        shards = {shard_of(peer, self.shards) for peer in due}
        for shard in sorted(shards):
            self._add(await self._read_shard(shard))

    # --- bookkeeping -----------------------------------------------------------------------------
    def _add(self, records: Collection[Record]) -> None:
        now_s, now_unix_s = self._clock.monotonic_s(), self._clock.unix_s()
        changed = False
        for record in records:
            if not isinstance(record, NodeRecord) or record.model_revision != self._revision:
                continue
            known = self._known.get(record.peer_id)
            if known is None:
                first_seen_unix_s = now_unix_s if self._passes else 0.0
                self._known[record.peer_id] = KnownNode(record, now_s, first_seen_unix_s)
            elif known.record.sequence < record.sequence:
                self._known[record.peer_id] = replace(known, record=record, read_s=now_s)
            else:
                continue
            changed = True
        excess = len(self._known) - self._settings.maximum_nodes
        if excess > 0:
            for peer in sorted(self._known, key=lambda peer: self._known[peer].read_s)[:excess]:
                del self._known[peer]
        if changed and any(self._testimonies.values()):
            self._judge()

    def _forget_expired(self) -> None:
        now_unix_s = self._clock.unix_s()
        expired = [
            peer for peer, node in self._known.items() if node.record.expires_unix_s <= now_unix_s
        ]
        for peer in expired:
            del self._known[peer]

    def _judge(self) -> None:
        now_unix_s = self._clock.unix_s()
        testimonies = [
            testimony
            for known in self._testimonies.values()
            for testimony in known
            if testimony.expires_unix_s > now_unix_s
        ]
        nodes = {peer: node.record for peer, node in self._known.items()}
        now_s = self._clock.monotonic_s()
        self._tombstones.update(testimonies, nodes, now_s=now_s, now_unix_s=now_unix_s)
        if self._own in self._tombstones.accused and self._on_accused is not None:
            self._on_accused()
