"""The page as a whole: looks at the swarm, remembers, probes, and answers readers.

Two threads beside the event loop: one takes looks into account and writes, one reads the database
for readers, who so never wait for a look at ten thousand nodes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from aiohttp import web

from swarm.ports import Clock, Directory, Transport
from swarm.protocol.errors import ConfigError, SwarmError
from swarm.status.block_map import PEERS_VARIABLE
from swarm.status.carbon import GridFactors
from swarm.status.crawler import Crawler
from swarm.status.database import BIN_S, Database
from swarm.status.history import History, Range, read_history
from swarm.status.live import LiveUpdates
from swarm.status.metrics import StatusMetrics
from swarm.status.observatory import Observatory
from swarm.status.pages import Pages
from swarm.status.probing import Prober, Problem
from swarm.status.snapshot import Crawl, NodeStatus, Probe, Snapshot, Work

log = logging.getLogger(__name__)

T = TypeVar("T")

LONGEST_PROBE_S = 120.0
UNKNOWN_MODEL_WAIT_S = 1.0
"""Until the next try to probe a model that no look has found yet."""
LEDGER_PERIOD_S = 300.0


class SettledWork(Protocol):
    """What a ledger has settled."""

    async def credits(self) -> Mapping[str, float]:
        """By peer. Raises SwarmError when the ledger does not answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusSettings:
    """What can be set about the page."""

    database: Path
    """File with what the page remembers; made when missing."""
    host: str = "127.0.0.1"
    port: int = 8090
    """0 picks a free one."""
    period_s: float = 30.0
    """Between two looks at the swarm."""
    probe_period_s: float = 300.0
    """Between two canary sessions for each model that is probed."""
    swarm_name: str = "Sovereign Swarm"
    public_url: str = ""
    """Where readers find the page, as ``https://status.example.org``; for badges and the feed."""
    public_peers: str = ""
    """Addresses for the join lines, if they shall be published; otherwise a variable's name."""

    def __post_init__(self) -> None:
        if not 1 <= self.period_s <= BIN_S or not 1 <= self.probe_period_s <= 86400:
            raise ConfigError(f"the page looks every 1 to {BIN_S} s and probes every 1 to 86400 s")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} is no TCP port")
        if self.public_url and not self.public_url.startswith(("https://", "http://")):
            raise ConfigError(f"public URL {self.public_url!r}: it begins with https://")

    @property
    def peers_shown(self) -> str:
        return self.public_peers or PEERS_VARIABLE


class StatusPage:
    """Everything but HTTP; ``web_site`` answers from it. The owner runs :meth:`run`."""

    def __init__(
        self,
        settings: StatusSettings,
        directory: Directory,
        clock: Clock,
        *,
        transport: Transport | None = None,
        prober: Prober | None = None,
        ledger: SettledWork | None = None,
        around_look: AbstractContextManager[None] | None = None,
    ) -> None:
        """Opens the database. ``transport``: to ping nodes. ``around_look`` is entered for each
        look. Raises ConfigError."""
        self.settings = settings
        self.live = LiveUpdates()
        self.metrics = StatusMetrics()
        self.settled: Mapping[str, float] | None = None
        factors = GridFactors.read()
        self.pages = Pages(
            settings.swarm_name,
            factors,
            peers=settings.peers_shown,
            origin=settings.public_url.rstrip("/"),
        )
        self._around_look = around_look or nullcontext()
        self._clock = clock
        self._prober = prober
        self._ledger = ledger
        self._crawler = Crawler(directory, clock, period_s=settings.period_s, transport=transport)
        self._database = Database(settings.database)
        self._reading = Database(settings.database)
        self._observatory = Observatory(
            self._database, factors, period_s=settings.period_s, peers=settings.peers_shown
        )
        self._writer = ThreadPoolExecutor(1, "status-look")
        self._reader = ThreadPoolExecutor(1, "status-read")
        self._histories: dict[tuple[str, str], tuple[int, asyncio.Future[History]]] = {}

    @property
    def snapshot(self) -> Snapshot:
        return self._observatory.snapshot

    @property
    def is_stale(self) -> bool:
        return self.snapshot.is_stale(self._clock.unix_s())

    @property
    def now_unix_s(self) -> float:
        return self._clock.unix_s()

    async def run(self) -> None:
        """Look, probe and read the ledger until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._crawler.run(self._looked))
            if self._prober is not None:
                group.create_task(self._probe(self._prober))
            if self._ledger is not None:
                group.create_task(self._read_ledger(self._ledger))

    def close(self) -> None:
        """Finish what is being written, and close the database."""
        self._writer.shutdown(wait=True)
        self._reader.shutdown(wait=True)
        self._reading.close()
        self._database.close()

    # --- for readers -----------------------------------------------------------------------------
    async def history(self, revision: str, of: Range) -> History:
        """Read once for each snapshot, however many ask."""
        version, key = self.snapshot.version, (revision, of.name)
        known = self._histories.get(key)
        if known is None or known[0] != version:
            now = self.snapshot.taken_unix_s or self._clock.unix_s()
            reading = asyncio.ensure_future(
                self._in_thread(
                    self._reader, lambda: read_history(self._reading, revision, now, of)
                )
            )
            known = version, reading
            self._histories[key] = known
        return await asyncio.shield(known[1])

    async def donor(self, peer_id: str) -> tuple[NodeStatus, ...]:
        """The peer's nodes, also when they are long gone; empty for strangers."""
        here = self.snapshot.of_peer.get(peer_id)
        if here is not None:
            return here
        now = self._clock.unix_s()
        return await self._in_thread(self._writer, lambda: self._observatory.donor(peer_id, now))

    async def work_by_day(self, peer_id: str, first_day: int) -> dict[int, Work]:
        return await self._in_thread(
            self._reader, lambda: self._reading.work_of_peer(peer_id, first_day)
        )

    # --- what runs -------------------------------------------------------------------------------
    async def _looked(self, crawl: Crawl) -> None:
        started_s = time.perf_counter()
        with self._around_look:
            snapshot = await self._in_thread(self._writer, lambda: self._observatory.observe(crawl))
        self.metrics.look_done(time.perf_counter() - started_s)
        self.metrics.snapshot = snapshot
        served = {model.revision for model in snapshot.models} | {""}
        self._histories = {key: known for key, known in self._histories.items() if key[0] in served}
        self.live.publish(snapshot.version)

    async def _probe(self, prober: Prober) -> None:
        """One model after the other, each once in a period."""
        due_s = dict.fromkeys(prober.revisions, self._clock.monotonic_s())
        while True:
            revision = min(due_s, key=lambda key: due_s[key], default=None)
            if revision is None:
                return
            await self._clock.sleep(max(0.0, due_s[revision] - self._clock.monotonic_s()))
            if self.snapshot.model(revision) is None:
                due_s[revision] = self._clock.monotonic_s() + UNKNOWN_MODEL_WAIT_S
                continue
            due_s[revision] = self._clock.monotonic_s() + self.settings.probe_period_s
            probe = await self._probed(prober, revision)
            await self._in_thread(self._writer, partial(self._observatory.probed, probe))

    async def _probed(self, prober: Prober, revision: str) -> Probe:
        try:
            async with asyncio.timeout(LONGEST_PROBE_S):
                return await prober.probe(revision)
        except TimeoutError:
            return Probe(revision, self._clock.unix_s(), False, problem=Problem.TIMEOUT)

    async def _read_ledger(self, ledger: SettledWork) -> None:
        while True:
            try:
                self.settled = dict(await ledger.credits())
            except SwarmError as error:
                log.warning("the ledger does not answer: %s", error)
            await self._clock.sleep(LEDGER_PERIOD_S)

    async def _in_thread(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work)


@asynccontextmanager
async def served(page: StatusPage) -> AsyncIterator[str]:
    """Answer readers meanwhile; gives the address. Raises ConfigError for a port that is taken."""
    from swarm.status.web_site import make_application

    async with AsyncExitStack() as stack:
        runner = web.AppRunner(
            make_application(page),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=3.0,
            keepalive_timeout=30.0,
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        settings = page.settings
        site = web.TCPSite(runner, settings.host, settings.port, backlog=512)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {settings.host} port {settings.port}: {error.strerror};"
                " choose another with --port"
            ) from None
        host, port, *_ = runner.addresses[0]
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
