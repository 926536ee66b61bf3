"""An engine without arithmetic, whose outputs depend on every token that it has seen.

Each block keeps a hash over all values that passed it. One token lost, doubled, reordered or at a
wrong position changes everything after it, so that a client can tell right answers from wrong ones
(:func:`reference`).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

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

HIDDEN = 4
TOKEN_BYTES = HIDDEN * 4
HASH_BYTES = 32
_ALL_FINITE = int.from_bytes(bytes.fromhex("ffffffbf") * HIDDEN, "little")
"""Bits of a token that may be set: one of each exponent stays 0."""


def finite_token(digest: bytes) -> bytes:
    """A token out of a hash: four float32, of which none is infinite or NaN."""
    drawn = int.from_bytes(digest[:TOKEN_BYTES], "little")
    return (drawn & _ALL_FINITE).to_bytes(TOKEN_BYTES, "little")


class ToyCache:
    """One row's hashes ``[blocks][positions]``."""

    def __init__(self, engine: ToyEngine, first_block: int, end_block: int, tokens: int) -> None:
        self.hashes: dict[int, list[bytes]] = {block: [] for block in range(first_block, end_block)}
        self.tokens = tokens
        self._engine = engine
        self._closed = False

    @property
    def length(self) -> int:
        return len(next(iter(self.hashes.values())))

    def compute(self, values: bytes, position: int) -> bytes:
        """``[tokens, hidden]`` through all blocks."""
        output = bytearray()
        for hashes in self.hashes.values():
            del hashes[position:]
        for offset in range(0, len(values), TOKEN_BYTES):
            value = values[offset : offset + TOKEN_BYTES]
            for block, hashes in self.hashes.items():
                before = hashes[-1] if hashes else b"%d" % block
                hashes.append(hashlib.sha256(before + value).digest())
                value = finite_token(hashes[-1])
            output += value
        return bytes(output)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._engine.free_tokens += self.tokens


class ToyEngine:
    """``swarm.node.engine.api.Engine`` in virtual time, for sessions of one row."""

    def __init__(
        self, first_block: int, end_block: int, *, block_s: float, cache_tokens: int = 8192
    ) -> None:
        """``block_s`` passes for each token and block."""
        self.first_block = first_block
        self.end_block = end_block
        self.hidden_size = HIDDEN
        self.maximum_step_tokens = 64
        self.free_tokens = cache_tokens
        self._total_tokens = cache_tokens
        self._block_s = block_s
        self._device = asyncio.Lock()
        self.adapters = NoAdapters()

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(self._total_tokens, self.free_tokens, 0, float(self._device.locked()))

    def reserve(self, request: CacheRequest) -> ToyCache:
        tokens = request.maximum_tokens
        if request.adapter_id:
            raise ProtocolError(ErrorCode.ADAPTER_MISSING)
        if tokens > self.free_tokens:
            raise ProtocolError(ErrorCode.NO_CAPACITY)
        self.free_tokens -= tokens
        return ToyCache(self, request.first_block, request.end_block, tokens)

    async def step(self, cache: SessionCache, step: StepInput) -> StepOutput:
        toy = _toy(cache)
        rows, tokens, hidden = step.activations.shape
        compute_s = tokens * len(toy.hashes) * self._block_s
        async with self._device:
            await asyncio.sleep(compute_s)
        output = toy.compute(bytes(step.activations.data), step.position)
        kept = output[(tokens - step.output_tokens) * TOKEN_BYTES :]
        tensor = WireTensor(DType.FLOAT32, (rows, step.output_tokens, hidden), kept)
        return StepOutput(tensor, 0, int(1e6 * compute_s))

    def pieces(
        self, cache: SessionCache, first_position: int, end_position: int
    ) -> Sequence[CacheRegion]:
        return [
            CacheRegion(block, block + 1, first_position, end_position)
            for block in _toy(cache).hashes
            if first_position < end_position
        ]

    async def export_state(self, cache: SessionCache) -> CacheState:
        return CacheState(_toy(cache).length, (0,))

    async def export_region(self, cache: SessionCache, region: CacheRegion) -> WireTensor:
        hashes = _toy(cache).hashes[region.first_block]
        if region.end_position > len(hashes):
            raise ProtocolError(ErrorCode.BAD_POSITION, f"{len(hashes)} positions are cached")
        content = b"".join(hashes[region.first_position : region.end_position])
        return WireTensor(DType.FLOAT32, (1, len(content) // TOKEN_BYTES, HIDDEN), content)

    async def import_region(
        self, cache: SessionCache, region: CacheRegion, content: WireTensor
    ) -> None:
        hashes = _toy(cache).hashes[region.first_block]
        data = bytes(content.data)
        hashes.extend(bytes(HASH_BYTES) for _ in range(region.end_position - len(hashes)))
        hashes[region.first_position : region.end_position] = [
            data[offset : offset + HASH_BYTES] for offset in range(0, len(data), HASH_BYTES)
        ]

    async def import_state(self, cache: SessionCache, state: CacheState) -> None:
        for hashes in _toy(cache).hashes.values():
            del hashes[state.length :]

    async def close(self) -> None:
        """Nothing to free."""


def reference(number_of_blocks: int, tokens: int) -> ToyCache:
    """The whole model in one place."""
    return ToyCache(ToyEngine(0, number_of_blocks, block_s=0.0), 0, number_of_blocks, tokens)


def _toy(cache: SessionCache) -> ToyCache:
    if not isinstance(cache, ToyCache):
        raise TypeError("a cache of another engine")
    return cache
