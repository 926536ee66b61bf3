"""The page's own eyes: it pings nodes itself and sees within a period that one has died.

Witnesses (``swarm.buddies``, ``swarm.tombstones``) need ten seconds to agree, and where three nodes
serve, two of which are left, both must. The page needs nobody's word for what it sees. The rules:

- Only who has answered this page before can be gone in its eyes: whom it cannot reach, others may.
- Gone is who answers no ping on the open stream and none on a new one, while most of the others
  that answered before still do when they are asked again. Otherwise it is the page that is cut off.
- Any answer ends it, and so does a record that was signed after the death. Then the node is alive,
  for others at least, and has to answer the page again before the page may miss it again.
- What others say of a node plays no part here, so nobody can make the page lose a node by lying.

In a large swarm the page looks at some nodes, others each hour; the rest is the witnesses' matter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from swarm.buddies import RING_CHANGE_S, choose_watched
from swarm.pings import Pinger
from swarm.ports import Clock, Transport
from swarm.protocol.identity import PeerId
from swarm.protocol.records import NodeRecord
from swarm.tombstones import CLOCK_TOLERANCE_S

log = logging.getLogger(__name__)

WATCHED = 64
LOOKS_PER_PERIOD = 5
LONGEST_ANSWER_S = 3.0
ANSWERS_PER_PERIOD = 4
"""A silent node costs a pause and the wait for two answers: together less than a period."""


@dataclass(frozen=True, slots=True)
class Death:
    """A record that was the node's last word, and when its owner no longer answered."""

    sequence: int
    at_unix_s: float

    def is_of(self, record: NodeRecord) -> bool:
        """Whether the record dates from before; what was signed about then may be read later."""
        signed_after_s = record.sequence / 1000 - self.at_unix_s
        return record.sequence <= self.sequence or signed_after_s <= CLOCK_TOLERANCE_S


class Lookout:
    """Watches the nodes that ``records`` names; the owner runs :meth:`run`."""

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        records: Callable[[], Iterable[NodeRecord]],
        *,
        period_s: float,
    ) -> None:
        """``records``: of all nodes that the directory takes for alive. ``period_s``: of looks."""
        self._own = transport.peer_id
        self._clock = clock
        self._records = records
        self._pause_s = period_s / LOOKS_PER_PERIOD
        self._known: Mapping[PeerId, NodeRecord] = {}
        self._pinger = Pinger(
            transport,
            clock,
            self._addresses_of,
            answer_timeout_s=min(LONGEST_ANSWER_S, period_s / ANSWERS_PER_PERIOD),
        )
        self._answered: set[PeerId] = set()
        self._deaths: dict[PeerId, Death] = {}

    @property
    def lost(self) -> Collection[PeerId]:
        """Nodes that are gone in the page's eyes."""
        return self._deaths.keys()

    def misses(self, record: NodeRecord) -> bool:
        """Whether the record is one of a node that died since."""
        death = self._deaths.get(record.peer_id)
        return death is not None and death.is_of(record)

    async def run(self) -> None:
        """Watch until cancelled. Errors of the network are what this is about: none is raised."""
        try:
            while True:
                started_s = self._clock.monotonic_s()
                await self._look()
                spent_s = self._clock.monotonic_s() - started_s
                await self._clock.sleep(max(self._pause_s - spent_s, 0.1))
        finally:
            await self._pinger.close_all_but(())

    async def _look(self) -> None:
        self._known = _newest_of(self._records())
        self._deaths = {
            peer: death
            for peer, death in self._deaths.items()
            if peer in self._known and death.is_of(self._known[peer])
        }
        serving = [peer for peer, record in self._known.items() if record.takes_sessions]
        turn = int(self._clock.unix_s()) // RING_CHANGE_S
        watched = choose_watched(self._own, serving, WATCHED, turn)
        asked_unix_s = self._clock.unix_s()
        silent = await self._pinger.silent_among(watched)
        heard = [peer for peer in watched if peer not in silent]
        for peer in heard:
            self._deaths.pop(peer, None)
        missed = [peer for peer in silent if peer in self._answered]
        if missed and await self._is_connected(missed, heard):
            for peer in missed:
                log.info("%s does not answer any more", peer)
                self._deaths[peer] = Death(self._known[peer].sequence, asked_unix_s)
            self._answered.difference_update(missed)
        self._answered.update(heard)
        self._answered.intersection_update(serving)
        await self._pinger.close_all_but(watched)

    async def _is_connected(self, missed: Collection[PeerId], heard: list[PeerId]) -> bool:
        """Whether most answer now, after the silence of the missed; the page counts for one."""
        silent = await self._pinger.silent_among(heard, pings=1)
        answering = len(heard) - len(silent)
        if 2 * (answering + 1) > len(missed) + len(heard) + 1:
            return True
        log.warning("%d of %d nodes do not answer: we are cut off", len(missed), len(heard))
        return False

    def _addresses_of(self, peer: PeerId) -> tuple[str, ...]:
        record = self._known.get(peer)
        return record.addresses if record is not None else ()


def _newest_of(records: Iterable[NodeRecord]) -> dict[PeerId, NodeRecord]:
    newest: dict[PeerId, NodeRecord] = {}
    for record in records:
        known = newest.get(record.peer_id)
        if known is None or known.sequence < record.sequence:
            newest[record.peer_id] = record
    return newest
