"""How much fits into this machine, and how fast a loaded span is."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import psutil
import torch

from swarm.catalogue.checkpoint import Checkpoint
from swarm.compute.devices import dtype_name
from swarm.node.engine.api import CacheRequest
from swarm.node.engine.cache import CacheBudget, SpanCache
from swarm.node.engine.contention import read_waited_s
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
_BENCHMARK_WEIGHT_BYTES = 256 * 1024 * 1024
"""Of the blocks that decoding is measured on. Caches would keep the weights of a single small block
from one token to the next, and it would seem twice as fast as it is among others."""


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
    """Run some blocks of the span alone, for a fraction of a second, with a cache of their own.

    The best of several runs, without the time in which they waited for a core: what else the
    machine does now is announced as load, not as speed. Nodes that start together on one machine
    would otherwise measure each other. A team of threads waits for those of it that got no core,
    and nobody counts that; so one thread alone is measured as well, and the better of both is told.
    """
    hosted = span.end_block - span.first_block
    block_bytes = max(1, span.weight_bytes // hosted)
    blocks = min(hosted, max(1, _BENCHMARK_WEIGHT_BYTES // block_bytes))
    team = torch.get_num_threads()

    def best(tokens: int, blocks: int) -> float:
        speeds = [_tokens_per_s(span, tokens, blocks)]
        if span.device.type == "cpu" and team > 1:
            torch.set_num_threads(1)
            speeds.append(_tokens_per_s(span, tokens, blocks))
            torch.set_num_threads(team)
        return max(speeds)

    return MeasuredSpeed(
        decode_tokens_per_s=best(1, blocks),
        batched_tokens_per_s=best(_BENCHMARK_BATCH_TOKENS, blocks),
        prefill_tokens_per_s=best(_BENCHMARK_PREFILL_TOKENS, 1),
    )


@torch.inference_mode()
def _tokens_per_s(span: Span, tokens: int, blocks: int) -> float:
    """Through one block, measured on so many."""
    request = CacheRequest(span.first_block, span.first_block + blocks, 1, tokens, DType.FLOAT32)
    shape = span.cache_shape
    budget = CacheBudget(
        blocks * tokens * shape.bytes_per_block_token, shape.bytes_per_block_token, blocks
    )
    cache = SpanCache(request, shape, span.device, budget)
    hidden = torch.full((1, tokens, span.hidden_size), 0.01, dtype=span.dtype, device=span.device)
    # Other threads of a node wait as well, and not for these runs.
    own_thread = {threading.get_native_id()}
    durations_s: list[float] = []
    deadline_s = time.perf_counter() + _BENCHMARK_S
    while len(durations_s) < 2 or (time.perf_counter() < deadline_s and len(durations_s) < 50):
        # Both counters are read within the time that is measured: a wait beside it must not count.
        started_s = time.perf_counter()
        waited_before_s = read_waited_s(own_thread) or 0.0
        batch = RaggedBatch([cache], [0], [tokens])
        output = span.forward(hidden, batch, request.first_block, request.end_block)
        output[0, 0, 0].item()  # waits for an asynchronous device
        waited_s = (read_waited_s(own_thread) or 0.0) - waited_before_s
        durations_s.append(time.perf_counter() - started_s - waited_s)
    return tokens * blocks / min(durations_s[1:])
