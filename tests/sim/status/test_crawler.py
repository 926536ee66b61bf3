"""The crawler over a thousand announcing nodes, in virtual time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from itertools import pairwise

from swarm.ports import DirectoryEntry
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import PeerId
from swarm.simulation.announced import AnnouncedSwarm
from swarm.status.crawler import MOST_MODELS, Crawler
from swarm.status.snapshot import Crawl
from swarm.virtual_time import LoopClock, run

PERIOD_S = 30.0
CLOCK = LoopClock()


class Outage:
    """The directory, which may be silent, refuse, or answer late."""

    def __init__(self, swarm: AnnouncedSwarm) -> None:
        self._swarm = swarm
        self.mode = "answers"

    async def store(self, key: str, value: bytes, expires_unix_s: float) -> bool:
        return await self._swarm.store(key, value, expires_unix_s)

    async def get(
        self, key: str, *, until_unix_s: float = math.inf
    ) -> Mapping[PeerId, DirectoryEntry]:
        match self.mode:
            case "silent":
                return {}
            case "refuses":
                raise NetworkError("nobody answers")
            case "hangs":
                await asyncio.sleep(3600)
            case _:
                await asyncio.sleep(0.02)
        return await self._swarm.get(key, until_unix_s=until_unix_s)


class Union(Outage):
    """Several swarms in one directory."""

    def __init__(self, swarms: list[AnnouncedSwarm]) -> None:
        super().__init__(swarms[0])
        self._swarms = swarms

    async def get(
        self, key: str, *, until_unix_s: float = math.inf
    ) -> Mapping[PeerId, DirectoryEntry]:
        return {
            peer: entry
            for swarm in self._swarms
            for peer, entry in (await swarm.get(key, until_unix_s=until_unix_s)).items()
        }


async def crawled(
    directory: Outage, looks: int, change: Callable[[int], Awaitable[None] | None]
) -> list[Crawl]:
    """So many looks; ``change`` is called with the number of each."""
    found: list[Crawl] = []
    crawler = Crawler(directory, CLOCK, period_s=PERIOD_S)

    async def looked(crawl: Crawl) -> None:
        found.append(crawl)
        change(len(found))
        if len(found) == looks:
            raise StopAsyncIteration

    with suppress(BaseExceptionGroup):
        await crawler.run(looked)
    assert len(found) == looks
    return found


def nodes_of(crawl: Crawl) -> int:
    return sum(len(records) for _, records in crawl.models)


def test_a_thousand_nodes_are_found_in_one_period_and_kept() -> None:
    async def scenario() -> None:
        directory = Outage(AnnouncedSwarm.of(1000, CLOCK))
        crawls = await crawled(directory, 5, lambda number: None)
        assert [nodes_of(crawl) for crawl in crawls] == [1000] * 5
        for before, after in pairwise(crawls):
            assert PERIOD_S <= after.at_unix_s - before.at_unix_s <= 1.2 * PERIOD_S
            assert after.at_unix_s - after.heard_unix_s <= after.stale_after_s

    run(scenario())


def test_an_outage_makes_news_old_and_loses_nobody() -> None:
    async def scenario(mode: str) -> None:
        directory = Outage(AnnouncedSwarm.of(100, CLOCK))

        def change(number: int) -> None:
            directory.mode = mode if 3 <= number < 13 else "answers"

        crawls = await crawled(directory, 20, change)
        old = [crawl.at_unix_s - crawl.heard_unix_s > crawl.stale_after_s for crawl in crawls]
        assert not any(old[:4])
        assert any(old[4:14])
        assert not any(old[16:])
        assert nodes_of(crawls[-1]) == 100

    for mode in ("silent", "refuses"):
        run(scenario(mode))


def test_a_directory_that_hangs_holds_no_look_up() -> None:
    async def scenario() -> None:
        directory = Outage(AnnouncedSwarm.of(50, CLOCK))

        def change(number: int) -> None:
            directory.mode = "hangs" if number >= 2 else "answers"

        crawls = await crawled(directory, 6, change)
        gaps = [b.at_unix_s - a.at_unix_s for a, b in pairwise(crawls)]
        assert max(gaps) <= 2.2 * PERIOD_S

    run(scenario())


def test_a_model_is_not_hidden_behind_invented_ones() -> None:
    async def scenario() -> None:
        swarms = [AnnouncedSwarm.of(20, CLOCK, seed=99, name="zebra")]
        swarms += [AnnouncedSwarm.of(1, CLOCK, seed=n, name=f"a{n}") for n in range(MOST_MODELS)]
        (crawl,) = await crawled(Union(swarms), 1, lambda number: None)
        assert len(crawl.models) == MOST_MODELS
        assert "zebra" in {summary.model_name for summary, _ in crawl.models}

    run(scenario())
