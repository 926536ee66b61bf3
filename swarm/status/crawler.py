"""Reads the whole directory, model by model, and hands over what it says once per period.

Each model is followed by a ``NodesView``, which keeps what one short answer misses and believes
tombstones, so that a node that was killed is gone after seconds and not when its record expires.
Whom the page pings itself (``lookout``) it misses sooner.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from swarm.membership import (
    ANNOUNCE_PERIOD_S,
    ModelSummary,
    RecordReader,
    announce_period_s,
    list_models,
)
from swarm.nodes_view import NodesView, ViewSettings
from swarm.ports import Clock, Directory, Transport
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import PeerId
from swarm.protocol.records import MAX_SHARDS, NodeRecord
from swarm.status.lookout import Lookout
from swarm.status.snapshot import Crawl

log = logging.getLogger(__name__)

MOST_MODELS = 64
"""Anyone can list a model; of more, those that most nodes list first are followed."""
MOST_NODES = 100_000
BYTES_PER_S = 4e6
"""Enough for 200,000 nodes in a minute."""
FIRST_READ_S = 10.0
"""The first snapshot waits so long for the shards of the models."""
STALE_PERIODS = 2
"""Of the page; what is announced may be one of its own periods old besides."""
LOST_CHECKS = 3
"""In each period the directory is asked so often who is dead; whoever is found so is shown then."""
LOST_POLLS = 30


class Crawler:
    """Follows all models of a swarm; the owner runs :meth:`run`."""

    def __init__(
        self,
        directory: Directory,
        clock: Clock,
        *,
        period_s: float,
        transport: Transport | None = None,
    ) -> None:
        """Without ``transport`` it only reads: deaths are known by witnesses and expiry."""
        self._directory = directory
        self._clock = clock
        self._period_s = period_s
        self._followed: dict[bytes, tuple[ModelSummary, NodesView, asyncio.Task[None]]] = {}
        self._heard_unix_s = 0.0
        self._lookout: Lookout | None = None
        if transport is not None:
            self._lookout = Lookout(transport, clock, self._records, period_s=period_s)

    async def run(self, looked: Callable[[Crawl], Awaitable[None]]) -> None:
        """Call ``looked`` once per period, until cancelled. Network errors are logged only."""
        async with asyncio.TaskGroup() as group:
            if self._lookout is not None:
                group.create_task(self._lookout.run())
            await self._follow(group)
            # Beside the looks: where a node is gone the directory may take long to answer, and that
            # it is gone is to be shown meanwhile.
            group.create_task(self._follow_on(group))
            while True:
                started_s = self._clock.monotonic_s()
                await looked(self._crawl())
                await self._until_next(started_s)

    async def _follow_on(self, group: asyncio.TaskGroup) -> None:
        while True:
            await self._clock.sleep(self._period_s)
            await self._follow(group)

    async def _until_next(self, started_s: float) -> None:
        """Wait for the next look: in a period, or earlier when nodes have died meanwhile."""
        lost = self._lost()
        while True:
            await self._clock.sleep(self._period_s / LOST_POLLS)
            passed_s = self._clock.monotonic_s() - started_s
            if passed_s >= self._period_s:
                return
            if passed_s >= self._period_s / LOST_CHECKS and not self._lost() <= lost:
                return

    def _lost(self) -> set[PeerId]:
        by_witnesses = {peer for _, view, _ in self._followed.values() for peer in view.lost}
        return by_witnesses if self._lookout is None else by_witnesses.union(self._lookout.lost)

    def _records(self) -> list[NodeRecord]:
        return [record for _, view, _ in self._followed.values() for record in view.records()]

    async def _follow(self, group: asyncio.TaskGroup) -> None:
        """Read the list of models; begin with new ones, let go of those that nobody lists."""
        try:
            async with asyncio.timeout(self._period_s):
                models = await self._models()
        except (NetworkError, TimeoutError) as error:
            log.warning("cannot read the list of models: %s", error or "no answer in time")
            return
        fresh = []
        for model in models:
            if model.model_revision in self._followed:
                _, view, task = self._followed[model.model_revision]
                self._followed[model.model_revision] = model, view, task
                continue
            view = NodesView(
                self._directory, self._clock, model.model_revision, settings=self._settings()
            )
            task = group.create_task(view.run())
            self._followed[model.model_revision] = model, view, task
            fresh.append(view)
        listed = {model.model_revision for model in models}
        for revision in [key for key in self._followed if key not in listed]:
            # Those who list it may be out of reach for a moment: its nodes are what counts.
            _, view, task = self._followed[revision]
            if not view.records():
                task.cancel()
                del self._followed[revision]
        await self._first_reads(fresh)

    async def _models(self) -> list[ModelSummary]:
        """Those that most peers list: nobody hides a model behind invented ones of a single key."""
        models = await list_models(self._directory, self._clock)
        if len(models) <= MOST_MODELS:
            return models
        index = await RecordReader(self._directory, self._clock).index()
        listed = Counter(record.model_revision for record in index)
        models.sort(key=lambda model: (-listed[model.model_revision], model.model_name))
        return models[:MOST_MODELS]

    async def _first_reads(self, views: Sequence[NodesView]) -> None:
        try:
            async with asyncio.timeout(min(FIRST_READ_S, self._period_s)):
                await asyncio.gather(*(view.ready() for view in views))
        except TimeoutError:
            log.info("some models are still being read")

    def _settings(self) -> ViewSettings:
        return ViewSettings(
            # However rarely the page looks: records end, and are read again before.
            refresh_s=min(self._period_s, ANNOUNCE_PERIOD_S),
            tombstones_s=max(1.0, self._period_s / LOST_CHECKS),
            bytes_per_s=BYTES_PER_S,
            maximum_shards=MAX_SHARDS,
            maximum_nodes=MOST_NODES,
        )

    def _misses(self, record: NodeRecord) -> bool:
        return self._lookout is not None and self._lookout.misses(record)

    def _crawl(self) -> Crawl:
        now_unix_s = self._clock.unix_s()
        models = []
        shards = 1
        for summary, view, _ in self._followed.values():
            records = tuple(record for record in view.records() if not self._misses(record))
            shards = max(shards, view.shards)
            # Sequence numbers are milliseconds; one of the future is as new as now.
            newest_unix_s = max((record.sequence for record in records), default=0) / 1000
            self._heard_unix_s = max(self._heard_unix_s, min(newest_unix_s, now_unix_s))
            models.append((summary, records))
        models.sort(key=lambda item: (item[0].model_name, item[0].model_revision))
        return Crawl(
            now_unix_s,
            self._heard_unix_s,
            STALE_PERIODS * self._period_s + announce_period_s(ANNOUNCE_PERIOD_S, shards),
            tuple(models),
        )
