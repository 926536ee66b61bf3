"""Key-value caches of sessions: reserved whole on admission, written in place, never evicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from swarm.compute.wire_tensors import WIRE_DTYPES, tensor_from_wire, tensor_to_wire
from swarm.node.engine.adapted_layers import LoadedAdapter
from swarm.node.engine.api import CacheRegion, CacheRequest, CacheState
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.tensors import WireTensor

PIECE_BYTES = 256 * 1024
"""How much of a cache is moved at a time: copied in a fraction of a millisecond."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one token of one row costs in one block: keys and values ``[kv_heads, head_dim]``."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_block_token(self) -> int:
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


class CacheBudget:
    """Admission by bytes: the sum of all reservations never exceeds ``total_bytes``."""

    def __init__(self, total_bytes: int, bytes_per_block_token: int, number_of_blocks: int) -> None:
        self.total_bytes = total_bytes
        self.reserved_bytes = 0
        self._bytes_per_block_token = bytes_per_block_token
        self._bytes_per_token = bytes_per_block_token * number_of_blocks

    @property
    def tokens_total(self) -> int:
        """Tokens of one row for which the whole span has room."""
        return self.total_bytes // self._bytes_per_token

    @property
    def tokens_free(self) -> int:
        return (self.total_bytes - self.reserved_bytes) // self._bytes_per_token

    def admit(self, rows: int, maximum_tokens: int, blocks: int) -> int:
        """Reserve and return the bytes, or raise ProtocolError(NO_CAPACITY)."""
        return self.admit_bytes(rows * maximum_tokens * blocks * self._bytes_per_block_token)

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.reserved_bytes

    def admit_bytes(self, wanted_bytes: int) -> int:
        """The same for something other than a cache."""
        if wanted_bytes > self.free_bytes:
            raise ProtocolError(
                ErrorCode.NO_CAPACITY,
                f"{wanted_bytes} bytes wanted, {self.free_bytes} free",
            )
        self.reserved_bytes += wanted_bytes
        return wanted_bytes

    def release(self, size_bytes: int) -> None:
        self.reserved_bytes -= size_bytes


class SpanCache:
    """The cache of one session for the blocks it uses.

    ``key_values`` is ``[blocks, rows, 2, kv_heads, maximum_tokens, head_dim]``: keys at index 0 of
    the third axis, values at 1. ``length`` positions are valid; rolling back is lowering it.
    Tensors and length belong to the device thread, ``closed`` and the budget to the event loop.
    """

    def __init__(
        self,
        request: CacheRequest,
        shape: CacheShape,
        device: torch.device,
        budget: CacheBudget,
        *,
        adapter: LoadedAdapter | None = None,
        on_release: Callable[[], None] | None = None,
    ) -> None:
        """Reserve; raises ProtocolError(NO_CAPACITY) before anything is allocated.

        ``adapter`` is what the session computes with; ``on_release`` hears when no step needs it
        any more.
        """
        self.request = request
        self.adapter = adapter
        self._on_release = on_release
        self.length = 0
        self.closed = False
        self.steps_running = 0
        self.padding = request.left_padding or (0,) * request.rows
        self.has_padding = any(self.padding)
        self._budget = budget
        self._position_bytes = request.rows * shape.bytes_per_block_token
        blocks = request.end_block - request.first_block
        self._reserved_bytes = budget.admit(request.rows, request.maximum_tokens, blocks)
        size = (blocks, request.rows, 2, shape.kv_heads, request.maximum_tokens, shape.head_dim)
        try:
            self.key_values = _zeros(size, shape.dtype, device)
        except (MemoryError, RuntimeError) as error:
            budget.release(self._reserved_bytes)
            raise ProtocolError(ErrorCode.NO_CAPACITY, "allocation failed") from error

    def reorder(self, row_order: Sequence[int]) -> None:
        """Row ``i`` becomes what row ``row_order[i]`` was; block by block to bound the copy."""
        used = self.key_values[..., : self.length, :]
        order = torch.tensor(row_order, device=used.device)
        for block in range(used.shape[0]):
            used[block].copy_(used[block].index_select(0, order))
        self.padding = tuple(self.padding[row] for row in row_order)

    def state(self) -> CacheState:
        return CacheState(self.length, tuple(self.padding))

    def pieces(self, first_position: int, end_position: int) -> list[CacheRegion]:
        """Pieces of at most ``PIECE_BYTES``: several blocks each if possible, else positions."""
        request, position_bytes = self.request, self._position_bytes
        positions = max(1, end_position - first_position)
        blocks_each = max(1, PIECE_BYTES // (positions * position_bytes))
        positions_each = max(1, PIECE_BYTES // position_bytes)
        return [
            CacheRegion(
                block,
                min(block + blocks_each, request.end_block),
                position,
                min(position + positions_each, end_position),
            )
            for block in range(request.first_block, request.end_block, blocks_each)
            for position in range(first_position, end_position, positions_each)
        ]

    def read(self, region: CacheRegion) -> WireTensor:
        """A copy of a region: ``[blocks x rows x 2 x kv_heads, positions, head_dim]``."""
        if region.end_position > self.length:
            raise ProtocolError(ErrorCode.BAD_POSITION, f"{self.length} positions are cached")
        content = self._region(region)
        return tensor_to_wire(content.flatten(0, 3), WIRE_DTYPES[content.dtype])

    def write(self, region: CacheRegion, content: WireTensor) -> None:
        """Put in what another cache's :meth:`read` gave, or raise ProtocolError before."""
        destination = self._region(region)
        blocks, rows, two, kv_heads, positions, head_dim = destination.shape
        shape = (blocks * rows * two * kv_heads, positions, head_dim)
        if content.dtype is not WIRE_DTYPES[destination.dtype] or content.shape != shape:
            raise ProtocolError(
                ErrorCode.BAD_TENSOR, f"{content.dtype.name} {content.shape} for a cache's {shape}"
            )
        source = tensor_from_wire(content)
        if not torch.isfinite(source).all():
            raise ProtocolError(ErrorCode.NOT_FINITE, "a cache")
        destination.copy_(source.view(destination.shape))

    def resume(self, state: CacheState) -> None:
        """Continue where another cache was, or raise ProtocolError before."""
        if not 0 <= state.length <= self.request.maximum_tokens:
            raise ProtocolError(ErrorCode.BAD_POSITION, f"{state.length} positions")
        if len(state.left_padding) != self.request.rows:
            raise ProtocolError(ErrorCode.BAD_FIELD, "left_padding needs one count per row")
        if not all(0 <= count < self.request.maximum_tokens for count in state.left_padding):
            raise ProtocolError(ErrorCode.BAD_FIELD, "left_padding out of bounds")
        self.length = state.length
        self.padding = state.left_padding
        self.has_padding = any(state.left_padding)

    def _region(self, region: CacheRegion) -> torch.Tensor:
        """The region's ``[blocks, rows, 2, kv_heads, positions, head_dim]``, not a copy."""
        if self.closed:
            raise ProtocolError(ErrorCode.UNKNOWN_SESSION, "the session was closed")
        request = self.request
        if not request.first_block <= region.first_block < region.end_block <= request.end_block:
            raise ProtocolError(
                ErrorCode.BLOCKS_NOT_HOSTED, f"{region.first_block}:{region.end_block}"
            )
        if not 0 <= region.first_position < region.end_position <= request.maximum_tokens:
            raise ProtocolError(
                ErrorCode.BAD_POSITION, f"{region.first_position}:{region.end_position}"
            )
        first = request.first_block
        return self.key_values[
            region.first_block - first : region.end_block - first,
            ...,
            region.first_position : region.end_position,
            :,
        ]

    def close(self) -> None:
        """Free the reservation, at the end of the running step if there is one."""
        self.closed = True
        self.release_if_idle()

    def release_if_idle(self) -> None:
        if self.closed and not self.steps_running and self._reserved_bytes:
            self._budget.release(self._reserved_bytes)
            self._reserved_bytes = 0
            self.key_values = self.key_values.new_empty(0)
            if self._on_release is not None:
                self._on_release()


def _zeros(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # calloc: the kernel zeroes a page when it is first touched, so that a long reservation costs
    # memory only as it fills. torch.zeros would write it all now.
    elements = int(np.prod(size, dtype=np.int64))
    memory = np.zeros(elements * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(tuple(size))
