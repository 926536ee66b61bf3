"""Policies under faults: who is outside sees no frame of any session, whatever it offers."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from swarm import virtual_time
from swarm.client.app import SwarmClient
from swarm.client.bound_client import BoundClient
from swarm.client.hops import SessionRequest
from swarm.connection import Connection
from swarm.memory_network import MemoryPeer
from swarm.node.engine.training_api import TrainingRequest
from swarm.node.service import NodeService
from swarm.ports import Stream
from swarm.protocol.errors import (
    ErrorCode,
    NoRouteError,
    RemoteError,
    SwarmError,
)
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.messages import (
    Attach,
    Attached,
    OpenSession,
    OpenTraining,
    SessionOpened,
    SetRoute,
    TrainingOpened,
)
from swarm.protocol.passport import Tier
from swarm.protocol.policy import Policy
from swarm.protocol.records import (
    ModelIndexRecord,
    NodeRecord,
    NodeState,
    model_index_key,
    shard_key,
    sign_record,
)
from swarm.protocol.tensors import DType
from swarm.protocol.version import STREAM_PROTOCOL
from swarm.virtual_time import LoopClock

REVISION = bytes(range(32))
BLOCKS = 12
HIDDEN = 4
ONLY_KENYA = Policy(countries=("KE",))


class CountingPeer:
    """The network layer of a node: counts the streams and bytes that reach it."""

    def __init__(self, peer: MemoryPeer) -> None:
        self.peer = peer
        self.streams = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.peer, name)

    async def serve(self, protocol: str, handler: Any) -> None:
        async def counted(stream: Stream) -> None:
            self.streams += 1
            await handler(stream)

        await self.peer.serve(protocol, counted)


@dataclass
class Nation:
    """Nodes in several countries, all of them members, and a client."""

    town: Any
    engine_type: Any
    observer_type: Any
    nodes: list[tuple[Identity, CountingPeer, NodeService, tuple[int, int], str]] = field(
        default_factory=list
    )

    async def add(
        self, span: tuple[int, int], country: str, *, speed: int = 100, **certificate: Any
    ) -> CountingPeer:
        identity, peer = self.town.member(country=country, **certificate)
        counting = CountingPeer(peer)
        engine = self.engine_type(*span)
        service = NodeService(
            counting,
            engine,
            model_revision=REVISION,
            resolve=self._resolve,
            observer=self.observer_type(),
            clock=LoopClock(),
            gate=peer.gate,
        )
        await service.start()
        self.nodes.append((identity, counting, service, span, country))
        await self.announce(identity, peer, span, country, speed)
        return counting

    async def _resolve(self, peer: PeerId, *, afresh: bool = False) -> tuple[str, ...]:
        return ()

    async def announce(
        self,
        identity: Identity,
        peer: MemoryPeer,
        span: tuple[int, int],
        country: str,
        speed: int = 100,
    ) -> None:
        expires = int(LoopClock().unix_s()) + 800
        record = NodeRecord(
            peer_id=identity.peer_id,
            model_name="toy",
            model_revision=REVISION,
            number_of_blocks=BLOCKS,
            shards=1,
            first_block=span[0],
            end_block=span[1],
            state=NodeState.ONLINE,
            dtype=DType.FLOAT32,
            minimum_version=1,
            maximum_version=1,
            sequence=int(LoopClock().unix_s() * 1000),
            expires_unix_s=expires,
            decode_tokens_per_s=speed,
            cache_tokens_total=4096,
            cache_tokens_free=4096,
            country=country,
        )
        await peer.store(shard_key(REVISION, 0), sign_record(identity, record), expires)
        index = ModelIndexRecord(
            identity.peer_id, "toy", REVISION, BLOCKS, 1, HIDDEN, record.sequence, expires
        )
        await peer.store(model_index_key(), sign_record(identity, index), expires)

    def client(self, seed: int = 1) -> SwarmClient:
        _, peer = self.town.member()
        peer.gate.adopt_revocations(self.town.land.pages(number=2))
        return SwarmClient(peer, clock=LoopClock(), seed=seed, gate=peer.gate)


REQUEST = SessionRequest(REVISION, HIDDEN, 1, 64, DType.FLOAT32)


async def talk(client: BoundClient | SwarmClient, tensor: Any, steps: int = 4) -> None:
    chain = await client.open_chain(REQUEST, number_of_blocks=BLOCKS)
    try:
        await chain.step(tensor(8), 0, output_tokens=1)
        for step in range(steps):
            await chain.step(tensor(1), 8 + step, output_tokens=1)
    finally:
        await chain.close()


@pytest.fixture
def make_nation(
    make_town: Callable[..., Any], toy_engine: Any, counted_observer: Any
) -> Callable[..., Nation]:
    return lambda: Nation(make_town(), toy_engine, counted_observer)


def test_two_hundred_sessions_with_faults(
    make_nation: Callable[..., Nation], make_tensor: Callable[..., Any]
) -> None:
    async def scenario() -> None:
        nation = make_nation()
        dice = random.Random(5)
        # Outside: one hop for everything, a hundred times as fast.
        outside = [await nation.add((0, BLOCKS), country, speed=10_000) for country in ("TZ", "")]
        for _ in range(3):
            await nation.add((0, 6), "KE")
            await nation.add((6, BLOCKS), "KE")
        client = nation.client()
        bound = client.under(ONLY_KENYA)
        outcomes: Counter[str] = Counter()

        def tensor(tokens: int) -> Any:
            return make_tensor(dice, 1, tokens)

        async def session(number: int) -> None:
            await asyncio.sleep(number * 0.2)
            (error,) = await asyncio.gather(talk(bound, tensor), return_exceptions=True)
            assert error is None or isinstance(error, SwarmError)
            if isinstance(error, NoRouteError):
                assert error.missing_blocks or error.retry_after_ms
            outcomes["whole" if error is None else type(error).__name__] += 1

        async def faults() -> None:
            """Cut nodes of the country off, for a while, several at a time."""
            network = nation.town.network
            inside = [peer for _, peer, _, _, country in nation.nodes if country == "KE"]
            for _ in range(12):
                await asyncio.sleep(dice.uniform(1, 4))
                for victim in dice.sample(inside, dice.choice((1, 2))):
                    network.partition({victim.peer_id})
                await asyncio.sleep(dice.uniform(0.5, 3))
                network.heal()

        async with client:
            async with asyncio.TaskGroup() as group:
                group.create_task(faults())
                for number in range(200):
                    group.create_task(session(number))
            assert outcomes["whole"] >= 150, outcomes
            assert sum(outcomes.values()) == 200
            assert [peer.streams for peer in outside] == [0, 0]
            # Without the policy they would have been taken.
            await talk(client, tensor)
            assert sum(peer.streams for peer in outside) > 0

    virtual_time.run(scenario())


def test_what_cannot_be_met_is_refused_with_the_reason(
    make_nation: Callable[..., Nation], make_tensor: Callable[..., Any]
) -> None:
    async def scenario() -> None:
        nation = make_nation()
        outside = await nation.add((0, BLOCKS), "TZ")
        await nation.add((0, 6), "KE", organisation="KENET")
        last = await nation.add((6, BLOCKS), "KE", organisation="University")

        def tensor(tokens: int) -> Any:
            return make_tensor(random.Random(1), 1, tokens)

        async with nation.client() as client:
            await talk(client.under(ONLY_KENYA), tensor)
            for policy, says in (
                (Policy(organisations=("KENET",)), "outside of the policy's organisations"),
                (Policy(countries=("UG",)), "outside of the policy's countries"),
                (Policy(minimum_tier=Tier.TRUSTED), "below the policy's tier"),
                (
                    ONLY_KENYA.without(last.peer_id),
                    "that the policy avoids",
                ),
            ):
                with pytest.raises(NoRouteError, match=says):
                    await client.under(policy).open_chain(REQUEST, number_of_blocks=BLOCKS)
            # In mid-session: the only other node with these blocks is outside.
            chain = await client.under(ONLY_KENYA).open_chain(REQUEST, number_of_blocks=BLOCKS)
            await chain.step(tensor(4), 0, output_tokens=1)
            nation.town.network.crash(last.peer_id)
            with pytest.raises(NoRouteError):
                await chain.step(tensor(1), 4, output_tokens=1)
            await chain.close()
        assert outside.streams == 0

    virtual_time.run(scenario())


def test_first_and_last_blocks_only_on_trusted_nodes(
    make_nation: Callable[..., Nation], make_tensor: Callable[..., Any]
) -> None:
    async def scenario() -> None:
        nation = make_nation()
        await nation.add((0, 3), "KE", tier=Tier.TRUSTED)
        await nation.add((9, BLOCKS), "KE", tier=Tier.TRUSTED)
        whole = await nation.add((0, BLOCKS), "KE", speed=10_000)
        policy = Policy(minimum_end_tier=Tier.TRUSTED, end_blocks=3)
        async with nation.client() as client:
            chain = await client.under(policy).open_chain(REQUEST, number_of_blocks=BLOCKS)
            hops = [(hop.first_block, hop.end_block, hop.peer_id) for hop in chain.plan.hops]
            assert [hop[:2] for hop in hops] == [(0, 3), (3, 9), (9, 12)]
            assert hops[1][2] == whole.peer_id
            await chain.close()
            with pytest.raises(NoRouteError, match="first and last 4 blocks tier trusted"):
                await client.under(Policy(minimum_end_tier=Tier.TRUSTED, end_blocks=4)).open_chain(
                    REQUEST, number_of_blocks=BLOCKS
                )

    virtual_time.run(scenario())


def test_nodes_check_too(make_nation: Callable[..., Nation]) -> None:
    """A client that names a hop outside of its own session's policy is refused by the hop before;
    a node that is outside itself refuses the session."""

    async def scenario() -> None:
        nation = make_nation()
        inside = await nation.add((0, 6), "KE")
        outside = await nation.add((6, BLOCKS), "TZ")
        _, client = nation.town.member()

        def opening(first: int, end: int) -> OpenSession:
            return OpenSession(
                REVISION, first, end, 1, 64, 1, 0, client.peer_id, policy=ONLY_KENYA.to_bytes()
            )

        stream = await client.open(outside.peer_id, STREAM_PROTOCOL)
        async with Connection(stream) as refused:
            await refused.say_hello(opening(6, BLOCKS))
            with pytest.raises(RemoteError) as caught:
                await refused.receive_only(SessionOpened)
            assert caught.value.code is ErrorCode.OUTSIDE_POLICY

        reached = outside.streams
        async with Connection(await client.open(inside.peer_id, STREAM_PROTOCOL)) as control:
            await control.say_hello(opening(0, 6))
            await control.receive_only(SessionOpened)
            await control.send(SetRoute(1, outside.peer_id, bytes(16)))
            with pytest.raises(RemoteError) as caught:
                await control.receive_only(SessionOpened)
            assert caught.value.code is ErrorCode.OUTSIDE_POLICY
        # It was dialled for its passport, and nothing of the session was sent.
        assert outside.streams == reached + 1

    virtual_time.run(scenario())


class IdleTraining:
    """A training session of an engine that computes nothing."""

    reserved_bytes = 0
    dtype_class = "float32"

    async def close(self) -> None:
        """Nothing is held."""


def test_nodes_check_trainings_too(make_nation: Callable[..., Nation]) -> None:
    """A node outside of a training's policy refuses it; one inside neither sends to nor takes from
    a peer that is outside, even if the client itself names it."""

    async def scenario() -> None:
        nation = make_nation()

        def engine(first: int, end: int, toy: Any = nation.engine_type) -> Any:
            trains = toy(first, end)

            async def open_training(request: TrainingRequest) -> IdleTraining:
                return IdleTraining()

            trains.open_training = open_training
            return trains

        nation.engine_type = engine
        inside = await nation.add((0, 6), "KE")
        outside = await nation.add((6, BLOCKS), "TZ")
        _, client = nation.town.member()
        _, stranger = nation.town.member(country="TZ")

        def opening(first: int, end: int, previous: PeerId = client.peer_id) -> OpenTraining:
            policy = ONLY_KENYA.to_bytes()
            return OpenTraining(REVISION, first, end, 1, previous, 64, 1, 0, 1, policy=policy)

        async def refusal(connection: Connection) -> ErrorCode:
            with pytest.raises(RemoteError) as caught:
                await connection.receive_only(Attached)
            return caught.value.code

        async with Connection(await client.open(outside.peer_id, STREAM_PROTOCOL)) as refused:
            await refused.say_hello(opening(6, BLOCKS))
            assert await refusal(refused) is ErrorCode.OUTSIDE_POLICY
        async with Connection(await client.open(inside.peer_id, STREAM_PROTOCOL)) as control:
            await control.say_hello(opening(0, 6, stranger.peer_id))
            opened = await control.receive_only(TrainingOpened)
            async with Connection(await stranger.open(inside.peer_id, STREAM_PROTOCOL)) as other:
                await other.say_hello(Attach(opened.session_id, 1))
                assert await refusal(other) is ErrorCode.OUTSIDE_POLICY
            reached = outside.streams
            await control.send(SetRoute(1, outside.peer_id, bytes(16)))
            assert await refusal(control) is ErrorCode.OUTSIDE_POLICY
        assert outside.streams == reached + 1  # for its passport, as above

    virtual_time.run(scenario())


def test_without_a_charter_nobody_can_keep_a_policy(
    make_nation: Callable[..., Nation], make_town: Callable[..., Any]
) -> None:
    async def scenario() -> None:
        town = make_town()
        peer = town.network.join(Identity.generate())
        async with SwarmClient(peer, clock=LoopClock()) as client:
            with pytest.raises(NoRouteError, match="no authority"):
                await client.under(ONLY_KENYA).open_chain(REQUEST, number_of_blocks=BLOCKS)

    virtual_time.run(scenario())
