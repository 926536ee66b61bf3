"""Remembers the swarm from look to look, and makes the snapshot that the page shows.

Memory holds what the next look needs, the database everything. Synchronous and not thread-safe:
the owner runs it in one thread, beside the event loop that answers readers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from swarm.membership import ModelSummary, coverage
from swarm.protocol.records import NodeRecord
from swarm.status import incidents
from swarm.status.assembly import declared, model_status, node_status, totals_of
from swarm.status.block_map import PEERS_VARIABLE
from swarm.status.carbon import GridFactors
from swarm.status.database import KEPT_PRESENCE_S, Database
from swarm.status.incidents import Finding
from swarm.status.presence import extended, since
from swarm.status.rows import DAY_S, Look, NodeRow
from swarm.status.rows import SampleRow as Sample
from swarm.status.snapshot import (
    Crawl,
    ModelStatus,
    NodeStatus,
    Probe,
    Snapshot,
    Standing,
    Work,
)
from swarm.status.work import Counters, work_between

SHOWN_LOST_S = DAY_S
CONTINUOUS_PERIODS = 3
"""Looks further apart leave a gap in what was watched."""
FORGET_EACH_S = 3600.0

Key = tuple[str, str]
"""Peer and revision."""


class Observatory:
    """One swarm's history and present."""

    def __init__(
        self,
        database: Database,
        factors: GridFactors,
        *,
        period_s: float,
        peers: str = PEERS_VARIABLE,
    ) -> None:
        """``peers`` stands in the join lines."""
        self._database = database
        self._factors = factors
        self._period_s = period_s
        self._peers = peers
        self._known: dict[Key, NodeRow] = {
            (row.peer_id, row.revision): row for row in database.nodes()
        }
        self._revisions_of: dict[str, set[str]] = {}
        self._remember(self._known)
        self._presence = database.presence()
        self._watched = database.watched()
        self._days = database.work_by_day()
        self._probes = database.latest_probes()
        self._here: frozenset[Key] = frozenset(self._known_at(self._last_look))
        self._forgot_unix_s = -math.inf
        self._version = 0
        self.snapshot = Snapshot(0, 0.0, self._last_look or 0.0, period_s, math.inf)

    @property
    def _last_look(self) -> float | None:
        return self._watched[-1][1] if self._watched else None

    def _known_at(self, unix_s: float | None) -> Iterable[Key]:
        return (key for key, row in self._known.items() if row.seen_unix_s == unix_s)

    # --- one look --------------------------------------------------------------------------------
    def observe(self, crawl: Crawl) -> Snapshot:
        """Take a look into account, write it down, and make the snapshot of it."""
        if self._is_blind(crawl):
            return self._stay_blind(crawl)
        now = crawl.at_unix_s
        previous = self._last_look
        if previous is not None and not 0 < now - previous <= CONTINUOUS_PERIODS * self._period_s:
            previous = None
        rows: dict[Key, NodeRow] = {}
        added: list[tuple[str, str, Work]] = []
        samples: list[Sample] = []
        for summary, records in crawl.models:
            work = Work()
            for record in records:
                row, more = self._seen(record, now, previous)
                rows[row.peer_id, row.revision] = row
                if more != Work():
                    added.append((row.peer_id, row.revision, more))
                    work += more
            samples.append(self._sample(summary, records, work))
        gone = self._here - rows.keys() if previous is not None else frozenset()
        vanished = self._vanished(gone)
        changed = [
            row for key, row in rows.items() if previous is None or not self._is_unchanged(key, row)
        ]
        peers = {peer for peer, _ in rows}
        self._here = frozenset(rows)
        self._remember(rows)
        self._watch(peers, previous, now)
        self._count_days(added, now)
        models = [self._model(summary, records, now) for summary, records in crawl.models]
        at_once = []
        if incidents.is_mass_loss(vanished, len(rows) + vanished):
            at_once.append(Finding("nodes_lost", detail=str(vanished)))
        began = ((peer, self._presence[peer][-1]) for peer in peers)
        look = Look(
            at_unix_s=now,
            previous_unix_s=previous,
            watched=self._watched[-1],
            nodes=tuple(changed),
            gone=tuple(gone),
            presence=tuple((peer, interval) for peer, interval in began if interval[0] == now),
            gone_peers=tuple({peer for peer, _ in gone} - peers),
            work=tuple(added),
            samples=tuple(samples),
            closed_at_once=tuple(at_once),
        )
        self._write(look, incidents.findings(models))
        self._forget(now)
        return self._publish(crawl, models)

    def _is_blind(self, crawl: Crawl) -> bool:
        """Whether the page hears nothing: it then knows nothing, and nobody is gone by its word."""
        nobody = not any(records for _, records in crawl.models)
        return crawl.at_unix_s - crawl.heard_unix_s > crawl.stale_after_s or (
            nobody and bool(self._here)
        )

    def _stay_blind(self, crawl: Crawl) -> Snapshot:
        """What was known stays as it was, with its age."""
        found = [Finding("page_blind")] if self._here else []
        self._write(Look(crawl.at_unix_s), found)
        self._version += 1
        self.snapshot = replace(
            self.snapshot,
            version=self._version,
            taken_unix_s=crawl.at_unix_s,
            heard_unix_s=max(crawl.heard_unix_s, self.snapshot.heard_unix_s),
            stale_after_s=crawl.stale_after_s,
            incidents=self._database.incidents(),
        )
        return self.snapshot

    def _write(self, look: Look, found: Sequence[Finding]) -> None:
        known = self._database.incidents()
        opened, changed, closed = incidents.changes(
            [incident for incident in known if incident.closed_unix_s is None], found
        )
        self._database.write(
            replace(look, opened=tuple(opened), changed=tuple(changed), closed=tuple(closed))
        )

    def probed(self, probe: Probe) -> None:
        """Remember a probe; the next look shows it."""
        self._database.add_probe(probe)
        self._probes[probe.revision] = probe

    def donor(self, peer_id: str, now_unix_s: float) -> tuple[NodeStatus, ...]:
        """A peer's nodes, also those that are gone; empty when nobody has seen it."""
        revisions = self._revisions_of.get(peer_id, ())
        rows = (self._known.get((peer_id, revision)) for revision in sorted(revisions))
        return tuple(self._node(row, now_unix_s) for row in rows if row is not None)

    # --- parts of it -----------------------------------------------------------------------------
    def _seen(self, record: NodeRecord, now: float, previous: float | None) -> tuple[NodeRow, Work]:
        key = (record.peer_id, record.model_revision.hex())
        known = self._known.get(key)
        more = work_between(
            known.counters if known else None,
            record,
            elapsed_s=now - known.seen_unix_s if known else 0.0,
            grams_per_kwh=self._factors.grams_per_kwh(record.country),
        )
        if known is None and previous is not None and record.started_unix_s >= previous:
            # It has begun since the last look: all that it did, we have seen it do.
            fresh = Counters(record.started_unix_s, 0, 0, 0)
            more = work_between(
                fresh,
                record,
                elapsed_s=now - previous,
                grams_per_kwh=self._factors.grams_per_kwh(record.country),
            )
        row = NodeRow(
            *key,
            known.registered_unix_s if known else now,
            now,
            declared(record),
            Counters.of(record),
            known.work + more if known else more,
        )
        return row, more

    def _sample(self, summary: ModelSummary, records: Sequence[NodeRecord], work: Work) -> Sample:
        replicas = coverage(records, summary.number_of_blocks)
        serving = sum(record.takes_sessions for record in records)
        return Sample(summary.model_revision.hex(), serving, min(replicas, default=0), work)

    def _remember(self, rows: dict[Key, NodeRow]) -> None:
        self._known |= rows
        for peer, revision in rows:
            self._revisions_of.setdefault(peer, set()).add(revision)

    def _is_unchanged(self, key: Key, row: NodeRow) -> bool:
        """Whether only the time is another one since the last look."""
        known = self._known.get(key)
        return (
            known is not None
            and key in self._here
            and (known.declared, known.counters, known.work)
            == (row.declared, row.counters, row.work)
        )

    def _vanished(self, gone: Iterable[Key]) -> int:
        """How many of them were serving at the last look, and went without a word."""
        return sum(Standing(self._known[key].declared.standing).serves for key in gone)

    def _watch(self, peers: Iterable[str], previous: float | None, now: float) -> None:
        self._watched = since(extended(self._watched, previous, now), now - KEPT_PRESENCE_S)
        for peer in peers:
            self._presence[peer] = extended(self._presence.get(peer, ()), previous, now)

    def _count_days(self, added: Iterable[tuple[str, str, Work]], now: float) -> None:
        day = int(now) // DAY_S
        for _, revision, work in added:
            self._days[day, revision] = self._days.get((day, revision), Work()) + work

    def _forget(self, now: float) -> None:
        if now - self._forgot_unix_s < FORGET_EACH_S:
            return
        self._forgot_unix_s = now
        self._database.forget(now)
        kept = ((peer, since(item, now - KEPT_PRESENCE_S)) for peer, item in self._presence.items())
        self._presence = {peer: intervals for peer, intervals in kept if intervals}
        if len(self._known) > len(self._here):
            self._known = {(row.peer_id, row.revision): row for row in self._database.nodes()}
            self._revisions_of.clear()
            self._remember(self._known)

    # --- the snapshot ----------------------------------------------------------------------------
    def _publish(self, crawl: Crawl, models: list[ModelStatus]) -> Snapshot:
        now = crawl.at_unix_s
        here = [self._node(self._known[key], now) for key in sorted(self._here)]
        lost = [
            self._node(row, now)
            for key, row in sorted(self._known.items())
            if key not in self._here
            and row.seen_unix_s > now - SHOWN_LOST_S
            and row.declared.standing != Standing.DRAINING
        ]
        of_peer: dict[str, tuple[NodeStatus, ...]] = {}
        for node in (*here, *lost):
            of_peer[node.peer_id] = (*of_peer.get(node.peer_id, ()), node)
        self._version += 1
        self.snapshot = Snapshot(
            version=self._version,
            taken_unix_s=now,
            heard_unix_s=crawl.heard_unix_s,
            period_s=self._period_s,
            stale_after_s=crawl.stale_after_s,
            totals=totals_of(
                here,
                models,
                self._days,
                registered=len(self._revisions_of),
                now_unix_s=now,
            ),
            models=tuple(models),
            # In the thread that nobody waits for: readers get them in this order.
            nodes=tuple(
                sorted(
                    (*here, *lost),
                    key=lambda node: (node.model_name, node.first_block, node.end_block),
                )
            ),
            incidents=self._database.incidents(),
            of_peer=of_peer,
        )
        return self.snapshot

    def _node(self, row: NodeRow, now: float) -> NodeStatus:
        return node_status(
            row,
            self._presence.get(row.peer_id, ()),
            self._watched,
            here=(row.peer_id, row.revision) in self._here,
            now_unix_s=now,
        )

    def _model(
        self, summary: ModelSummary, records: Sequence[NodeRecord], now: float
    ) -> ModelStatus:
        revision = summary.model_revision.hex()
        return model_status(
            summary,
            records,
            work_today=self._days.get((int(now) // DAY_S, revision), Work()),
            probe=self._probes.get(revision),
            peers=self._peers,
            now_unix_s=now,
        )
