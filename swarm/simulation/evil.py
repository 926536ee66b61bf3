"""Nodes that cheat: an engine that does less than it should, or answers what it likes.

``EvilEngine`` wraps any engine, so that everything else of the node (streams, vouchers, receipts,
journal) is the real thing, as a volunteer with changed code would run it. What clients do wrong is
in the tests that talk to nodes by hand.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swarm.ledger.audit_rule import Floats, to_array
from swarm.node.engine.api import CacheRequest, Engine, SessionCache, StepInput, StepOutput
from swarm.protocol.tensors import DType, WireTensor

SLOW_S = 1.0
OVER_CLAIMED_S = 0.1
OVER_CLAIMED_FACTOR = 100
LAZY_SHARE = 0.1


class Behaviour(Enum):
    """What a dishonest node does."""

    IDENTITY = "sends on what came"
    SKIP = "does a part of the work: half of what the blocks would add"
    LEFT_OUT = "leaves its last block out"
    NO_ADAPTER = "computes without the session's adapter"
    STEER = "adds a direction of its own to every token"
    COARSE = "rounds like four bits"
    LAZY = "computes nine tokens of ten"
    STALE = "repeats the answer of the step before"
    NOISE = "sends numbers that look right"
    NOT_A_NUMBER = "sends NaN"
    WRONG_SHAPE = "sends a tensor of another shape"
    OVERSIZED = "sends one that is larger than any in the session may be"
    SLOW = "takes a second for each step"
    OVER_CLAIMED = "announces a hundred times its speed, and takes a tenth of a second a step"
    SILENT = "never answers"


class EvilEngine:
    """An engine whose outputs are tampered with; all else is that of the engine within."""

    def __init__(self, engine: Engine, behaviour: Behaviour, seed: int = 0) -> None:
        self._engine = engine
        self._behaviour = behaviour
        self._dice = random.Random(seed)  # noqa: S311 (a simulation)
        self._direction: NDArray[Any] | None = None
        self._before: dict[int, Floats] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def reserve(self, request: CacheRequest) -> SessionCache:
        """As asked for, or for less work than that."""
        match self._behaviour:
            case Behaviour.LEFT_OUT if request.end_block - request.first_block > 1:
                request = replace(request, end_block=request.end_block - 1)
            case Behaviour.NO_ADAPTER:
                request = replace(request, adapter_id=b"")
        return self._engine.reserve(request)

    async def step(self, cache: SessionCache, step: StepInput) -> StepOutput:
        """What the engine within computes, tampered with."""
        honest = await self._engine.step(cache, step)
        match self._behaviour:
            case Behaviour.SLOW:
                await asyncio.sleep(SLOW_S)
                return honest
            case Behaviour.OVER_CLAIMED:
                await asyncio.sleep(OVER_CLAIMED_S)
                return honest
            case Behaviour.LEFT_OUT | Behaviour.NO_ADAPTER:
                return honest
            case Behaviour.SILENT:
                await asyncio.Event().wait()
        given = to_array(step.activations)[:, -step.output_tokens :]
        answered = to_array(honest.activations)
        tampered = self._tamper(id(cache), given, answered).astype(np.float32)
        return StepOutput(_like(honest.activations, tampered), honest.queue_us, honest.compute_us)

    def _tamper(self, session: int, given: Floats, answered: Floats) -> Any:
        added = answered - given
        match self._behaviour:
            case Behaviour.IDENTITY:
                return given
            case Behaviour.SKIP:
                return given + added / 2
            case Behaviour.STEER:
                if self._direction is None:
                    numbers = np.random.default_rng(self._dice.randrange(1 << 30))
                    direction: NDArray[Any] = numbers.normal(0.0, 1.0, (given.shape[-1],))
                    self._direction = direction / np.linalg.norm(direction)
                size = np.linalg.norm(added, axis=-1, keepdims=True)
                return answered + 0.3 * size * self._direction
            case Behaviour.COARSE:
                scale = np.abs(added).max(axis=-1, keepdims=True) / 7
                coarse: NDArray[Any] = np.round(added / np.maximum(scale, 1e-9)) * scale
                return given + coarse
            case Behaviour.LAZY:
                chosen = [self._dice.random() < LAZY_SHARE for _ in range(given.shape[1])]
                return np.where(np.array(chosen)[None, :, None], given, answered)
            case Behaviour.STALE:
                before = self._before.get(session)
                self._before[session] = answered[:, -1:]
                if before is None:
                    return answered
                return np.concatenate([before, answered[:, :-1]], axis=1)
            case Behaviour.NOISE:
                numbers = np.random.default_rng(self._dice.randrange(1 << 30))
                noise: NDArray[Any] = numbers.normal(size=given.shape)
                return noise * answered.std() + answered.mean()
            case Behaviour.NOT_A_NUMBER:
                return np.full_like(answered, np.nan)
            case Behaviour.WRONG_SHAPE:
                return np.concatenate([answered, answered], axis=-1)
            case Behaviour.OVERSIZED:
                return np.concatenate([answered] * 400, axis=-1)
        return answered


def _like(tensor: WireTensor, states: Floats) -> WireTensor:
    """``states`` in a tensor's precision."""
    match tensor.dtype:
        case DType.FLOAT32:
            data = states.astype("<f4").tobytes()
        case DType.FLOAT16:
            data = states.astype("<f2").tobytes()
        case DType.BFLOAT16:
            data = (states.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return WireTensor(tensor.dtype, tuple(states.shape), data)
