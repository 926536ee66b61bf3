"""Deaths are known in seconds; cuts and liars bury nobody."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest

from swarm.buddies import Buddies
from swarm.connection import Connection
from swarm.membership import Announcer, read_nodes
from swarm.memory_network import LinkSettings, MemoryNetwork, MemoryPeer, MemorySettings
from swarm.nodes_view import NodesView
from swarm.ports import Stream
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.messages import Ping, Pong
from swarm.protocol.records import (
    NodeRecord,
    NodeState,
    TombstoneRecord,
    expected_key,
    sign_record,
)
from swarm.protocol.version import STREAM_PROTOCOL
from swarm.virtual_time import LoopClock, run

REVISION = b"r" * 32
CLOCK = LoopClock()

MakeIdentity = Callable[[int], Identity]
MakeRecord = Callable[..., NodeRecord]


async def answer_pings(stream: Stream) -> None:
    async with Connection(stream) as connection:
        await connection.answer_hello(5.0)
        while True:
            ping = await connection.receive_only(Ping)
            await connection.send(Pong(nonce=ping.nonce))


@dataclass
class Member:
    peer: MemoryPeer
    announcer: Announcer
    view: NodesView
    buddies: Buddies
    task: asyncio.Task[None]

    @property
    def peer_id(self) -> PeerId:
        return self.peer.peer_id


class Swarm:
    """Nodes that announce, look around and watch each other."""

    def __init__(self, network: MemoryNetwork, make_record: MakeRecord) -> None:
        self.network = network
        self.members: dict[int, Member] = {}
        self._make_record = make_record

    async def join(self, owner: Identity, number: int, **changes: Any) -> Member:
        peer = self.network.join(owner)
        await peer.serve(STREAM_PROTOCOL, answer_pings)
        record = self._make_record(owner, **changes)
        announcer = Announcer(owner, peer, CLOCK, record, hidden_size=576)
        view = NodesView(
            peer,
            CLOCK,
            REVISION,
            own=owner.peer_id,
            on_accused=announcer.announce_now,
            dice=random.Random(number),
        )
        buddies = Buddies(
            owner,
            peer,
            peer,
            CLOCK,
            view,
            model_revision=REVISION,
            dice=random.Random(number),
        )

        async def live() -> None:
            async with asyncio.TaskGroup() as group:
                for part in (announcer.run(), view.run(), buddies.run()):
                    group.create_task(part)

        member = Member(peer, announcer, view, buddies, asyncio.create_task(live()))
        self.members[number] = member
        return member

    async def crash(self, *numbers: int) -> None:
        for number in numbers:
            member = self.members.pop(number)
            self.network.crash(member.peer_id)
            member.task.cancel()
            await asyncio.wait([member.task])

    async def close(self) -> None:
        for number in list(self.members):
            await self.crash(number)

    def lost(self) -> dict[int, set[PeerId]]:
        return {number: set(member.view.lost) for number, member in self.members.items()}


Story = Callable[[Swarm], Awaitable[None]]


@pytest.fixture
def simulate(identity: MakeIdentity, node_record: MakeRecord) -> Callable[..., None]:
    def simulate(story: Story, size: int = 12, **changes: Any) -> None:
        async def main() -> None:
            link = LinkSettings(latency_s=0.03, jitter_s=0.01)
            network = MemoryNetwork(1, MemorySettings(link=link))
            async with AsyncExitStack() as stack:
                swarm = Swarm(network, node_record)
                stack.push_async_callback(swarm.close)
                for number in range(1, size + 1):
                    await swarm.join(identity(number), number, **changes)
                await asyncio.sleep(60)
                await story(swarm)

        run(main())

    return simulate


def ids(identity: MakeIdentity, numbers: Collection[int]) -> set[PeerId]:
    return {identity(number).peer_id for number in numbers}


def test_nobody_is_accused_where_nobody_dies(simulate: Callable[..., None]) -> None:
    async def story(swarm: Swarm) -> None:
        for _ in range(15):
            await asyncio.sleep(60)
            assert not any(member.view.accused for member in swarm.members.values())

    simulate(story)


def test_a_crash_is_known_to_all_in_seconds(
    simulate: Callable[..., None], identity: MakeIdentity
) -> None:
    async def story(swarm: Swarm) -> None:
        await swarm.crash(5)
        await asyncio.sleep(16)
        dead = ids(identity, [5])
        assert all(lost == dead for lost in swarm.lost().values())
        reader = swarm.network.join(identity(100))
        records = await read_nodes(reader, REVISION, CLOCK)
        assert len(records) == 11

    simulate(story)


def test_a_third_of_a_swarm_dies_at_once(
    simulate: Callable[..., None], identity: MakeIdentity
) -> None:
    async def story(swarm: Swarm) -> None:
        numbers = range(1, 25, 3)
        await swarm.crash(*numbers)
        dead = ids(identity, numbers)
        await asyncio.sleep(12)
        early = [len(lost) for lost in swarm.lost().values()]
        await asyncio.sleep(20)
        assert sum(early) / len(early) > len(dead) / 2
        assert all(lost == dead for lost in swarm.lost().values())

    simulate(story, size=24)


def test_a_node_that_comes_back_is_alive_at_once(
    simulate: Callable[..., None], identity: MakeIdentity
) -> None:
    async def story(swarm: Swarm) -> None:
        await swarm.crash(5)
        await asyncio.sleep(20)
        await swarm.join(identity(5), 5)
        await asyncio.sleep(35)
        assert not any(swarm.lost().values())
        assert all(len(member.view.records()) == 12 for member in swarm.members.values())

    simulate(story)


def test_who_leaves_cleanly_is_not_mourned(
    simulate: Callable[..., None], identity: MakeIdentity
) -> None:
    async def story(swarm: Swarm) -> None:
        leaver = swarm.members[5]
        leaver.announcer.update(replace(leaver.announcer.record, state=NodeState.DRAINING))
        await asyncio.sleep(40)
        leaver.task.cancel()
        await asyncio.wait([leaver.task])
        await leaver.announcer.leave()
        swarm.network.crash(swarm.members.pop(5).peer_id)
        for _ in range(30):
            await asyncio.sleep(4)
            assert not any(member.view.accused for member in swarm.members.values())

    simulate(story)


@pytest.mark.parametrize("size_of_minority", [1, 3, 5])
def test_a_minority_that_is_cut_off_does_not_bury_the_majority(
    simulate: Callable[..., None], identity: MakeIdentity, size_of_minority: int
) -> None:
    async def story(swarm: Swarm) -> None:
        minority = range(1, size_of_minority + 1)
        cut_off = ids(identity, minority)
        swarm.network.partition(cut_off)
        for _ in range(10):
            await asyncio.sleep(6)
            for number in minority:
                assert len(swarm.members[number].view.lost) <= size_of_minority
        # The others are right to go on without it.
        others = [member for number, member in swarm.members.items() if number not in minority]
        assert all(cut_off >= set(member.view.lost) for member in others)
        swarm.network.heal()
        await asyncio.sleep(90)
        assert not any(swarm.lost().values())
        assert all(len(member.view.records()) == 12 for member in swarm.members.values())

    simulate(story)


def test_one_link_that_is_cut_buries_nobody(
    simulate: Callable[..., None], identity: MakeIdentity
) -> None:
    async def story(swarm: Swarm) -> None:
        members = [member.peer_id for member in swarm.members.values()]
        for other in members[1:4]:
            swarm.network.cut(members[0], other)
        for _ in range(40):
            await asyncio.sleep(3)
            assert not any(swarm.lost().values())

    simulate(story)


def test_a_frozen_node_is_found_dead_and_comes_back(
    simulate: Callable[..., None], identity: MakeIdentity
) -> None:
    """Nothing breaks: only the answers stay away."""

    async def story(swarm: Swarm) -> None:
        frozen = swarm.members[5]
        swarm.network.partition([frozen.peer_id])
        await asyncio.sleep(32)
        for number, member in swarm.members.items():
            known = {record.peer_id for record in member.view.records()}
            assert (frozen.peer_id in known) == (number == 5)
        swarm.network.heal()
        await asyncio.sleep(35)
        assert not any(swarm.lost().values())

    simulate(story)


def test_invented_witnesses_silence_a_living_node_for_seconds_only(
    simulate: Callable[..., None], identity: MakeIdentity, node_record: MakeRecord
) -> None:
    async def story(swarm: Swarm) -> None:
        victim = swarm.members[5]
        liars = [await swarm.join(identity(number), number) for number in (50, 51, 52)]
        await asyncio.sleep(40)
        silenced_s = 0
        for second in range(550):
            if second % 2 == 0:  # they answer every record of the victim
                sequence = int(CLOCK.unix_s() * 1000)
                for number, liar in zip((50, 51, 52), liars, strict=True):
                    lie = TombstoneRecord(
                        peer_id=liar.peer_id,
                        model_revision=REVISION,
                        groups=1,
                        group=0,
                        lost_peers=(victim.peer_id,),
                        lost_sequences=(sequence + 9_000,),
                        sequence=second + 1,
                        expires_unix_s=int(CLOCK.unix_s()) + 300 + second // 2,
                    )
                    value = sign_record(identity(number), lie)
                    await liar.peer.store(expected_key(lie), value, lie.expires_unix_s)
            await asyncio.sleep(1)
            honest = [swarm.members[number] for number in range(1, 13) if number != 5]
            silenced_s += any(victim.peer_id in member.view.lost for member in honest)
        assert 0 < silenced_s < 60

    simulate(story)


def test_the_same_seed_gives_the_same_story(
    identity: MakeIdentity, node_record: MakeRecord
) -> None:
    def trace() -> list[tuple[float, str]]:
        events: list[tuple[float, str]] = []

        async def main() -> None:
            network = MemoryNetwork(
                3,
                MemorySettings(link=LinkSettings(latency_s=0.03, jitter_s=0.02, loss=0.02)),
                on_event=lambda now_s, event: events.append((now_s, event)),
            )
            swarm = Swarm(network, node_record)
            for number in range(1, 9):
                await swarm.join(identity(number), number)
            await asyncio.sleep(40)
            await swarm.crash(2, 6)
            await asyncio.sleep(60)
            await swarm.close()

        run(main())
        return events

    first = trace()
    assert len(first) > 1000
    assert trace() == first
