"""What a client knows of the nodes of one model revision; all its sessions share and add to it.

Records come from the directory: hints, read from a few random shards where the swarm is large, so
that a client costs the same in every swarm. What the client measured itself (round trips, time per
step, failures) counts more. Choosing among the nodes is done in ``client.router``.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Collection
from dataclasses import dataclass

from swarm.chain_choice import announced_block_s
from swarm.client.bans import Bans, FailureKind
from swarm.client.quarrels import Quarrels
from swarm.membership import read_nodes
from swarm.ports import Clock, Directory
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import PeerId
from swarm.protocol.records import NodeRecord
from swarm.routing import UNKNOWN_ROUND_TRIP_S

log = logging.getLogger(__name__)

REFRESH_S = 60.0
"""Between two reads of the directory while the client uses the model."""
INTEREST_S = 600.0
"""So long after the last session was planned, the client has lost interest."""
MOST_RECORDS = 512
"""Of more, some are dropped by lot. Enough for several samples of candidates."""
MEASUREMENT_AGE_S = 600.0
"""Older measurements of speed are forgotten: the node may have become another one."""
OPENING_S = 1.0
"""So long after a plan the new session may be missing in what its nodes report."""
SMOOTHING_S = 60.0
"""Measurements of speed are averaged over about this long, some sessions: loads come and go."""
LONGER_TRIP_WEIGHT = 0.1
"""A longer round trip than usual mostly was one that had to wait somewhere."""


@dataclass(slots=True)
class _Measured:
    """What the client measured at one node."""

    round_trip_s: float | None = None
    others: float = 0.0
    """Steps in the same batch by the node's latest report."""
    block_s: float | None = None
    block_others: float = 0.0
    """``others`` while ``block_s`` was measured."""
    block_measured_s: float = 0.0
    measurements: int = 0
    """Of ``block_s``."""


class KnownNodes:
    """Records, measurements, bans, quarrels, and sessions that are being opened."""

    def __init__(
        self,
        directory: Directory,
        model_revision: bytes,
        *,
        clock: Clock,
        dice: random.Random,
    ) -> None:
        self._bans = Bans()
        self.quarrels = Quarrels()
        self._directory = directory
        self.model_revision = model_revision
        self._clock = clock
        self._dice = dice
        self._records: dict[PeerId, NodeRecord] = {}
        self._measured: dict[PeerId, _Measured] = {}
        self._opening: list[tuple[float, PeerId]] = []
        self._reading = asyncio.Lock()
        self._read_s: float | None = None
        self._used_s = clock.monotonic_s()

    # --- the directory
    @property
    def records(self) -> list[NodeRecord]:
        """Ordered by peer id, so that equal seeds make equal choices."""
        return [self._records[peer] for peer in sorted(self._records)]

    def record(self, peer: PeerId) -> NodeRecord | None:
        return self._records.get(peer)

    async def refresh(self, *, older_than_s: float) -> bool:
        """See to it that the last read of the directory is not older; whether that took a read.

        Raises NetworkError when the directory cannot be reached.
        """
        asked_s = self._clock.monotonic_s()
        if self._has_read_since(asked_s - older_than_s):
            return False
        async with self._reading:
            if self._has_read_since(asked_s):
                return True
            records = await read_nodes(
                self._directory, self.model_revision, self._clock, dice=self._dice
            )
            self._read_s = self._clock.monotonic_s()
            self._merge(records)
        return True

    async def run(self) -> None:
        """Keep the records young until the client has lost interest; the application owns this."""
        while self._clock.monotonic_s() < self._used_s + INTEREST_S:
            await self._clock.sleep(REFRESH_S)
            try:
                await self.refresh(older_than_s=REFRESH_S / 2)
            except NetworkError as error:
                log.info("could not read the directory: %s", error)

    def _has_read_since(self, earliest_s: float) -> bool:
        return self._read_s is not None and self._read_s > earliest_s

    def _merge(self, records: list[NodeRecord]) -> None:
        """Keep what is known of other shards, and of nodes that one read has missed."""
        now_unix_s = self._clock.unix_s()
        merged = {
            peer: record
            for peer, record in self._records.items()
            if record.expires_unix_s > now_unix_s
        }
        for record in records:
            known = merged.get(record.peer_id)
            if known is None or known.sequence <= record.sequence:
                merged[record.peer_id] = record
        fresh = {record.peer_id for record in records}
        droppable = sorted(merged.keys() - fresh)
        surplus = min(len(merged) - MOST_RECORDS, len(droppable))
        for peer in self._dice.sample(droppable, max(0, surplus)):
            del merged[peer]
        self._records = merged
        for peer in self._measured.keys() - merged.keys():
            del self._measured[peer]

    # --- what was measured
    @property
    def round_trips_s(self) -> dict[PeerId, float]:
        """Of all peers that were measured."""
        return {
            peer: measured.round_trip_s
            for peer, measured in self._measured.items()
            if measured.round_trip_s is not None
        }

    def round_trip_s(self, peer: PeerId) -> float:
        measured = self._measured.get(peer)
        if measured is None or measured.round_trip_s is None:
            return UNKNOWN_ROUND_TRIP_S
        return measured.round_trip_s

    def measured_round_trip(self, peer: PeerId, round_trip_s: float) -> None:
        """A shorter one counts at once, longer ones slowly: they include waiting at both ends."""
        measured = self._of(peer)
        known_s = measured.round_trip_s
        if known_s is None or round_trip_s < known_s:
            measured.round_trip_s = round_trip_s
        else:
            measured.round_trip_s = known_s + LONGER_TRIP_WEIGHT * (round_trip_s - known_s)

    def reported(self, peer: PeerId, others: float) -> None:
        """It answered in time: by its own word, steps of a session meet ``others`` there."""
        self._bans.answered(peer)
        self._of(peer).others = others

    def served(self, peer: PeerId, *, blocks: int, step_s: float) -> None:
        """One token went through so many blocks of the peer in ``step_s``."""
        self._bans.succeeded(peer)
        measured = self._of(peer)
        now_s = self._used_s = self._clock.monotonic_s()
        block_s = step_s / blocks
        since_s = now_s - measured.block_measured_s
        if measured.block_s is None or since_s > MEASUREMENT_AGE_S:
            measured.block_s, measured.block_others = block_s, measured.others
            measured.measurements = 1
        else:
            # The plain mean of the first ones, later that of the last minute.
            measured.measurements += 1
            weight = max(1 / measured.measurements, min(1.0, since_s / SMOOTHING_S))
            measured.block_s += weight * (block_s - measured.block_s)
            measured.block_others += weight * (measured.others - measured.block_others)
        measured.block_measured_s = now_s

    def failed(self, peer: PeerId, kind: FailureKind) -> None:
        """Ban the peer for a while, longer each time."""
        self._bans.failed(peer, kind, self._clock.monotonic_s())

    def is_banned(self, peer: PeerId) -> bool:
        """Whether to look elsewhere first."""
        now_s = self._clock.monotonic_s()
        return self._bans.reason(peer, now_s) is not None or self.quarrels.is_avoided(peer, now_s)

    def quarrelled(self, peers: Collection[PeerId]) -> None:
        """One of these peers did wrong, and it cannot be told which."""
        self.quarrels.add(peers, self._clock.monotonic_s())

    @property
    def apart(self) -> set[frozenset[PeerId]]:
        """Pairs that had better not be neighbours in a chain."""
        return self.quarrels.apart(self._clock.monotonic_s())

    def slowness(self, record: NodeRecord) -> float:
        """How much longer a block takes than the node announces; 1 where nothing was measured."""
        measured = self._measured.get(record.peer_id)
        if (
            measured is None
            or measured.block_s is None
            or self._clock.monotonic_s() > measured.block_measured_s + MEASUREMENT_AGE_S
        ):
            return 1.0
        return measured.block_s / announced_block_s(record, measured.block_others)

    def _of(self, peer: PeerId) -> _Measured:
        return self._measured.setdefault(peer, _Measured())

    # --- our own sessions
    def opening(self, peer: PeerId) -> None:
        """A session of ours will be opened on this peer in a moment."""
        self._used_s = self._clock.monotonic_s()
        self._opening.append((self._used_s + OPENING_S, peer))

    def openings(self, peer: PeerId) -> int:
        """Sessions of ours that the peer may not have counted yet."""
        now_s = self._clock.monotonic_s()
        self._opening = [(until_s, other) for until_s, other in self._opening if until_s > now_s]
        return sum(other == peer for _, other in self._opening)
