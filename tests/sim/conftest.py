"""A toy engine and a small swarm in memory, for tests of everything but the arithmetic.

In the toy model each output depends on every cached entry of its block and row, through SHA-256:
one token lost, doubled, reordered or at a wrong position changes all that follow.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from swarm.node.engine.api import CacheRequest, EngineLoad, StepInput, StepOutput
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.tensors import DType, WireTensor

HIDDEN = 4
TOKEN_BYTES = HIDDEN * 4


class ToyBlocks:
    """Blocks ``[first, end)`` and their caches for some rows: the reference and the engine's core."""

    def __init__(self, first: int, end: int, rows: int) -> None:
        self._blocks = range(first, end)
        self._cache = {(block, row): [] for block in self._blocks for row in range(rows)}
        self._rows = rows
        self._cache: dict[tuple[int, int], list[bytes]]

    def step(
        self, data: bytes, tokens: int, position: int, row_order: Sequence[int] = ()
    ) -> bytes:
        """Bytes of ``[rows, tokens, hidden]`` through all blocks."""
        for entries in self._cache.values():
            del entries[position:]
        if row_order:
            self._cache = {
                (block, row): list(self._cache[block, row_order[row]])
                for block, row in self._cache
            }
        output = bytearray()
        for row in range(self._rows):
            for token in range(tokens):
                offset = (row * tokens + token) * TOKEN_BYTES
                value = bytes(data[offset : offset + TOKEN_BYTES])
                for block in self._blocks:
                    entries = self._cache[block, row]
                    entries.append(value)
                    digest = hashlib.sha256(b"%d" % block)
                    for entry in entries:
                        digest.update(entry)
                    value = digest.digest()[:TOKEN_BYTES]
                output += value
        return bytes(output)


@dataclass
class ToyCache:
    blocks: ToyBlocks
    tokens: int
    engine: ToyEngine
    closed: bool = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.engine.free_tokens += self.tokens


@dataclass
class ToyEngine:
    """Implements ``swarm.node.engine.api.Engine`` in virtual time."""

    first_block: int
    end_block: int
    total_tokens: int = 4096
    step_s: float = 0.001
    maximum_step_tokens: int = 8
    hidden_size: int = HIDDEN
    free_tokens: int = field(init=False)
    fail_next: Exception | None = None

    def __post_init__(self) -> None:
        self.free_tokens = self.total_tokens

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(self.total_tokens, self.free_tokens, 0, 0.0)

    def reserve(self, request: CacheRequest) -> ToyCache:
        tokens = request.rows * request.maximum_tokens
        if tokens > self.free_tokens:
            raise ProtocolError(ErrorCode.NO_CAPACITY)
        self.free_tokens -= tokens
        blocks = ToyBlocks(request.first_block, request.end_block, request.rows)
        return ToyCache(blocks, tokens, self)

    async def step(self, cache: ToyCache, step: StepInput) -> StepOutput:
        await asyncio.sleep(self.step_s)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        rows, tokens, hidden = step.activations.shape
        output = cache.blocks.step(
            bytes(step.activations.data), tokens, step.position, step.row_order
        )
        kept = b"".join(
            output[
                ((row + 1) * tokens - step.output_tokens) * TOKEN_BYTES : (row + 1)
                * tokens
                * TOKEN_BYTES
            ]
            for row in range(rows)
        )
        return StepOutput(
            WireTensor(DType.FLOAT32, (rows, step.output_tokens, hidden), kept), 10, 20
        )

    async def close(self) -> None:
        return None


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> Iterator[int]:
    yield int(getattr(request, "param", 1))
