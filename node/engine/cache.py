"""Key-value caches of sessions: reserved whole on admission, written in place, never evicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from swarm.node.engine.api import CacheRequest
from swarm.protocol.errors import ErrorCode, ProtocolError


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
        wanted_bytes = rows * maximum_tokens * blocks * self._bytes_per_block_token
        if wanted_bytes > self.total_bytes - self.reserved_bytes:
            raise ProtocolError(
                ErrorCode.NO_CAPACITY,
                f"{wanted_bytes} bytes of cache wanted, "
                f"{self.total_bytes - self.reserved_bytes} free",
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
        self, request: CacheRequest, shape: CacheShape, device: torch.device, budget: CacheBudget
    ) -> None:
        """Reserve; raises ProtocolError(NO_CAPACITY) before anything is allocated."""
        self.request = request
        self.length = 0
        self.closed = False
        self.steps_running = 0
        self.padding = request.left_padding or (0,) * request.rows
        self.has_padding = any(self.padding)
        self._budget = budget
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

    def close(self) -> None:
        """Free the reservation, at the end of the running step if there is one."""
        self.closed = True
        self.release_if_idle()

    def release_if_idle(self) -> None:
        if self.closed and not self.steps_running and self._reserved_bytes:
            self._budget.release(self._reserved_bytes)
            self._reserved_bytes = 0
            self.key_values = self.key_values.new_empty(0)


def _zeros(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # calloc: the kernel zeroes a page when it is first touched, so that a long reservation costs
    # memory only as it fills. torch.zeros would write it all now.
    elements = int(np.prod(size, dtype=np.int64))
    memory = np.zeros(elements * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(tuple(size))
