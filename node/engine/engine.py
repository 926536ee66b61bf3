"""The engine of a node: a loaded span, its caches and its device thread in one object.

The rest of the node sees ``api.Engine``; this is its real implementation.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from swarm.catalogue.checkpoint import Checkpoint
from swarm.compute.devices import choose_device, choose_dtype, dtype_name
from swarm.node.engine import capacity
from swarm.node.engine.adapters import DEFAULT_ADAPTER_BYTES, AdapterStore
from swarm.node.engine.api import (
    CacheRegion,
    CacheRequest,
    CacheState,
    EngineLoad,
    SessionCache,
    StepInput,
    StepOutput,
)
from swarm.node.engine.batching import BatchLimits
from swarm.node.engine.cache import CacheBudget, SpanCache
from swarm.node.engine.freed_memory import return_freed_memory
from swarm.node.engine.span_loader import Progress, Span, load_span
from swarm.node.engine.training import SpanTraining
from swarm.node.engine.training_api import TrainingRequest, TrainingSession
from swarm.node.engine.worker import BatchObserver, Worker
from swarm.protocol.errors import ErrorCode, ProtocolError, UsageError
from swarm.protocol.messages import MAX_PAYLOAD_BYTES
from swarm.protocol.tensors import WireTensor

_log = logging.getLogger(__name__)
_MOST_STEP_TOKENS = 512
_LEAST_STEP_TOKENS = 32
_STEP_BUDGET_S = 0.5
"""How long a piece of a prompt may occupy the device: so long others wait for their next token."""


class SpanCacheHandle:
    """What the service holds of a session's cache."""

    def __init__(self, cache: SpanCache, worker: Worker) -> None:
        self.cache = cache
        self._worker = worker

    def close(self) -> None:
        """Free the reservation; queued steps are refused. A second call does nothing."""
        self._worker.drop(self.cache)
        self.cache.close()


def _own(cache: SessionCache) -> SpanCache:
    if not isinstance(cache, SpanCacheHandle):
        raise UsageError("the cache is not of this engine")
    return cache.cache


def _step_tokens(prefill_tokens_per_s: float) -> int:
    """What the whole span computes within the budget, in round numbers and within bounds."""
    fitting = int(prefill_tokens_per_s * _STEP_BUDGET_S)
    return max(_LEAST_STEP_TOKENS, min(fitting // 64 * 64, _MOST_STEP_TOKENS))


class SpanEngine:
    """Implements ``api.Engine`` for a span of transformers' decoder layers."""

    def __init__(
        self,
        span: Span,
        checkpoint: Checkpoint,
        *,
        cache_bytes: int,
        speed: capacity.MeasuredSpeed,
        threads: int | None,
        maximum_step_tokens: int | None = None,
        adapter_bytes: int = DEFAULT_ADAPTER_BYTES,
    ) -> None:
        self._span = span
        self.adapters = AdapterStore(span, checkpoint, adapter_bytes)
        self._speed = speed
        self._budget = CacheBudget(
            cache_bytes,
            span.cache_shape.bytes_per_block_token,
            span.end_block - span.first_block,
        )
        if maximum_step_tokens is None:
            per_s = speed.prefill_tokens_per_s / (span.end_block - span.first_block)
            maximum_step_tokens = _step_tokens(per_s)
        # In float32 a step must fit into one message.
        self._maximum_step_tokens = max(
            1, min(maximum_step_tokens, MAX_PAYLOAD_BYTES // (4 * span.hidden_size))
        )
        limits = BatchLimits(maximum_tokens=2 * self._maximum_step_tokens)
        self._worker = Worker(span, limits, threads)
        self._training = SpanTraining(checkpoint, span, self._worker, self._budget)

    @property
    def first_block(self) -> int:
        return self._span.first_block

    @property
    def end_block(self) -> int:
        return self._span.end_block

    @property
    def hidden_size(self) -> int:
        return self._span.hidden_size

    @property
    def maximum_step_tokens(self) -> int:
        return self._maximum_step_tokens

    @property
    def decode_tokens_per_s(self) -> float:
        """Through one block, one token at a time; measured when the span was loaded."""
        return self._speed.decode_tokens_per_s

    @property
    def batched_tokens_per_s(self) -> float:
        """Through one block, decoding for several sessions at once."""
        return self._speed.batched_tokens_per_s

    @property
    def prefill_tokens_per_s(self) -> float:
        """Through one block, in chunks; measured when the span was loaded."""
        return self._speed.prefill_tokens_per_s

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(
            cache_tokens_total=self._budget.tokens_total,
            cache_tokens_free=self._budget.tokens_free,
            queued_steps=self._worker.queued_steps,
            busy_fraction=self._worker.busy_fraction,
        )

    def describe(self) -> dict[str, Any]:
        """How this engine computes, for logs, the terminal view and tests of the fast path."""
        replaced = self._span.replacements
        return {
            "blocks": f"{self.first_block}:{self.end_block}",
            "device": str(self._span.device),
            "dtype": dtype_name(self._span.dtype),
            "threads": torch.get_num_threads(),
            "weight_bytes": self._span.weight_bytes,
            "cache_bytes": self._budget.total_bytes,
            "packed_linears": replaced.packed_linears,
            "fused_attentions": replaced.attentions,
            "fused_gated_mlps": replaced.gated_mlps,
            "fused_rms_norms": replaced.rms_norms,
            "decode_tokens_per_s_per_block": round(self.decode_tokens_per_s, 1),
            "prefill_tokens_per_s_per_block": round(self.prefill_tokens_per_s, 1),
        }

    def observe_batches(self, observer: BatchObserver) -> None:
        """Call ``observer`` with a BatchReport after each batch, on the event loop."""
        self._worker.observe(observer)

    def reserve(self, request: CacheRequest) -> SessionCache:
        span = self._span
        if not span.first_block <= request.first_block < request.end_block <= span.end_block:
            raise ProtocolError(
                ErrorCode.BLOCKS_NOT_HOSTED,
                f"{request.first_block}:{request.end_block} of {self.first_block}:{self.end_block}",
            )
        if request.rows < 1 or request.maximum_tokens < 1:
            raise ProtocolError(ErrorCode.BAD_FIELD, "a cache of no rows or no tokens")
        if request.left_padding and len(request.left_padding) != request.rows:
            raise ProtocolError(ErrorCode.BAD_FIELD, "left_padding needs one count per row")
        adapter = on_release = None
        if request.adapter_id:
            adapter = self.adapters.acquire(request.adapter_id)
            on_release = partial(self.adapters.release, request.adapter_id)
        try:
            cache = SpanCache(
                request,
                span.cache_shape,
                span.device,
                self._budget,
                adapter=adapter,
                on_release=on_release,
            )
        except ProtocolError:
            if on_release is not None:
                on_release()
            raise
        return SpanCacheHandle(cache, self._worker)

    async def step(self, cache: SessionCache, step: StepInput) -> StepOutput:
        own = _own(cache)
        self._check(own, step)
        return await self._worker.run(own, step)

    async def open_training(self, request: TrainingRequest) -> TrainingSession:
        return await self._training.open(request)

    def pieces(
        self, cache: SessionCache, first_position: int, end_position: int
    ) -> Sequence[CacheRegion]:
        return _own(cache).pieces(first_position, end_position)

    async def export_state(self, cache: SessionCache) -> CacheState:
        own = _own(cache)
        return await self._worker.call(own, own.state)

    async def export_region(self, cache: SessionCache, region: CacheRegion) -> WireTensor:
        own = _own(cache)
        return await self._worker.call(own, lambda: own.read(region))

    async def import_region(
        self, cache: SessionCache, region: CacheRegion, content: WireTensor
    ) -> None:
        own = _own(cache)
        await self._worker.call(own, lambda: own.write(region, content))

    async def import_state(self, cache: SessionCache, state: CacheState) -> None:
        own = _own(cache)
        await self._worker.call(own, lambda: own.resume(state))

    def _check(self, cache: SpanCache, step: StepInput) -> None:
        """What does not depend on the steps before; the rest is checked when the step runs."""
        shape = step.activations.shape
        rows = cache.request.rows
        if cache.closed:
            raise ProtocolError(ErrorCode.UNKNOWN_SESSION, "the session was closed")
        if len(shape) != 3 or shape[0] != rows or shape[1] < 1 or shape[2] != self.hidden_size:
            raise ProtocolError(ErrorCode.BAD_TENSOR, f"shape {shape}")
        if rows * shape[1] > max(self._maximum_step_tokens, rows):
            raise ProtocolError(ErrorCode.TOO_LARGE, f"{rows} x {shape[1]} tokens in one step")
        if step.position < 0 or step.position + shape[1] > cache.request.maximum_tokens:
            raise ProtocolError(ErrorCode.BAD_POSITION, f"position {step.position}")
        if not 1 <= step.output_tokens <= shape[1]:
            raise ProtocolError(ErrorCode.BAD_FIELD, f"output_tokens {step.output_tokens}")
        if step.row_order and (
            len(step.row_order) != rows or not all(0 <= row < rows for row in step.row_order)
        ):
            raise ProtocolError(ErrorCode.BAD_FIELD, "row_order")

    async def close(self) -> None:
        """Finish the running batch, refuse the queue, end the device thread, free the weights."""
        await self._worker.close()
        await self._training.close()
        self._span.release()


def load_engine_blocking(
    checkpoint: Checkpoint,
    first_block: int,
    end_block: int,
    *,
    device: str = "auto",
    dtype: str = "auto",
    cache_bytes: int | None = None,
    cache_tokens: int | None = None,
    threads: int | None = None,
    maximum_step_tokens: int | None = None,
    adapter_bytes: int = DEFAULT_ADAPTER_BYTES,
    progress: Progress | None = None,
) -> SpanEngine:
    """Load a span and measure it. Takes seconds: from an event loop call it in a thread.

    ``cache_tokens`` (for the whole span) or ``cache_bytes`` bound the caches; without either the
    memory that is free decides. ``progress(blocks_loaded, blocks)`` is called from this thread.
    Raises CheckpointError, ConfigError or UsageError in plain words.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    chosen_device = choose_device(device)
    span = load_span(
        checkpoint,
        first_block,
        end_block,
        device=chosen_device,
        dtype=choose_dtype(dtype, chosen_device),
        progress=progress,
    )
    if cache_tokens is not None:
        blocks = end_block - first_block
        cache_bytes = cache_tokens * blocks * span.cache_shape.bytes_per_block_token
    elif cache_bytes is None:
        cache_bytes = capacity.default_cache_bytes(span)
    engine = SpanEngine(
        span,
        checkpoint,
        cache_bytes=cache_bytes,
        speed=capacity.measure_speed(span),
        threads=threads,
        maximum_step_tokens=maximum_step_tokens,
        adapter_bytes=adapter_bytes,
    )
    return_freed_memory()
    _log.info("engine ready: %s", engine.describe())
    return engine
