"""The cache object that ``transformers.generate`` holds: a remote session seen as a local cache.

The keys and values live on the nodes. Here is only how many tokens they hold, and what the next
step has to tell them: a lower position (rollback) or a new order of the rows (beam search).
"""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache

from swarm.client.background import BackgroundLoop
from swarm.client.remote_blocks import RemoteBlocks
from swarm.client.remote_chain import RemoteChain
from swarm.compute.wire_tensors import tensor_from_wire, tensor_to_wire
from swarm.protocol.errors import NoRouteError, UsageError
from swarm.protocol.tensors import WireTensor
from swarm.routing import ChainPlan


class SwarmCache(Cache):  # type: ignore[misc]
    """The session of one ``generate`` call, or of several that continue each other.

    Opened on the nodes at the first forward pass, when the number of rows and their padding are
    known. Closing frees it there; so does losing the last reference. Not for use by several threads
    at a time.
    """

    def __init__(
        self, blocks: RemoteBlocks, background: BackgroundLoop, maximum_tokens: int | None = None
    ) -> None:
        """``maximum_tokens`` is what nodes reserve for each row; None leaves it to ``generate``."""
        super().__init__(layers=[])
        self._maximum_tokens = maximum_tokens
        self._length = 0
        self._rows = 0
        self._left_padding: tuple[int, ...] = ()
        self._row_order: tuple[int, ...] = ()
        self.session = RemoteSession(blocks, background)
        self._finalizer = weakref.finalize(self, self.session.abandon)
        self._finalizer.atexit = False

    # --- what the model uses ----------------------------------------------------------------------
    @property
    def plan(self) -> ChainPlan | None:
        """The hops that serve this session; None before the first pass."""
        return self.session.plan

    @property
    def passes(self) -> int:
        """Passes through the whole chain so far."""
        return self.session.passes

    @property
    def left_padding(self) -> tuple[int, ...]:
        """Padding positions at the start of each row; empty when there are none."""
        return self._left_padding

    def reserve(self, maximum_tokens: int) -> None:
        """Make sure that ``maximum_tokens`` per row will fit. Raises UsageError."""
        if self._maximum_tokens is None:
            self._maximum_tokens = maximum_tokens
        elif maximum_tokens > self._maximum_tokens:
            raise UsageError(
                f"this call may need {maximum_tokens} tokens, but the cache was made for "
                f"{self._maximum_tokens}; make a larger one: model.new_cache(maximum_tokens=...)"
            )

    def start(self, rows: int, left_padding: tuple[int, ...]) -> None:
        """Fix the shape before the first pass. Raises UsageError when it was fixed differently."""
        if self._rows and (rows, left_padding) != (self._rows, self._left_padding):
            raise UsageError("a cache keeps its rows and their padding; make a new one")
        self._rows, self._left_padding = rows, left_padding

    def step(self, activations: torch.Tensor, output_tokens: int) -> torch.Tensor:
        """Pass ``[rows, tokens, hidden]`` through the remote blocks and append it to the cache.

        Returns ``[rows, output_tokens, hidden]`` on the CPU, in the dtype of the wire.
        """
        rows, tokens, _ = activations.shape
        if rows != self._rows:
            raise UsageError(f"the cache holds {self._rows} rows, the input has {rows}")
        if self._maximum_tokens is None:
            self._maximum_tokens = self._length + tokens
        if self._length + tokens > self._maximum_tokens:
            raise UsageError(
                f"{self._length + tokens} tokens do not fit into a cache for {self._maximum_tokens}"
            )
        result = self.session.step(
            tensor_to_wire(activations, self.session.blocks.wire_dtype),
            self._length,
            output_tokens,
            self._row_order,
            shape=(rows, self._maximum_tokens, self._left_padding),
        )
        self._length += tokens
        self._row_order = ()
        return tensor_from_wire(result)

    def close(self) -> None:
        """Free the session on the nodes; a second call does nothing."""
        self.session.close()

    def __enter__(self) -> SwarmCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- what transformers uses -------------------------------------------------------------------
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache, padding included."""
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self._maximum_tokens is None else self._maximum_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens; a positive number is the length to keep.

        Nothing is sent: the next step starts at the lower position, which is the rollback.
        """
        kept = self._length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        self._length = max(0, min(kept, self._length))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` goes on from what is row ``beam_idx[i]`` now."""
        order = tuple(beam_idx.tolist())
        if self._row_order:
            order = tuple(self._row_order[source] for source in order)
        self._row_order = () if order == tuple(range(len(order))) else order

    def reset(self) -> None:
        """Forget all tokens; the session stays open."""
        self._length = 0

    def update(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError("keys and values of a swarm session live on the nodes")

    def batch_repeat_interleave(self, repeats: int) -> None:
        if repeats != 1:
            raise UsageError("a swarm session cannot change its number of rows")

    def batch_select_indices(self, indices: torch.Tensor) -> NoReturn:
        raise UsageError("a swarm session cannot change its number of rows")

    def activate_past_recording(self) -> None:
        """Rollback always works; nothing has to be switched on."""

    @property
    def batch_size(self) -> int:
        return self._rows or -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self._length > 0

    @property
    def is_croppable(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"SwarmCache(rows={self._rows}, tokens={self._length}/{self._maximum_tokens})"


class RemoteSession:
    """The chain behind a cache, driven from a synchronous thread.

    Apart from the cache, so that it can be freed after the cache was forgotten.
    """

    def __init__(self, blocks: RemoteBlocks, background: BackgroundLoop) -> None:
        self.blocks = blocks
        self.plan: ChainPlan | None = None
        self._background = background
        self._chain: RemoteChain | None = None
        self._closed = False

    @property
    def passes(self) -> int:
        return self._chain.passes if self._chain is not None else 0

    def step(
        self,
        activations: WireTensor,
        position: int,
        output_tokens: int,
        row_order: tuple[int, ...],
        *,
        shape: tuple[int, int, tuple[int, ...]],
    ) -> WireTensor:
        if self._closed:
            raise UsageError(
                "this cache is closed; to continue after generate, pass "
                "past_key_values=model.new_cache(maximum_tokens=...) and close it yourself"
            )
        try:
            return self._background.run(
                self._step(activations, position, output_tokens, row_order, shape)
            )
        except NoRouteError:
            raise  # nothing of the step counts, and the next one tries again
        except BaseException:
            # A failed or interrupted step leaves the hops in a state that is not known.
            self.close()
            raise

    async def _step(
        self,
        activations: WireTensor,
        position: int,
        output_tokens: int,
        row_order: tuple[int, ...],
        shape: tuple[int, int, tuple[int, ...]],
    ) -> WireTensor:
        if self._chain is None:
            rows, maximum_tokens, left_padding = shape
            self._chain = await self.blocks.open_chain(
                rows=rows, maximum_tokens=maximum_tokens, left_padding=left_padding
            )
            self.plan = self._chain.plan
        return await self._chain.step(
            activations, position, output_tokens=output_tokens, row_order=row_order
        )

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._chain is not None and not self._background.is_closed:
            self._background.run(self._chain.close())

    def abandon(self) -> None:
        """Close without waiting: called by the garbage collector, on any thread."""
        if self._closed:
            return
        self._closed = True
        if self._chain is not None:
            self._background.submit(self._chain.close())
