"""Who is in the swarm: announcing ourselves, and reading what others announce.

Every node keeps one record per model revision alive, in one of the model's shards, and sees to it
that the list of models names its model. The number of shards is a power of two. It follows from
what the nodes see: those that list the model propose to double or halve it, and everybody uses the
number that most of them name. Reading the first ``n`` shards finds all records that were stored for
``n`` shards or fewer, so a change of the number loses nobody.

The larger the swarm, the rarer everybody announces: every 30 s with one shard, every 120 s from 64
shards on. Between nodes deaths are noticed much earlier (``swarm.buddies``), and how busy a node is
tells the node itself when it is asked; announcements are for what changes slowly.

A node that leaves overwrites its record with one in state DRAINING that expires right after the one
before. (It cannot expire earlier: of two entries the directory keeps the one that expires later.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from swarm.ports import Clock, Directory
from swarm.protocol.errors import NetworkError, RecordError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.records import (
    MAX_LIFETIME_S,
    MAX_SHARDS,
    ModelIndexRecord,
    NodeRecord,
    NodeState,
    Record,
    TombstoneRecord,
    expected_key,
    model_index_key,
    shard_key,
    shard_of,
    sign_record,
    tombstone_groups,
    tombstone_key,
)
from swarm.record_validation import check_entry
from swarm.tombstones import accusations, lost_nodes

logger = logging.getLogger(__name__)

T = TypeVar("T", int, tuple[str, int, int])

INDEX_PUBLISHERS = 16
"""So many nodes list a model; further ones only read."""
CROWDED_SHARD = 128
"""More records than this in a shard: propose twice the shards. 64 are aimed at."""
EMPTY_SHARD = 24
"""Fewer: propose half. Far below half of ``CROWDED_SHARD``, so that it does not swing."""
SHARDS_PER_READ = 4
ANNOUNCE_PERIOD_S = 30.0
"""In a swarm of one shard, unless the owner says otherwise."""
EXPIRY_PERIODS = 3
FRESH_PERIODS = 2
"""Of those that keep a key, each has an entry that lives longer than this, if it is up to date."""
LONGEST_PERIOD_FACTOR = 4
"""How much rarer the nodes of the largest swarms announce than those of a swarm of one shard."""
LEAVE_TIMEOUT_S = 3.0
SHORTEST_PAUSE_S = 0.25
"""Between two announcements, however often the state changes."""
RETRY_S = 2.0
"""After an announcement that nobody took."""


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A model that somebody serves, as most of those who list it describe it."""

    model_name: str
    model_revision: bytes
    number_of_blocks: int
    hidden_size: int
    shards: int


class Announcer:
    """Keeps our record of one model revision alive; the application owns the task of ``run``."""

    def __init__(
        self,
        identity: Identity,
        directory: Directory,
        clock: Clock,
        record: NodeRecord,
        *,
        hidden_size: int,
        announce_period_s: float = ANNOUNCE_PERIOD_S,
    ) -> None:
        """``record`` needs no valid shards, sequence and expiry: they are filled in here.

        ``announce_period_s`` is that of a swarm with one shard.
        """
        if not record.started_unix_s:
            record = replace(record, started_unix_s=int(clock.unix_s()))
        self._identity = identity
        self._directory = directory
        self._clock = clock
        self._reader = RecordReader(directory, clock)
        self._record = record
        self._hidden_size = hidden_size
        self._shortest_period_s = announce_period_s
        self._shards = 1
        self._index: list[ModelIndexRecord] = []
        self._index_read_s = -math.inf
        self._last_sequence = 0
        self._last_expiry_unix_s = 0
        self._changed = asyncio.Event()
        self._up_to_date = asyncio.Event()

    @property
    def record(self) -> NodeRecord:
        """What is announced; shards, sequence and expiry aside."""
        return self._record

    def update(self, record: NodeRecord) -> None:
        """Announce this from now on: at once if state or span changed, otherwise with the next."""
        before, self._record = self._record, record
        if _urgent(before) != _urgent(record):
            self.announce_now()

    def announce_now(self) -> None:
        """Do not wait for the end of the period."""
        self._changed.set()
        self._up_to_date.clear()

    @property
    def period_s(self) -> float:
        """Between two announcements, as the swarm is now."""
        return announce_period_s(self._shortest_period_s, self._shards)

    async def announced(self) -> None:
        """Wait until the directory has taken the latest state and span; ``run`` must be running."""
        await self._up_to_date.wait()

    async def run(self) -> None:
        """Announce until cancelled. Network errors are logged and tried again, never raised."""
        while True:
            self._changed.clear()
            try:
                taken = await self._announce()
            except NetworkError as error:
                logger.warning("could not announce: %s", error)
                taken = False
            if taken and not self._changed.is_set():
                self._up_to_date.set()
            pause_s = self.period_s if taken else min(self.period_s, RETRY_S)
            await self._clock.sleep(min(SHORTEST_PAUSE_S, pause_s))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s - SHORTEST_PAUSE_S):
                    await self._changed.wait()

    async def leave(self) -> None:
        """Overwrite our record, so that nobody routes through us. For when ``run`` has ended."""
        self._record = replace(self._record, state=NodeState.DRAINING, cache_tokens_free=0)
        with contextlib.suppress(TimeoutError, NetworkError):
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                await self._store_node(self._last_expiry_unix_s + 1)

    async def _announce(self) -> bool:
        now_s = self._clock.monotonic_s()
        if self._shards == 1 or now_s - self._index_read_s >= EXPIRY_PERIODS * self.period_s:
            revision = self._record.model_revision
            self._index = await self._reader.index(revision, until_unix_s=self._until())
            self._index_read_s = now_s
            if self._index:
                self._shards = agreed_shards(self._index)
        index = self._index
        expires_unix_s = int(self._clock.unix_s() + EXPIRY_PERIODS * self.period_s)
        taken = await self._store_node(expires_unix_s)
        # The order decides who goes on when too many began at the same time.
        before_us = sum(1 for record in index if record.peer_id < self._identity.peer_id)
        if before_us < INDEX_PUBLISHERS:
            await self._store_index(expires_unix_s)
        return taken

    async def _store_node(self, expires_unix_s: int) -> bool:
        now_unix_s = self._clock.unix_s()
        # Of two entries the directory keeps the one that expires later.
        self._last_expiry_unix_s = min(
            max(expires_unix_s, self._last_expiry_unix_s + 1), int(now_unix_s) + MAX_LIFETIME_S - 5
        )
        record = replace(
            self._record,
            peer_id=self._identity.peer_id,
            shards=self._shards,
            sequence=self._next_sequence(),
            expires_unix_s=self._last_expiry_unix_s,
        )
        return await self._directory.store(
            expected_key(record), sign_record(self._identity, record), record.expires_unix_s
        )

    async def _store_index(self, expires_unix_s: int) -> None:
        own_shard = shard_of(self._identity.peer_id, self._shards)
        key = shard_key(self._record.model_revision, own_shard)
        # Right after a change of the number, records of other shards still lie in the lower ones.
        neighbours = sum(
            shard_of(record.peer_id, self._shards) == own_shard
            for record in await self._reader.read(key, until_unix_s=self._until())
        )
        record = ModelIndexRecord(
            peer_id=self._identity.peer_id,
            model_name=self._record.model_name,
            model_revision=self._record.model_revision,
            number_of_blocks=self._record.number_of_blocks,
            shards=proposed_shards(self._shards, neighbours),
            hidden_size=self._hidden_size,
            sequence=self._next_sequence(),
            expires_unix_s=expires_unix_s,
        )
        value = sign_record(self._identity, record)
        await self._directory.store(model_index_key(), value, record.expires_unix_s)

    def _until(self) -> float:
        """A peer that keeps a key has an entry in it that lives for so long."""
        return self._clock.unix_s() + FRESH_PERIODS * self.period_s

    def _next_sequence(self) -> int:
        """Milliseconds: so it grows across restarts too, and none is of the future."""
        self._last_sequence = max(self._last_sequence + 1, int(self._clock.unix_s() * 1000))
        return self._last_sequence


# --- reading -------------------------------------------------------------------------------------
class RecordReader:
    """Opens what a directory returns; a record that was seen before costs no signature."""

    def __init__(self, directory: Directory, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock

    async def read(self, key: str, *, until_unix_s: float = math.inf) -> list[Record]:
        """All valid records under ``key``; ``until_unix_s`` as in ``ports.Directory``."""
        records = []
        entries = await self._directory.get(key, until_unix_s=until_unix_s)
        now_unix_s = self._clock.unix_s()
        for peer_id, entry in entries.items():
            try:
                _, record = check_entry(
                    lambda expected: expected == key,
                    peer_id,
                    entry.value,
                    entry.expires_unix_s,
                    now_unix_s=now_unix_s,
                )
            except RecordError as error:  # it has expired since the directory looked at it
                logger.debug("dropped a record of %s: %s", peer_id, error.detail)
            else:
                records.append(record)
        return records

    async def index(
        self, model_revision: bytes | None = None, *, until_unix_s: float = math.inf
    ) -> list[ModelIndexRecord]:
        """The list of models, or those of its records that list one model."""
        return [
            record
            for record in await self.read(model_index_key(), until_unix_s=until_unix_s)
            if isinstance(record, ModelIndexRecord)
            and model_revision in (None, record.model_revision)
        ]


async def list_models(directory: Directory, clock: Clock) -> list[ModelSummary]:
    """All models that are served, ordered by name."""
    of_revision: dict[bytes, list[ModelIndexRecord]] = {}
    for record in await RecordReader(directory, clock).index():
        of_revision.setdefault(record.model_revision, []).append(record)
    summaries = []
    for revision, records in of_revision.items():
        name, number_of_blocks, hidden_size = _most_common(
            (record.model_name, record.number_of_blocks, record.hidden_size) for record in records
        )
        shards = agreed_shards(records)
        summaries.append(ModelSummary(name, revision, number_of_blocks, hidden_size, shards))
    return sorted(summaries, key=lambda model: (model.model_name, model.model_revision))


async def read_nodes(
    directory: Directory,
    model_revision: bytes,
    clock: Clock,
    *,
    dice: random.Random | None = None,
    maximum_shards: int = SHARDS_PER_READ,
) -> list[NodeRecord]:
    """The nodes of a model: all of them in a small swarm, those of random shards in a large one.

    In every state: who routes keeps those that take sessions. Without those that others have lost.
    Ordered by peer id.
    """
    reader = RecordReader(directory, clock)
    number_of_shards = agreed_shards(await reader.index(model_revision))
    shards: Sequence[int] = range(number_of_shards)
    if len(shards) > maximum_shards:
        shards = (dice or random.Random()).sample(shards, maximum_shards)  # noqa: S311
    groups = tombstone_groups(number_of_shards)
    keys = [shard_key(model_revision, shard) for shard in shards]
    keys += [tombstone_key(model_revision, group) for group in {shard % groups for shard in shards}]
    reads = await asyncio.gather(*(reader.read(key) for key in keys))
    newest: dict[PeerId, NodeRecord] = {}
    testimonies = []
    for record in (record for read in reads for record in read):
        if isinstance(record, NodeRecord):
            known = newest.get(record.peer_id)
            if known is None or known.sequence < record.sequence:
                newest[record.peer_id] = record
        elif isinstance(record, TombstoneRecord):
            testimonies.append(record)
    lost = lost_nodes(accusations(testimonies, newest, clock.unix_s()), newest)
    return [newest[peer_id] for peer_id in sorted(newest) if peer_id not in lost]


# --- pure choices --------------------------------------------------------------------------------
def announce_period_s(shortest_s: float, shards: int) -> float:
    """``shortest_s`` with one shard, half of it more with each doubling, at most four times it."""
    return shortest_s * min(1 + math.log2(max(shards, 1)) / 2, LONGEST_PERIOD_FACTOR)


def agreed_shards(index: Collection[ModelIndexRecord]) -> int:
    """The number of shards that most records of one model name; 1 without any."""
    powers_of_two = [record.shards for record in index if record.shards.bit_count() == 1]
    return _most_common(powers_of_two) if powers_of_two else 1


def proposed_shards(shards: int, records_in_own_shard: int) -> int:
    """The number of shards that would bring about 64 records into each."""
    if records_in_own_shard > CROWDED_SHARD:
        return min(2 * shards, MAX_SHARDS)
    if records_in_own_shard < EMPTY_SHARD:
        return max(shards // 2, 1)
    return shards


def coverage(
    records: Iterable[NodeRecord],
    number_of_blocks: int,
    states: Collection[NodeState] = (NodeState.ONLINE, NodeState.MOVING),
) -> list[int]:
    """How many nodes in one of ``states`` host each block ``[number_of_blocks]``."""
    replicas = [0] * number_of_blocks
    for record in records:
        if record.state in states and record.number_of_blocks == number_of_blocks:
            for block in range(record.first_block, record.end_block):
                replicas[block] += 1
    return replicas


def _urgent(record: NodeRecord) -> tuple[object, ...]:
    """What others must learn at once."""
    span = (record.first_block, record.end_block)
    return record.state, span, record.placed_span, record.addresses


def _most_common(values: Iterable[T]) -> T:
    """Of several equally common ones the largest, so that everybody picks the same."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))
