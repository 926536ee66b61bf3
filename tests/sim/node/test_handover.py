"""Who may hand state over, what of it is refused, and that a session survives a bad hand-over."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from swarm import virtual_time
from swarm.connection import Connection
from swarm.node.handover import ChunkDigest
from swarm.protocol.errors import ErrorCode, RemoteError
from swarm.protocol.identity import Identity
from swarm.protocol.messages import (
    DIGEST_BYTES,
    CacheChunk,
    HandedOver,
    HandOver,
    JournalChunk,
    Message,
    OpenSession,
    SessionOpened,
    Step,
    StepResult,
    TakenOver,
    TakeOver,
)
from swarm.protocol.tensors import DType, WireTensor
from swarm.protocol.version import STREAM_PROTOCOL

REVISION = bytes(range(32))
MAXIMUM_TOKENS = 32


def floats(*shape: int) -> WireTensor:
    size = 4
    for dimension in shape:
        size *= dimension
    return WireTensor(DType.FLOAT32, shape, bytes(size))


CACHE = CacheChunk(0, 1, 0, floats(1, 4, 4))
JOURNAL = JournalChunk(0, floats(1, 4, 4))


class Scene:
    """A node with a session that waits for state from ``leaving``."""

    def __init__(self, swarm: Any) -> None:
        self.swarm = swarm
        self.node = swarm.nodes[0]
        self.leaving = swarm.network.join(Identity.generate())
        self.client = swarm.client

    @asynccontextmanager
    async def session(self) -> AsyncIterator[tuple[Connection, SessionOpened]]:
        async with await self.dial(self.client) as control:
            await control.say_hello(
                OpenSession(
                    REVISION,
                    *(0, 2, 1, MAXIMUM_TOKENS),
                    int(DType.FLOAT32),
                    0,
                    self.client.peer_id,
                    state_from=self.leaving.peer_id,
                )
            )
            control.maximum_payload_bytes = 1 << 20
            yield control, await control.receive_only(SessionOpened)

    async def dial(self, peer: Any) -> Connection:
        return Connection(await peer.open(self.node.peer.peer_id, STREAM_PROTOCOL, ()))

    async def refused(self, code: ErrorCode, peer: Any, *messages: Message) -> None:
        """The node answers ``messages`` on a new stream of ``peer`` with a code."""
        async with await self.dial(peer) as stream:
            await stream.say_hello(*messages)
            with pytest.raises(RemoteError) as refused:
                while True:
                    await stream.receive_only(TakenOver)
            assert refused.value.code is code


def play(toy_swarm: Any, story: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        swarm = toy_swarm(((0, 2),))
        await swarm.start()
        await story(Scene(swarm))
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_a_round_is_answered_and_only_the_final_one_counts(toy_swarm: Any) -> None:
    async def story(scene: Scene) -> None:
        async with scene.session() as (control, opened), await scene.dial(scene.leaving) as stream:
            await stream.say_hello(TakeOver(opened.session_id), CACHE)
            await stream.send(CacheChunk(1, 2, 0, floats(1, 4, 4)), JOURNAL)
            digest = ChunkDigest()
            for chunk in (CACHE, CacheChunk(1, 2, 0, floats(1, 4, 4)), JOURNAL):
                digest.add(chunk)
            await stream.send(TakenOver(4, 7, bytes(32)))
            assert await stream.receive_only(TakenOver) == TakenOver(4, 7, digest.digest())
            await stream.send(TakenOver(4, 9, bytes(32), final=1))
            answer = TakenOver(4, 9, digest.digest())
            assert await stream.receive_only(TakenOver) == answer
            assert await control.receive_only(TakenOver) == answer, "the client is told the same"
            step = Step(step=9, position=4, output_tokens=1, activations=floats(1, 1, 4))
            await control.send(step)
            assert (await control.receive_only(StepResult)).step == 9

    play(toy_swarm, story)


def test_only_the_peer_that_the_client_named_may_hand_over(toy_swarm: Any) -> None:
    async def story(scene: Scene) -> None:
        stranger = scene.swarm.network.join(Identity.generate())
        async with scene.session() as (control, opened):
            first = TakeOver(opened.session_id)
            for peer in (stranger, scene.client):
                await scene.refused(ErrorCode.NOT_NAMED_BY_SESSION, peer, first, CACHE)
            await scene.refused(ErrorCode.UNKNOWN_SESSION, scene.leaving, TakeOver(bytes(16)))
            async with await scene.dial(scene.leaving) as stream:
                await stream.say_hello(first, CACHE, TakenOver(4, 1, bytes(32)))
                await stream.receive_only(TakenOver)
                await scene.refused(ErrorCode.NOT_NAMED_BY_SESSION, scene.leaving, first, CACHE)
            assert isinstance(control, Connection)

    play(toy_swarm, story)


@pytest.mark.parametrize(
    ("code", "messages"),
    [
        (ErrorCode.BAD_TENSOR, [JournalChunk(0, floats(2, 4, 4))]),
        (ErrorCode.BAD_TENSOR, [JournalChunk(0, floats(1, 4, 5))]),
        (ErrorCode.BAD_TENSOR, [JournalChunk(0, WireTensor(DType.FLOAT16, (1, 1, 4), bytes(8)))]),
        (ErrorCode.GAP, [JournalChunk(1, floats(1, 4, 4))]),
        (ErrorCode.BAD_POSITION, [JournalChunk(0, floats(1, MAXIMUM_TOKENS + 1, 4))]),
        (ErrorCode.UNEXPECTED_MESSAGE, [HandedOver(0, bytes(32))]),
        (ErrorCode.BAD_FIELD, [TakenOver(0, 0, bytes(32), final=1)]),
        (ErrorCode.BAD_FIELD, [TakenOver(MAXIMUM_TOKENS + 1, 1, bytes(32), final=1)]),
    ],
)
def test_bad_state_is_refused_and_the_session_still_begins_from_nothing(
    toy_swarm: Any, code: ErrorCode, messages: list[Message]
) -> None:
    async def story(scene: Scene) -> None:
        async with scene.session() as (control, opened):
            first = TakeOver(opened.session_id)
            await scene.refused(code, scene.leaving, first, *messages)
            await control.send(
                Step(step=1, position=0, output_tokens=1, activations=floats(1, 1, 4))
            )
            assert (await control.receive_only(StepResult)).step == 1

    play(toy_swarm, story)


def test_state_comes_before_the_first_step_or_never(toy_swarm: Any) -> None:
    async def story(scene: Scene) -> None:
        async with scene.session() as (control, opened):
            await control.send(
                Step(step=1, position=0, output_tokens=1, activations=floats(1, 1, 4))
            )
            await control.receive_only(StepResult)
            await scene.refused(
                ErrorCode.UNEXPECTED_MESSAGE,
                scene.leaving,
                TakeOver(opened.session_id),
                TakenOver(0, 1, bytes(32), final=1),
            )

    play(toy_swarm, story)


def test_a_session_that_ends_while_it_is_handed_over_frees_everything(toy_swarm: Any) -> None:
    async def story(scene: Scene) -> None:
        async with await scene.dial(scene.leaving) as stream:
            async with scene.session() as (_, opened):
                await stream.say_hello(TakeOver(opened.session_id), CACHE)
            await scene.swarm.assert_nothing_left()
            while scene.node.service.streams:  # noqa: ASYNC110 (a service has no such event)
                await asyncio.sleep(0.01)

    play(toy_swarm, story)


def test_a_hand_over_to_nobody_is_answered_with_a_code(toy_swarm: Any) -> None:
    """To an unknown peer, to a session that is not there, and with a step in flight."""

    async def main() -> None:
        swarm = toy_swarm(((0, 2), (0, 2)))
        await swarm.start()
        scene = Scene(swarm)
        other = swarm.nodes[1].peer.peer_id
        async with scene.session() as (control, _):
            for peer in (scene.client.peer_id, other):
                await control.send(HandOver(peer, bytes(16)))
                answer = await control.receive_only(HandedOver)
                assert answer.code in (ErrorCode.NEXT_HOP_UNKNOWN, ErrorCode.NEXT_HOP_LOST)
                assert answer.length == 0
            swarm.nodes[0].engine.step_s = 5
            await control.send(
                Step(step=1, position=0, output_tokens=1, activations=floats(1, 1, 4)),
                HandOver(other, bytes(16), final=1),
            )
            answer = await control.receive_only(HandedOver)
            assert answer.code == ErrorCode.UNEXPECTED_MESSAGE
            assert (await control.receive_only(StepResult)).step == 1
        await swarm.assert_nothing_left()

    virtual_time.run(main())


@pytest.mark.parametrize("seed", range(10))
def test_a_move_whose_digests_differ_is_not_made(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The session goes on where it was, until the node is gone; then it is healed."""
    numbers = itertools.count()
    monkeypatch.setattr(
        ChunkDigest, "digest", lambda _: next(numbers).to_bytes(DIGEST_BYTES, "big")
    )

    async def main() -> None:
        swarm = toy_swarm(((0, 2), (2, 4), (0, 2), (2, 4)), seed=seed)
        await swarm.start()
        random, reference = Random(seed), toy_blocks(0, 4, 1)
        async with swarm.chain(0, 1) as chain:
            swarm.nodes[0].service.stop_accepting(5.0)
            for position in range(40):
                sent = make_tensor(random, 1, 1)
                received = await chain.step(sent, position, output_tokens=1)
                assert bytes(received.data) == reference.step(bytes(sent.data), 1, position)
                await asyncio.sleep(0.1)
            assert chain.plan.hops[0].peer_id == swarm.nodes[0].peer.peer_id
            swarm.network.crash(swarm.nodes[0].peer.peer_id)
            sent = make_tensor(random, 1, 1)
            received = await chain.step(sent, 40, output_tokens=1)
            assert bytes(received.data) == reference.step(bytes(sent.data), 1, 40)
        await swarm.assert_nothing_left()

    virtual_time.run(main())
    assert next(numbers) > 2
