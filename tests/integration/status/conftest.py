"""The page over HTTP, in front of announcements that are signed and whose nodes are not there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from swarm.ports import Clock
from swarm.protocol.identity import Identity
from swarm.protocol.records import NodeRecord
from swarm.simulation.announced import AnnouncedSwarm
from swarm.status.snapshot import Probe, ProbeHop
from swarm.status.status_page import StatusPage, StatusSettings, served
from swarm.virtual_time import LoopClock

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; DROP TABLE node; --",
    "{{ 7 * 7 }}{% raw %}",
    "192.168.7.9:31330",
    "]]></title><svg/onload=alert(1)>",
)
"""What nodes call themselves."""


@dataclass
class Site:
    """A running page, and a reader."""

    page: StatusPage
    url: str
    reader: aiohttp.ClientSession

    async def get(self, path: str, **headers: str) -> tuple[int, str]:
        async with self.reader.get(
            self.url + path, headers=headers, allow_redirects=False
        ) as answer:
            return answer.status, await answer.text()

    async def looked(self, version: int = 1) -> None:
        async with asyncio.timeout(20):
            while self.page.snapshot.version < version:
                await self.page.live.next_version(self.page.snapshot.version)


class FixedProber:
    """Says what it was told; real probes are tried end to end."""

    def __init__(self, revision: str) -> None:
        self.revisions: Collection[str] = [revision]

    async def probe(self, revision: str) -> Probe:
        hop = ProbeHop("peer", "<b>hop</b>", 0, 32)
        return Probe(revision, LoopClock().unix_s(), True, 0.25, 20.0, 16, hops=(hop,))


def hostile_swarm(count: int) -> AnnouncedSwarm:
    """Nodes of one model with names that mean harm."""
    drawn = AnnouncedSwarm.of(count, LoopClock(), number_of_blocks=32, name="$(id) <b>evil</b>")
    records: dict[Identity, NodeRecord] = {}
    for number, record in enumerate(drawn.records):
        identity = Identity.generate()
        name = HOSTILE[number % len(HOSTILE)]
        records[identity] = replace(
            record,
            peer_id=identity.peer_id,
            display_name=name,
            organisation=name[::-1] if number % 2 else name,
            quantisation="<i>int4</i>",
            adapters=("</td><script>", "fe80::1"),
            software="<u>1</u>",
        )
    return AnnouncedSwarm(records, LoopClock())


@asynccontextmanager
async def running_site(
    swarm: AnnouncedSwarm, folder: Path, *, clock: Clock | None = None, **settings: object
) -> AsyncIterator[Site]:
    wanted: dict[str, Any] = {"port": 0, "period_s": 1.0, "probe_period_s": 1.0, **settings}
    page = StatusPage(
        StatusSettings(database=folder / "status.sqlite", **wanted),
        swarm,
        clock or LoopClock(),
        prober=FixedProber(swarm.records[0].model_revision.hex()),
    )
    try:
        async with (
            served(page) as url,
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as reader,
            asyncio.TaskGroup() as group,
        ):
            running = group.create_task(page.run())
            site = Site(page, url, reader)
            await site.looked()
            yield site
            running.cancel()
    finally:
        page.close()
