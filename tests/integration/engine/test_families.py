"""Spans of every family against the whole model by transformers, float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swarm.compute.wire_tensors import tensor_from_wire, tensor_to_wire
from swarm.node.engine.api import CacheRequest, StepInput
from swarm.node.engine.cache import CacheBudget, SpanCache
from swarm.node.engine.span_loader import load_span
from swarm.node.engine.worker import compute_batch
from swarm.protocol.tensors import DType, WireTensor

FAMILY_NAMES = [
    "llama",
    "llama_rope_scaled",
    "mistral",
    "mistral_sliding",
    "qwen2",
    "qwen2_sliding",
    "qwen3",
    "phi3",
    "gemma3",
    "mixtral",
]
SPANS = [(0, 2), (2, 3), (3, 6)]


def tokens_of(rows: int, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 128, (rows, count), generator=torch.Generator().manual_seed(seed))


def assert_same_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    scale = max(1.0, expected.abs().max().item() / 10)
    assert (actual - expected).abs().max().item() <= 1e-4 * scale
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("family", FAMILY_NAMES)
async def test_chunks_then_single_tokens(family: str, make_tiny: Any, load_chain: Any) -> None:
    tiny = make_tiny(family)
    chain = load_chain(tiny, SPANS)
    tokens = tokens_of(1, 48)
    embedded = tiny.embed(tokens)
    caches = chain.open(1, 64)
    outputs, position = [], 0
    for count in (21, 17, 4, 1, 1, 1, 3):
        outputs.append(await chain.step(caches, embedded[:, position : position + count], position))
        position += count
    await chain.close()
    assert position == 48
    assert_same_logits(tiny.head(torch.cat(outputs, 1)), tiny.logits(tokens))


@pytest.mark.parametrize("family", FAMILY_NAMES)
async def test_rollback_and_redo(family: str, make_tiny: Any, load_chain: Any) -> None:
    tiny = make_tiny(family)
    chain = load_chain(tiny, SPANS)
    kept, wrong, right = tokens_of(1, 20), tokens_of(1, 9, seed=2), tokens_of(1, 7, seed=3)
    caches = chain.open(1, 64)
    await chain.step(caches, tiny.embed(kept), 0)
    await chain.step(caches, tiny.embed(wrong), 20)
    output = await chain.step(caches, tiny.embed(right), 20)
    await chain.close()
    expected = tiny.logits(torch.cat([kept, right], 1))[:, 20:]
    assert_same_logits(tiny.head(output), expected)


@pytest.mark.parametrize("family", FAMILY_NAMES)
async def test_rows_with_left_padding_and_reorder(
    family: str, make_tiny: Any, load_chain: Any
) -> None:
    tiny = make_tiny(family)
    chain = load_chain(tiny, SPANS)
    padding = (0, 5, 19)
    tokens = tokens_of(3, 22)
    caches = chain.open(3, 64, padding)
    embedded = tiny.embed(tokens)
    outputs = [
        await chain.step(caches, embedded[:, :18], 0),
        await chain.step(caches, embedded[:, 18:21], 18),
        await chain.step(caches, embedded[:, 21:], 21),
    ]
    order = (2, 0, 0)
    following = tokens_of(3, 2, seed=5)
    reordered = [
        await chain.step(caches, tiny.embed(following[:, :1]), 22, order),
        await chain.step(caches, tiny.embed(following[:, 1:]), 23),
    ]
    await chain.close()
    logits = tiny.head(torch.cat(outputs, 1))
    expected = tiny.logits(tokens, padding)
    for row, padded in enumerate(padding):
        assert_same_logits(logits[row, padded:], expected[row, padded:])
    all_tokens = torch.cat([tokens[list(order)], following], 1)
    expected = tiny.logits(all_tokens, [padding[row] for row in order])[:, 22:]
    assert_same_logits(tiny.head(torch.cat(reordered, 1)), expected)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_sessions_at_different_positions_in_one_batch(family: str, make_tiny: Any) -> None:
    """The same steps in one batch and alone; also with transformers' modules unreplaced."""
    tiny = make_tiny(family)
    lengths, new_tokens, rows = (5, 30, 12, 1), (1, 1, 6, 20), (1, 2, 1, 1)
    all_results = []
    for replace in (True, False):
        span = load_span(
            tiny.checkpoint, 1, 6, device=torch.device("cpu"), dtype=torch.float32, replace=replace
        )
        cost = span.cache_shape.bytes_per_block_token
        budget = CacheBudget(10_000 * cost, cost, 5)
        for together in (True, False):
            steps = []
            for index, (length, count, row_count) in enumerate(
                zip(lengths, new_tokens, rows, strict=True)
            ):
                request = CacheRequest(1, 6, row_count, 64, DType.FLOAT32)
                cache = SpanCache(request, span.cache_shape, span.device, budget)
                hidden = tiny.embed(tokens_of(row_count, length + count, seed=index))
                first = tensor_to_wire(hidden[:, :length], DType.FLOAT32)
                compute_batch(span, [(cache, StepInput(first, 0, length))])
                then = tensor_to_wire(hidden[:, length:], DType.FLOAT32)
                steps.append((cache, StepInput(then, length, count)))
            results = (
                compute_batch(span, steps)
                if together
                else [compute_batch(span, [step])[0] for step in steps]
            )
            tensors = []
            for result in results:
                assert isinstance(result, WireTensor)
                tensors.append(tensor_from_wire(result))
            all_results.append(tensors)
    for other in all_results[1:]:
        for one, two in zip(all_results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
