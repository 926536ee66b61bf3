"""How much fits into this machine, and how fast a loaded span is."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import torch

from swarm.catalogue.checkpoint import Checkpoint
from swarm.compute.devices import dtype_name
from swarm.node.engine.api import CacheRequest
from swarm.node.engine.cache import CacheBudget, SpanCache
from swarm.node.engine.contention import read_schedule_s
from swarm.node.engine.ragged import RaggedBatch
from swarm.node.engine.span_loader import Span
from swarm.protocol.tensors import DType

PROCESS_BYTES = 450 * 1024 * 1024
"""What a node takes beside weights and caches: interpreter, torch, transformers, libp2p."""
_CACHE_SHARE = 0.25
"""Share of the usable memory that is kept for caches when blocks are counted."""
_MINIMUM_CACHE_BYTES = 64 * 1024 * 1024
_BENCHMARK_S = 0.15
_BENCHMARK_BATCH_TOKENS = 8
"""As many sessions as a busy node computes at once: the linears, which take the time, see as many
rows as here."""
_BENCHMARK_PREFILL_TOKENS = 256


def free_memory_bytes(device: torch.device) -> int:
    """Memory that a new allocation on ``device`` could take now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def usable_memory_bytes(device: torch.device, fraction: float = 0.8) -> int:
    """What a node may use of the device's free memory for weights and caches."""
    reserve = 0 if device.type == "cuda" else PROCESS_BYTES
    return max(0, int(free_memory_bytes(device) * fraction) - reserve)


def blocks_that_fit(checkpoint: Checkpoint, dtype: torch.dtype, usable_bytes: int) -> int:
    """How many blocks fit beside their caches, 0 to all."""
    largest_block_bytes = max(
        checkpoint.block_bytes(block, dtype_name(dtype))
        for block in range(checkpoint.number_of_blocks)
    )
    fitting = int(usable_bytes * (1 - _CACHE_SHARE)) // largest_block_bytes
    return min(checkpoint.number_of_blocks, fitting)


def default_cache_bytes(span: Span) -> int:
    """A budget for caches: four times the weights, at most half of what is still free."""
    free_bytes = usable_memory_bytes(span.device)
    return max(_MINIMUM_CACHE_BYTES, min(4 * span.weight_bytes, free_bytes // 2))


@dataclass(frozen=True, slots=True)
class MeasuredSpeed:
    """Tokens per second through one block, for announcements."""

    decode_tokens_per_s: float
    batched_tokens_per_s: float
    prefill_tokens_per_s: float


def measure_speed(span: Span) -> MeasuredSpeed:
    """Run the span's first block alone, for a fraction of a second, with a cache of its own.

    The best of several runs, without the time in which its threads waited for a core: what else the
    machine does now is announced as load, not as speed. Nodes that start together on one machine
    would otherwise measure each other.
    """
    return MeasuredSpeed(
        decode_tokens_per_s=_tokens_per_s(span, 1),
        batched_tokens_per_s=_tokens_per_s(span, _BENCHMARK_BATCH_TOKENS),
        prefill_tokens_per_s=_tokens_per_s(span, _BENCHMARK_PREFILL_TOKENS),
    )


@torch.inference_mode()
def _tokens_per_s(span: Span, tokens: int) -> float:
    request = CacheRequest(span.first_block, span.first_block + 1, 1, tokens, DType.FLOAT32)
    shape = span.cache_shape
    budget = CacheBudget(tokens * shape.bytes_per_block_token, shape.bytes_per_block_token, 1)
    cache = SpanCache(request, shape, span.device, budget)
    hidden = torch.full((1, tokens, span.hidden_size), 0.01, dtype=span.dtype, device=span.device)
    durations_s: list[float] = []
    deadline_s = time.perf_counter() + _BENCHMARK_S
    while len(durations_s) < 2 or (time.perf_counter() < deadline_s and len(durations_s) < 50):
        before_s, started_s = read_schedule_s(), time.perf_counter()
        batch = RaggedBatch([cache], [0], [tokens])
        output = span.forward(hidden, batch, request.first_block, request.end_block)
        output[0, 0, 0].item()  # waits for an asynchronous device
        duration_s, after_s = time.perf_counter() - started_s, read_schedule_s()
        durations_s.append(duration_s * _share_with_a_core(before_s, after_s))
    return tokens / min(durations_s[1:])


def _share_with_a_core(
    before_s: tuple[float, float] | None, after_s: tuple[float, float] | None
) -> float:
    """The part of the time in which threads that wanted a core had one; 1 where unknown."""
    if before_s is None or after_s is None:
        return 1.0
    ran_s, waited_s = after_s[0] - before_s[0], after_s[1] - before_s[1]
    return ran_s / (ran_s + waited_s) if ran_s > 0 else 1.0
