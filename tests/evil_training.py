"""Nodes that cheat in trainings: real sessions of which something is done otherwise.

Everything else of the node is the real thing, as a volunteer with changed code would run it.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Any

import numpy as np

from swarm.compute.lora import LORA_B
from swarm.ledger.audit_rule import to_array
from swarm.node.engine.training import SpanTrainingSession
from swarm.node.engine.training_api import TrainingRequest
from swarm.node.training_hop import TrainingHop
from swarm.node.training_record import TrainingRecord
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.messages import MicroBatchDone
from swarm.protocol.tensors import DType, WireTensor
from swarm.training_parts import HandledMicroBatch


class Cheat(Enum):
    """What a dishonest node does."""

    SKIP = "leaves its last block out, forward and backward"
    HALF = "adds half of what the blocks add"
    PASSED_ON = "sends on the gradient that it was given"
    ZERO = "sends zeros as a gradient"
    STALE = "sends the gradient of the micro-batch before"
    UNTRAINED = "keeps its adapter as it is, and its moments up to date"
    UNTAUGHT = "steps as if it had no gradient"
    REVERSED = "trains against the gradient"
    POISON = "begins with an adapter that is not the seed's"
    NORM = "says that its gradient is three times as long"
    LIE = "says that it handled something else"
    SHOW_OTHER = "shows something else than it said"
    HIDE = "does not show what it handled"
    VANISH = "ends the session when it is asked to show"


class EvilTraining:
    """How one node cheats, and from which of its steps on."""

    def __init__(self, cheat: Cheat, *, after_steps: int = 0) -> None:
        self.cheat = cheat
        self.after_steps = after_steps

    def engine(self, engine: Any) -> Any:
        return _Engine(engine, self)


class _Engine:
    def __init__(self, engine: Any, evil: EvilTraining) -> None:
        self._engine = engine
        self._evil = evil

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def open_training(self, request: TrainingRequest) -> Any:
        session = await self._engine.open_training(request)
        assert isinstance(session, SpanTrainingSession)
        return EvilSession(session, self._evil, request)


class EvilSession:
    """A session that is tampered with; all else is that of the session within."""

    def __init__(
        self, session: SpanTrainingSession, evil: EvilTraining, request: TrainingRequest
    ) -> None:
        self._session = session
        self._evil = evil
        self._steps = 0
        self._before: np.ndarray[Any, Any] | None = None
        if evil.cheat is Cheat.POISON:
            for name, parameter in session._shard.parameters().items():
                if name.endswith(LORA_B):
                    parameter.data += 0.01
        if evil.cheat is Cheat.SKIP:
            trainable: Any = session._trainable
            session._trainable = _Skipping(trainable, request.end_block - 1)  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    @property
    def cheat(self) -> Cheat | None:
        """What it does now."""
        return self._evil.cheat if self._steps >= self._evil.after_steps else None

    async def forward(self, micro_batch: Any, activations: WireTensor) -> WireTensor:
        honest = await self._session.forward(micro_batch, activations)
        if self.cheat is not Cheat.HALF:
            return honest
        given = to_array(activations)
        return _like(honest, given + (to_array(honest) - given) / 2)

    async def backward(self, number: int, gradients: WireTensor) -> WireTensor:
        honest = await self._session.backward(number, gradients)
        match self.cheat:
            case Cheat.PASSED_ON:
                return gradients
            case Cheat.ZERO:
                return _like(honest, np.zeros_like(to_array(honest)))
            case Cheat.STALE:
                own = to_array(honest)
                before, self._before = self._before, own
                if before is None:
                    return honest
                return _like(honest, np.resize(before, own.shape))
        return honest

    async def gradient_square_sum(self) -> float:
        honest = await self._session.gradient_square_sum()
        return honest * 9 if self.cheat is Cheat.NORM else honest

    async def apply(self, scale: float, learning_rate: float) -> None:
        match self.cheat:
            case Cheat.UNTRAINED:
                learning_rate = 0.0
            case Cheat.UNTAUGHT:
                scale = 0.0
            case Cheat.REVERSED:
                scale = -scale
        await self._session.apply(scale, learning_rate)
        self._steps += 1


class _Skipping:
    """Blocks of which one only passes on what it gets."""

    def __init__(self, trainable: Any, skipped: int) -> None:
        self._trainable = trainable
        self._skipped = skipped

    def forward(self, block: int, hidden: Any, *further: Any) -> Any:
        if block == self._skipped:
            return hidden * 1
        return self._trainable.forward(block, hidden, *further)


class EvilRecord(TrainingRecord):
    """Says or shows something else than what was handled."""

    def __init__(self, micro_batches: int, session: EvilSession) -> None:
        super().__init__(micro_batches)
        self._session = session

    async def returned(self, number: int, given: WireTensor, sent: WireTensor) -> MicroBatchDone:
        done = await super().returned(number, given, sent)
        return replace(done, activations_in=bytes(32)) if self._does(Cheat.LIE) else done

    def shown(self, number: int) -> HandledMicroBatch:
        honest = super().shown(number)
        if self._does(Cheat.SHOW_OTHER):
            return replace(honest, activations_out=honest.activations_in)
        if self._does(Cheat.HIDE):
            raise ProtocolError(ErrorCode.UNKNOWN_MICRO_BATCH)
        if self._does(Cheat.VANISH):
            raise ConnectionError("gone")
        return honest

    def _does(self, cheat: Cheat) -> bool:
        return self._session.cheat is cheat


class EvilHop(TrainingHop):
    """A hop whose record is that of its session, if that one cheats."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        session = given["session"]
        if isinstance(session, EvilSession):
            self._record = EvilRecord(given["request"].audited_micro_batches, session)


def _like(tensor: WireTensor, values: Any) -> WireTensor:
    assert tensor.dtype is DType.FLOAT32
    return WireTensor(DType.FLOAT32, tensor.shape, values.astype("<f4").tobytes())
