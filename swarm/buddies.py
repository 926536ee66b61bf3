"""Nodes that watch each other, so that a death is known in seconds and not when a record expires.

All serving nodes stand on a ring, in an order that changes every hour. Each pings the few that
follow it, so each is watched by a few, also the only one that has a block. A node that answered
before and does not answer two pings in a row is suspected. Before a witness testifies it asks some
others at random: when most of these do not answer either, it is the witness that is cut off, and it
stays silent. Who reads the testimonies believes them by the rules of ``swarm.tombstones``.

One witness is not enough, and the other watchers may have died as well: nodes that stand a little
further back on the ring look too when they read that somebody is accused.

``choose_watched`` and ``second_opinions`` are pure; :class:`Buddies` acts.
"""

from __future__ import annotations

import hashlib
import logging
import random
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from swarm.nodes_view import NodesView
from swarm.pings import ClockObserver, Pinger
from swarm.ports import Clock, Directory, Transport
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.records import (
    MAX_LIFETIME_S,
    MAX_TOMBSTONES,
    TombstoneRecord,
    expected_key,
    shard_of,
    sign_record,
    tombstone_groups,
)

logger = logging.getLogger(__name__)

RING_CHANGE_S = 3600


@dataclass(frozen=True, slots=True)
class BuddySettings:
    """How closely nodes watch each other."""

    watched: int = 3
    period_s: float = 5.0
    answer_timeout_s: float = 3.0
    """For a ping, and again for a new stream and a ping on it."""
    asked_before_testifying: int = 8
    """More than half of these and of those that are watched must answer."""
    enough_witnesses: int = 3
    """Nobody looks further at a node that has them."""


def choose_watched(own: PeerId, nodes: Iterable[PeerId], count: int, turn: int) -> list[PeerId]:
    """The ``count`` nodes that follow ``own`` on the ring of this ``turn``."""
    return _following(own, _ring({*nodes} - {own}, turn), count, turn)


def second_opinions(
    own: PeerId,
    accused: Mapping[PeerId, Collection[PeerId]],
    nodes: Collection[PeerId],
    settings: BuddySettings,
    turn: int,
) -> list[PeerId]:
    """The accused that ``own`` should look at though it does not watch them.

    It is asked when it is among the next ones that stand before the accused on the ring, not
    counting others that are accused, and witnesses are missing.
    """
    standing = {*nodes, own} - accused.keys()
    wanted = []
    for peer, witnesses in accused.items():
        if peer == own or own in witnesses or len(witnesses) >= settings.enough_witnesses:
            continue
        # ``own`` stands among the nearest before ``peer`` if ``peer`` follows it soon.
        if peer in _following(
            own, _ring({*standing, peer} - {own}, turn), 2 * settings.watched, turn
        ):
            wanted.append(peer)
    return sorted(wanted)


def _ring(nodes: Iterable[PeerId], turn: int) -> list[tuple[bytes, PeerId]]:
    return sorted((_place(peer, turn), peer) for peer in nodes)


def _following(
    own: PeerId, ring: Sequence[tuple[bytes, PeerId]], count: int, turn: int
) -> list[PeerId]:
    start = bisect_left(ring, (_place(own, turn), own))
    return [ring[(start + step) % len(ring)][1] for step in range(min(count, len(ring)))]


def _place(peer: PeerId, turn: int) -> bytes:
    return hashlib.sha256(b"%d %s" % (turn, peer.encode())).digest()[:8]


class Buddies:
    """Watches others and testifies; the application owns the task of ``run``.

    The nodes' services answer the pings (first message of a stream, after Hello).
    """

    def __init__(
        self,
        identity: Identity,
        transport: Transport,
        directory: Directory,
        clock: Clock,
        view: NodesView,
        *,
        model_revision: bytes,
        settings: BuddySettings = BuddySettings(),
        clocks: ClockObserver | None = None,
        dice: random.Random | None = None,
    ) -> None:
        self._identity = identity
        self._directory = directory
        self._clock = clock
        self._view = view
        self._revision = model_revision
        self._settings = settings
        self._dice = dice or random.Random()  # noqa: S311
        self._pinger = Pinger(
            transport,
            clock,
            self._addresses_of,
            answer_timeout_s=settings.answer_timeout_s,
            clocks=clocks,
        )
        self._answered: set[PeerId] = set()
        self._testified: dict[PeerId, int] = {}
        self._published: dict[int, tuple[tuple[str, int], ...]] = {}
        self._last_expiry_unix_s = 0
        self._last_sequence = 0

    @property
    def testified(self) -> Mapping[PeerId, int]:
        """Nodes that we say are dead, with the sequence of the record that died."""
        return self._testified

    async def run(self) -> None:
        """Watch until cancelled. Errors of the network are what this is about: none is raised."""
        try:
            await self._view.ready()
            while True:
                started_s = self._clock.monotonic_s()
                await self._round()
                spent_s = self._clock.monotonic_s() - started_s
                await self._clock.sleep(max(self._settings.period_s - spent_s, 0.1))
        finally:
            await self._pinger.close_all_but(())

    # --- one round -------------------------------------------------------------------------------
    async def _round(self) -> None:
        turn = int(self._clock.unix_s()) // RING_CHANGE_S
        own = self._identity.peer_id
        serving = [record.peer_id for record in self._view.records() if record.takes_sessions]
        watched = choose_watched(own, serving, self._settings.watched, turn)
        accused = self._view.accused
        others = second_opinions(own, accused, serving, self._settings, turn)
        self._answered &= {*serving, *accused}
        # Who has answered us before, or was lost by somebody who had been answered, may be dead.
        targets = [*watched, *(peer for peer in others if peer not in watched)]
        silent = await self._pinger.silent_among(targets)
        self._answered.update(peer for peer in targets if peer not in silent)
        suspects = [peer for peer in silent if peer in self._answered or peer in others]
        new = [peer for peer in suspects if peer not in self._testified]
        heard = sum(peer not in silent for peer in watched)
        if new and not await self._well_connected(len(watched), heard, {*targets, *accused}):
            logger.info("%d buddies and most others do not answer: we are cut off", len(silent))
            new = []
        await self._pinger.close_all_but(watched)
        await self._testify(new, answering=set(targets) - set(silent))

    async def _well_connected(self, watched: int, heard: int, exclude: Collection[PeerId]) -> bool:
        """Whether most answer of those watched and of some others; we count for one as well."""
        others = [
            record.peer_id
            for record in self._view.records()
            if record.takes_sessions
            and record.peer_id not in exclude
            and record.peer_id != self._identity.peer_id
        ]
        count = min(self._settings.asked_before_testifying, len(others))
        asked = self._dice.sample(others, count)
        silent = await self._pinger.silent_among(asked, pings=1)
        self._answered.update(peer for peer in asked if peer not in silent)
        return 2 * (heard + count - len(silent) + 1) > watched + count + 1

    async def _testify(self, lost: Sequence[PeerId], answering: Collection[PeerId]) -> None:
        """Add the lost, take back those that answer or are gone from the directory, and publish."""
        testified = {
            peer: sequence
            for peer, sequence in self._testified.items()
            if peer not in answering
            and (record := self._view.record(peer)) is not None
            and record.sequence <= sequence
        }
        try:
            for peer in lost:
                record = await self._view.look_up(peer)
                if record is not None and record.takes_sessions:
                    testified[peer] = record.sequence
                    logger.info("%s does not answer any more", peer)
            self._testified = testified
            await self._publish()
        except NetworkError as error:
            logger.info("could not testify: %s", error)

    def _addresses_of(self, peer: PeerId) -> Sequence[str]:
        record = self._view.record(peer)
        return record.addresses if record is not None else ()

    # --- testimony -------------------------------------------------------------------------------
    async def _publish(self) -> None:
        """Store what changed, by group."""
        groups = tombstone_groups(self._view.shards)
        wanted: dict[int, list[tuple[str, int]]] = {group: [] for group in self._published}
        for peer, sequence in sorted(self._testified.items()):
            wanted.setdefault(shard_of(peer, groups), []).append((peer, sequence))
        for group, lost in wanted.items():
            named = tuple(lost[:MAX_TOMBSTONES])
            # A testimony that is taken back altogether cannot be stored: it simply expires, and
            # the newer record of the node that lives outdates it.
            if named and self._published.get(group) != named:
                await self._store(groups, group, named)
            self._published[group] = named
        self._published = {group: named for group, named in self._published.items() if named}

    async def _store(self, groups: int, group: int, named: Sequence[tuple[str, int]]) -> None:
        now_unix_s = self._clock.unix_s()
        records = [self._view.record(PeerId(peer)) for peer, _ in named]
        needed_unix_s = max((record.expires_unix_s for record in records if record), default=0)
        # Of two entries the directory keeps the one that expires later.
        self._last_expiry_unix_s = min(
            max(needed_unix_s, self._last_expiry_unix_s + 1), int(now_unix_s) + MAX_LIFETIME_S - 5
        )
        self._last_sequence = max(self._last_sequence + 1, int(now_unix_s * 1000))
        record = TombstoneRecord(
            peer_id=self._identity.peer_id,
            model_revision=self._revision,
            groups=groups,
            group=group,
            lost_peers=tuple(peer for peer, _ in named),
            lost_sequences=tuple(sequence for _, sequence in named),
            sequence=self._last_sequence,
            expires_unix_s=self._last_expiry_unix_s,
        )
        value = sign_record(self._identity, record)
        await self._directory.store(expected_key(record), value, record.expires_unix_s)
