"""An engine with a little arithmetic: blocks that add to their inputs, as a transformer's do.

For simulations in which results are compared by size of error, where ``toy_engine`` compares bits.
Every block mixes each position with all before it: one wrong token disturbs all that follow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from swarm.ledger.audit_rule import Floats, to_array
from swarm.node.engine.api import (
    CacheRegion,
    CacheRequest,
    CacheState,
    EngineLoad,
    NoAdapters,
    SessionCache,
    StepInput,
    StepOutput,
)
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.tensors import DType, WireTensor

NUMERIC_HIDDEN = 32


class NumericBlocks:
    """Blocks ``[first, end)`` with what they have seen; ``[rows, tokens, hidden]`` in and out."""

    def __init__(self, first_block: int, end_block: int, seed: int = 0) -> None:
        self.weights = {
            block: np.random.default_rng([seed, block])
            .normal(0.0, 1.5 / np.sqrt(NUMERIC_HIDDEN), (NUMERIC_HIDDEN, NUMERIC_HIDDEN))
            .astype(np.float32)
            for block in range(first_block, end_block)
        }
        self._seen: dict[int, list[Floats]] = {block: [] for block in self.weights}

    @property
    def length(self) -> int:
        return min(map(len, self._seen.values()), default=0)

    def compute(self, states: Floats, position: int) -> Floats:
        """Cut at ``position`` and go on from there."""
        for block, weights in self.weights.items():
            seen = self._seen[block]
            del seen[position:]
            outputs = []
            for index in range(states.shape[1]):
                state = states[:, index]
                total = state if not seen else seen[-1] + state
                seen.append(total)
                mixed = state + total / len(seen)
                outputs.append(state + np.tanh(mixed @ weights))
            states = np.stack(outputs, axis=1)
        return states.astype(np.float32)


class NumericCache:
    """One session's blocks."""

    def __init__(self, engine: NumericEngine, blocks: NumericBlocks, tokens: int) -> None:
        self.blocks = blocks
        self._engine = engine
        self._tokens = tokens
        self._is_closed = False

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._engine.free_tokens += self._tokens


class NumericEngine:
    """``swarm.node.engine.api.Engine`` over :class:`NumericBlocks`, float32 on the wire."""

    def __init__(
        self, first_block: int, end_block: int, *, step_s: float = 0.001, seed: int = 0
    ) -> None:
        """``seed`` names the model; ``step_s`` passes for each step."""
        self.first_block = first_block
        self.end_block = end_block
        self.hidden_size = NUMERIC_HIDDEN
        self.maximum_step_tokens = 64
        self.free_tokens = self._total = 1 << 16
        self.adapters = NoAdapters()
        self._step_s = step_s
        self._seed = seed

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(self._total, self.free_tokens, 0, 0.0)

    def reserve(self, request: CacheRequest) -> NumericCache:
        tokens = request.rows * request.maximum_tokens
        if tokens > self.free_tokens:
            raise ProtocolError(ErrorCode.NO_CAPACITY)
        self.free_tokens -= tokens
        blocks = self.blocks(request.first_block, request.end_block)
        return NumericCache(self, blocks, tokens)

    def blocks(self, first_block: int, end_block: int) -> NumericBlocks:
        """What a session computes with."""
        return NumericBlocks(first_block, end_block, self._seed)

    async def step(self, cache: SessionCache, step: StepInput) -> StepOutput:
        await asyncio.sleep(self._step_s)
        if not isinstance(cache, NumericCache):
            raise ProtocolError(ErrorCode.INTERNAL)
        states = to_array(step.activations)
        if not np.isfinite(states).all():
            raise ProtocolError(ErrorCode.INPUT_NOT_FINITE)
        output = cache.blocks.compute(states, step.position)[:, -step.output_tokens :]
        return StepOutput(from_array(output), 0, int(self._step_s * 1e6))

    def pieces(
        self, cache: SessionCache, first_position: int, end_position: int
    ) -> Sequence[CacheRegion]:
        return ()

    async def export_state(self, cache: SessionCache) -> CacheState:
        raise ProtocolError(ErrorCode.INTERNAL, "state of this engine does not move")

    async def export_region(self, cache: SessionCache, region: CacheRegion) -> WireTensor:
        raise ProtocolError(ErrorCode.INTERNAL, "state of this engine does not move")

    async def import_region(
        self, cache: SessionCache, region: CacheRegion, content: WireTensor
    ) -> None:
        raise ProtocolError(ErrorCode.INTERNAL, "state of this engine does not move")

    async def import_state(self, cache: SessionCache, state: CacheState) -> None:
        raise ProtocolError(ErrorCode.INTERNAL, "state of this engine does not move")

    async def close(self) -> None:
        return None


def from_array(states: Floats) -> WireTensor:
    """``[rows, tokens, hidden]`` as float32."""
    data = np.ascontiguousarray(states, dtype="<f4").tobytes()
    return WireTensor(DType.FLOAT32, tuple(states.shape), data)
