"""One training session against peers that do what they should not, and its fair share of memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.client.finetune.model import chain_request
from swarm.client.finetune.settings import FinetuneSettings
from swarm.client.link import HopFailed
from swarm.compute.wire_tensors import tensor_to_wire
from swarm.connection import Connection
from swarm.ledger.transcript import tensor_hash
from swarm.node.engine.training import SpanTrainingSession
from swarm.protocol.errors import ErrorCode, RemoteError
from swarm.protocol.identity import Identity
from swarm.protocol.messages import (
    MAX_PAYLOAD_BYTES,
    ApplyGradients,
    AskGradientNorm,
    AskState,
    Attach,
    BackwardPart,
    CloseSession,
    ForwardPart,
    GradientNorm,
    GradientsApplied,
    Message,
    MicroBatchDone,
    OpenTraining,
    RouteReady,
    SessionClosed,
    SetRoute,
    ShowMicroBatch,
    ShownPart,
    StateEnd,
    StatePart,
    TrainingOpened,
)
from swarm.protocol.tensors import DType, WireTensor
from swarm.protocol.version import STREAM_PROTOCOL
from swarm.training_parts import HandledMicroBatch, state_hash
from tests.training_swarm import TrainingSwarm, save_tiny_model, training_swarm

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_model(path, blocks=2)
    return path


def opening(swarm: TrainingSwarm, **changes: Any) -> OpenTraining:
    message = OpenTraining(
        model_revision=swarm.checkpoint.revision,
        first_block=0,
        end_block=2,
        wire_dtype=int(DType.FLOAT32),
        previous_peer=swarm.client.peer_id,
        maximum_tokens=16,
        micro_batches_in_flight=2,
        method=1,
        optimizer=1,
        rank=2,
        alpha=4.0,
        target_modules=("q_proj",),
    )
    return replace(message, **changes)


def forward(number: int, tokens: int = 4, value: float = 0.1, **changes: Any) -> ForwardPart:
    wire = tensor_to_wire(torch.full((1, tokens, 32), value), DType.FLOAT32)
    part = ForwardPart(micro_batch=number, lengths=(tokens,), first_token=0, activations=wire)
    return replace(part, **changes)


def backward(number: int, tokens: int = 4) -> BackwardPart:
    wire = tensor_to_wire(torch.full((1, tokens, 32), 0.1), DType.FLOAT32)
    return BackwardPart(micro_batch=number, first_token=0, gradients=wire)


@asynccontextmanager
async def session(swarm: TrainingSwarm, message: OpenTraining) -> AsyncIterator[Connection]:
    """An open session of one hop whose next is the client; closed and freed afterwards."""
    node = swarm.nodes[0].peer.peer_id
    stream = await swarm.client.open(node, STREAM_PROTOCOL)
    async with Connection(stream) as connection:
        await connection.say_hello(message)
        await connection.receive_only(TrainingOpened)
        connection.maximum_payload_bytes = MAX_PAYLOAD_BYTES
        await connection.send(SetRoute(route_version=1))
        await connection.receive_only(RouteReady)
        yield connection
        await connection.send(CloseSession())
        await connection.receive_only(SessionClosed)


async def refusal(connection: Connection, *messages: Message) -> ErrorCode:
    await connection.send(*messages)
    with pytest.raises(RemoteError) as refused:
        await connection.receive_only(SessionClosed)
    return refused.value.code


async def test_mistakes_change_nothing(folder: Path) -> None:
    """Each is refused with its code; the session goes on, and its next step is right."""
    async with training_swarm(folder, [(0, 2)]) as swarm, session(swarm, opening(swarm)) as stream:
        await stream.send(forward(5))
        await stream.receive_only(ForwardPart)
        wrong: list[tuple[Message, ErrorCode]] = [
            (forward(5), ErrorCode.BAD_STEP),
            (forward(6, lengths=(4, 0)), ErrorCode.BAD_FIELD),
            (forward(6, lengths=(17,)), ErrorCode.TOO_LARGE),
            (forward(6, first_token=1), ErrorCode.GAP),
        ]
        for message, code in wrong:
            assert await refusal(stream, message) is code
            if code is ErrorCode.GAP:  # it has begun, and is finished now
                await stream.send(forward(6))
                await stream.receive_only(ForwardPart)
        more: list[tuple[Message, ErrorCode]] = [
            (forward(7), ErrorCode.TOO_MANY_STEPS),
            (backward(4), ErrorCode.UNKNOWN_MICRO_BATCH),
            (AskGradientNorm(step=1, micro_batches=2), ErrorCode.WRONG_OPTIMIZER_STEP),
            (ApplyGradients(step=1, scale=1.0, learning_rate=0.1), ErrorCode.WRONG_OPTIMIZER_STEP),
            (SetRoute(route_version=2), ErrorCode.UNEXPECTED_MESSAGE),
            (StateEnd(step=0, tensors=3), ErrorCode.BAD_STATE),
        ]
        for message, code in more:
            assert await refusal(stream, message) is code
        for number in (5, 6):
            await stream.send(backward(number))
            await stream.receive_only(BackwardPart)
        assert (
            await refusal(stream, AskGradientNorm(step=1, micro_batches=1))
            is ErrorCode.WRONG_OPTIMIZER_STEP
        )
        await stream.send(AskGradientNorm(step=1, micro_batches=2))
        assert (await stream.receive_only(GradientNorm)).square_sum > 0
        for _ in range(2):  # the second is answered and not applied
            await stream.send(ApplyGradients(step=1, scale=1.0, learning_rate=0.1))
            await stream.receive_only(GradientsApplied)
        await stream.send(AskState(step=1))
        steps = set()
        while not isinstance(message := await stream.receive(), StateEnd):
            assert isinstance(message, StatePart)
            if message.name.endswith("#step"):
                steps.add(memoryview(bytes(message.values.data)).cast("f")[0])
        assert steps == {1.0}


async def shown(stream: Connection, number: int) -> list[ShownPart]:
    await stream.send(ShowMicroBatch(micro_batch=number))
    return [await stream.receive_only(ShownPart) for _ in range(4)]


async def state_of(stream: Connection, step: int) -> dict[str, WireTensor]:
    await stream.send(AskState(step=step))
    tensors = {}
    while not isinstance(message := await stream.receive(), StateEnd):
        assert isinstance(message, StatePart)
        tensors[message.name] = message.values
    assert message.step == step
    return tensors


async def test_an_audited_session_says_and_shows_what_it_handled(folder: Path) -> None:
    """Of the latest micro-batches of the last step, and its states before and after it."""
    async with training_swarm(folder, [(0, 2)]) as swarm:
        asked = opening(swarm, audited_micro_batches=2)
        async with session(swarm, asked) as stream:
            said = {}
            for number in (1, 2, 3):
                await stream.send(forward(number, value=number / 10))
                output = await stream.receive_only(ForwardPart)
                await stream.send(backward(number))
                gradient = await stream.receive_only(BackwardPart)
                done = said[number] = await stream.receive_only(MicroBatchDone)
                assert done.activations_out == tensor_hash(output.activations)
                assert done.gradients_out == tensor_hash(gradient.gradients)
            before = await state_of(stream, 0)
            await stream.send(ApplyGradients(step=1, scale=1.0, learning_rate=0.1))
            applied = await stream.receive_only(GradientsApplied)
            after = await state_of(stream, 1)
            assert state_hash(after) == applied.state_hash != state_hash(before)
            assert state_hash(await state_of(stream, 0)) == state_hash(before)
            unknown = ErrorCode.UNKNOWN_MICRO_BATCH
            assert await refusal(stream, ShowMicroBatch(micro_batch=1)) is unknown  # too old
            for number in (2, 3):
                tensors = [part.values for part in await shown(stream, number)]
                assert HandledMicroBatch(*tensors).done(number) == said[number]
            await stream.send(forward(4))
            await stream.receive_only(ForwardPart)
            assert await refusal(stream, ShowMicroBatch(micro_batch=3)) is unknown
            assert await refusal(stream, ShowMicroBatch(micro_batch=4)) is unknown
            wrong_step = ErrorCode.WRONG_OPTIMIZER_STEP
            assert await refusal(stream, AskState(step=2)) is wrong_step


async def test_who_asks_for_no_audits_is_told_nothing(folder: Path) -> None:
    async with training_swarm(folder, [(0, 2)]) as swarm, session(swarm, opening(swarm)) as stream:
        await stream.send(forward(1))
        await stream.receive_only(ForwardPart)
        await stream.send(backward(1))
        await stream.receive_only(BackwardPart)
        await stream.send(ApplyGradients(step=1, scale=1.0, learning_rate=0.1))
        assert (await stream.receive_only(GradientsApplied)).state_hash == b""
        unknown = ErrorCode.UNKNOWN_MICRO_BATCH
        assert await refusal(stream, ShowMicroBatch(micro_batch=1)) is unknown
        wrong_step = ErrorCode.WRONG_OPTIMIZER_STEP
        assert await refusal(stream, AskState(step=0)) is wrong_step


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
async def test_activations_that_are_none_end_the_session(folder: Path, value: float) -> None:
    async with training_swarm(folder, [(0, 2)]) as swarm:
        with pytest.raises(Exception, match=r"not finite|closed|ended|gone"):
            async with session(swarm, opening(swarm)) as stream:
                assert await refusal(stream, forward(1, value=value)) is ErrorCode.INPUT_NOT_FINITE
        async with session(swarm, opening(swarm)) as stream:  # the node is as before
            await stream.send(forward(1))
            await stream.receive_only(ForwardPart)


@pytest.mark.parametrize("spoilt", ["outputs", "gradients"])
async def test_a_client_takes_no_results_that_are_no_numbers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    honest = SpanTrainingSession._sent
    answers = 0

    def answer(session: SpanTrainingSession, tensor: torch.Tensor) -> WireTensor:
        nonlocal answers
        answers += 1
        if answers == (1 if spoilt == "outputs" else 2):
            return tensor_to_wire(torch.full_like(tensor, float("nan")), DType.FLOAT32)
        return honest(session, tensor)

    monkeypatch.setattr(SpanTrainingSession, "_sent", answer)
    async with training_swarm(folder, [(0, 2)]) as swarm:
        settings = FinetuneSettings(rank=2)
        chain = await swarm.open_chain(chain_request(swarm.base, settings, maximum_tokens=16))
        wire = tensor_to_wire(torch.full((1, 4, 32), 0.1), DType.FLOAT32)
        with pytest.raises(HopFailed) as failed:
            await chain.forward(1, (4,), wire)
            assert answers == 1
            await chain.backward(1, wire)
        assert failed.value.code is ErrorCode.NOT_FINITE
        assert answers == (1 if spoilt == "outputs" else 2)


async def test_terms_that_make_no_sense_are_refused(folder: Path) -> None:
    async with training_swarm(folder, [(0, 2)]) as swarm:
        for changes, code in (
            ({"model_revision": bytes(32)}, ErrorCode.UNKNOWN_MODEL),
            ({"end_block": 3}, ErrorCode.BLOCKS_NOT_HOSTED),
            ({"method": 9}, ErrorCode.BAD_FIELD),
            ({"rank": 0}, ErrorCode.BAD_FIELD),
            ({"optimizer": 0}, ErrorCode.BAD_FIELD),
            ({"dropout": 1.0}, ErrorCode.BAD_FIELD),
            ({"maximum_tokens": 0}, ErrorCode.TOO_LARGE),
            ({"maximum_tokens": 1 << 20}, ErrorCode.TOO_LARGE),
            ({"wire_dtype": 77}, ErrorCode.UNSUPPORTED_DTYPE),
            ({"maximum_tokens": 1 << 16, "micro_batches_in_flight": 64}, ErrorCode.NO_CAPACITY),
        ):
            with pytest.raises(RemoteError) as refused:
                async with session(swarm, opening(swarm, **changes)):
                    pass
            assert refused.value.code is code


async def test_nobody_else_can_take_part(folder: Path) -> None:
    """A stranger neither attaches to a session nor sends into it."""
    async with training_swarm(folder, [(0, 2)]) as swarm:
        node = swarm.nodes[0].peer.peer_id
        stranger = swarm.network.join(Identity.generate())
        stream = await swarm.client.open(node, STREAM_PROTOCOL)
        async with Connection(stream) as connection:
            await connection.say_hello(opening(swarm))
            opened = await connection.receive_only(TrainingOpened)
            async with Connection(await stranger.open(node, STREAM_PROTOCOL)) as other:
                attach = Attach(session_id=opened.session_id, route_version=1)
                await other.say_hello(attach)
                with pytest.raises(RemoteError) as refused:
                    await other.receive_only(RouteReady)
                assert refused.value.code is ErrorCode.NOT_NAMED_BY_SESSION
