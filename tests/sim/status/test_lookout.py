"""The page misses who died within one of its periods, and nobody else, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from swarm.membership import Announcer
from swarm.memory_network import LinkSettings, MemoryNetwork, MemoryPeer, MemorySettings
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.records import (
    NodeRecord,
    NodeState,
    TombstoneRecord,
    expected_key,
    sign_record,
)
from swarm.protocol.tensors import DType
from swarm.protocol.version import STREAM_PROTOCOL
from swarm.simulation.announced import answer_pings
from swarm.status.crawler import Crawler
from swarm.status.lookout import WATCHED
from swarm.status.snapshot import Crawl
from swarm.virtual_time import LoopClock, run

PERIOD_S = 5.0
CLOCK = LoopClock()

REVISION = b"r" * 32


def record_of(identity: Identity) -> NodeRecord:
    return NodeRecord(
        peer_id=identity.peer_id,
        model_name="model",
        model_revision=REVISION,
        number_of_blocks=30,
        shards=1,
        first_block=0,
        end_block=10,
        state=NodeState.ONLINE,
        dtype=DType.FLOAT32,
        minimum_version=1,
        maximum_version=1,
        sequence=1,
        expires_unix_s=0,
    )


class Swarm:
    """Nodes that announce themselves and answer pings; no witnesses. And a page that looks."""

    def __init__(self, size: int) -> None:
        link = LinkSettings(latency_s=0.03, jitter_s=0.01)
        self.network = MemoryNetwork(1, MemorySettings(link=link))
        self.identities = [Identity.generate() for _ in range(size)]
        self.page = self.network.join(Identity.generate())
        # Who keeps the directory must outlive those that die here.
        for _ in range(5):
            self.network.join(Identity.generate())
        self.peers: dict[PeerId, MemoryPeer] = {}
        self.crawl: Crawl | None = None
        self.announcers: dict[PeerId, Announcer] = {}
        self._announcing: dict[PeerId, asyncio.Task[None]] = {}

    @property
    def ids(self) -> list[PeerId]:
        return [identity.peer_id for identity in self.identities]

    @property
    def shown(self) -> set[PeerId]:
        assert self.crawl is not None
        return {record.peer_id for _, records in self.crawl.models for record in records}

    @property
    def missing(self) -> set[PeerId]:
        return {*self.ids} - self.shown

    async def start(self, number: int) -> None:
        identity = self.identities[number]
        peer = self.network.join(identity)
        await peer.serve(STREAM_PROTOCOL, answer_pings)
        announcer = Announcer(identity, peer, CLOCK, record_of(identity), hidden_size=576)
        self.peers[peer.peer_id] = peer
        self.announcers[peer.peer_id] = announcer
        self._announcing[peer.peer_id] = asyncio.create_task(announcer.run())

    async def kill(self, number: int) -> None:
        peer = self.ids[number]
        self.network.crash(peer)
        await self._end(peer)

    async def _end(self, peer: PeerId) -> None:
        task = self._announcing.pop(peer)
        task.cancel()
        await asyncio.wait([task])

    async def look(self) -> None:
        async def looked(crawl: Crawl) -> None:
            self.crawl = crawl

        crawler = Crawler(self.page, CLOCK, period_s=PERIOD_S, transport=self.page)
        await crawler.run(looked)

    async def close(self) -> None:
        for peer in list(self._announcing):
            await self._end(peer)

    async def seconds_until(self, condition: Callable[[], bool], patience_s: float) -> float:
        started_s = CLOCK.monotonic_s()
        while not condition():
            await asyncio.sleep(0.05)
            assert CLOCK.monotonic_s() - started_s < patience_s, self.missing
        return CLOCK.monotonic_s() - started_s

    async def never(self, condition: Callable[[], bool], duration_s: float) -> None:
        for _ in range(round(duration_s / 0.5)):
            await asyncio.sleep(0.5)
            assert not condition(), self.missing


Story = Callable[[Swarm], Awaitable[None]]


def simulate(story: Story, size: int = 3) -> None:
    async def main() -> None:
        swarm = Swarm(size)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(swarm.close)
            for number in range(size):
                await swarm.start(number)
            looking = asyncio.create_task(swarm.look())
            stack.callback(looking.cancel)
            await asyncio.sleep(4 * PERIOD_S)
            assert not swarm.missing
            await story(swarm)

    run(main())


@pytest.mark.parametrize(
    ("size", "delay_s"), [(2, 1.0), (3, 0.0), (3, 0.7), (3, 1.9), (3, 3.1), (3, 4.6), (100, 1.0)]
)
def test_a_killed_node_is_missed_within_a_period(size: int, delay_s: float) -> None:
    """In the largest swarm it is one of those that the page looks at in this hour."""

    async def story(swarm: Swarm) -> None:
        await asyncio.sleep(delay_s)
        asked = {stream.remote_peer for stream in swarm.page.streams}
        watched = [number for number, peer in enumerate(swarm.ids) if peer in asked]
        assert len(watched) == min(size, WATCHED)
        victim = watched[1]
        await swarm.kill(victim)
        gone = {swarm.ids[victim]}
        assert await swarm.seconds_until(lambda: swarm.missing == gone, 60) <= PERIOD_S
        await swarm.never(lambda: swarm.missing != gone, 60)

    simulate(story, size)


def test_last_words_that_are_read_after_the_death_bring_nobody_back() -> None:
    async def story(swarm: Swarm) -> None:
        swarm.announcers[swarm.ids[0]].announce_now()
        await asyncio.sleep(0.5)
        await swarm.kill(0)
        gone = {swarm.ids[0]}
        await swarm.seconds_until(lambda: swarm.missing == gone, PERIOD_S)
        await swarm.never(lambda: swarm.missing != gone, 60)

    simulate(story)


def test_a_node_that_falls_silent_is_missed_within_a_period() -> None:
    async def story(swarm: Swarm) -> None:
        swarm.network.partition([swarm.ids[0]])
        gone = {swarm.ids[0]}
        assert await swarm.seconds_until(lambda: swarm.missing == gone, 60) <= PERIOD_S
        swarm.network.heal()
        assert await swarm.seconds_until(lambda: not swarm.missing, 60) <= 3 * PERIOD_S

    simulate(story)


@pytest.mark.parametrize("reachable", [0, 1])
def test_a_page_that_is_cut_off_misses_nobody(reachable: int) -> None:
    async def story(swarm: Swarm) -> None:
        for peer in swarm.ids[reachable:]:
            swarm.network.cut(swarm.page.peer_id, peer)
        await swarm.never(lambda: bool(swarm.missing), 20)

    simulate(story)


def test_whom_only_the_page_cannot_reach_is_back_with_its_next_word_and_stays() -> None:
    async def story(swarm: Swarm) -> None:
        swarm.network.cut(swarm.page.peer_id, swarm.ids[0])
        await swarm.seconds_until(lambda: bool(swarm.missing), PERIOD_S)
        assert await swarm.seconds_until(lambda: not swarm.missing, 90) <= 60
        await swarm.never(lambda: bool(swarm.missing), 120)

    simulate(story)


def test_whoever_comes_back_is_shown_within_two_periods() -> None:
    async def story(swarm: Swarm) -> None:
        await swarm.kill(0)
        await swarm.seconds_until(lambda: bool(swarm.missing), PERIOD_S)
        await swarm.start(0)
        assert await swarm.seconds_until(lambda: not swarm.missing, 60) <= 2 * PERIOD_S

    simulate(story)


def test_one_liar_makes_nobody_disappear() -> None:
    async def story(swarm: Swarm) -> None:
        liar, *others = swarm.identities
        for turn in range(60):
            sequence = int(CLOCK.unix_s() * 1000) + 9_000
            lie = TombstoneRecord(
                peer_id=liar.peer_id,
                model_revision=REVISION,
                groups=1,
                group=0,
                lost_peers=tuple(sorted(other.peer_id for other in others)),
                lost_sequences=(sequence,) * len(others),
                sequence=turn + 1,
                expires_unix_s=int(CLOCK.unix_s()) + 100,
            )
            value = sign_record(liar, lie)
            assert await swarm.peers[liar.peer_id].store(
                expected_key(lie), value, lie.expires_unix_s
            )
            await swarm.never(lambda: bool(swarm.missing), 1.0)

    simulate(story)
