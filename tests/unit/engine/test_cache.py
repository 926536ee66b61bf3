from __future__ import annotations

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.node.engine.api import CacheRequest
from swarm.node.engine.cache import CacheBudget, CacheShape, SpanCache
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.tensors import DType

SHAPE = CacheShape(kv_heads=2, head_dim=8, dtype=torch.float32)
CPU = torch.device("cpu")


def budget_of(tokens: int, blocks: int = 4) -> CacheBudget:
    return CacheBudget(
        tokens * blocks * SHAPE.bytes_per_block_token, SHAPE.bytes_per_block_token, blocks
    )


def request(rows: int, tokens: int, blocks: int = 4) -> CacheRequest:
    return CacheRequest(0, blocks, rows, tokens, DType.FLOAT32)


def test_reservations_are_refused_when_full_and_freed_on_close() -> None:
    budget = budget_of(100)
    first = SpanCache(request(2, 30), SHAPE, CPU, budget)
    assert (budget.tokens_total, budget.tokens_free) == (100, 40)
    with pytest.raises(ProtocolError) as refused:
        SpanCache(request(1, 41), SHAPE, CPU, budget)
    assert refused.value.code is ErrorCode.NO_CAPACITY
    half_span = SpanCache(request(1, 80, blocks=2), SHAPE, CPU, budget)
    assert budget.tokens_free == 0
    for cache in (first, half_span, first):
        cache.close()
    assert budget.tokens_free == 100
    assert first.key_values.numel() == 0


def test_memory_of_a_running_step_is_freed_at_its_end() -> None:
    budget = budget_of(100)
    cache = SpanCache(request(1, 50), SHAPE, CPU, budget)
    cache.steps_running = 1
    cache.close()
    assert budget.tokens_free == 50
    cache.steps_running = 0
    cache.release_if_idle()
    assert budget.tokens_free == 100


def test_an_absurd_request_allocates_nothing() -> None:
    with pytest.raises(ProtocolError):
        SpanCache(request(64, 1 << 22, blocks=1024), SHAPE, CPU, budget_of(100))


def test_a_reservation_takes_memory_only_as_it_fills() -> None:
    process = psutil.Process()
    before_bytes = process.memory_info().rss
    cache = SpanCache(request(1, 1_000_000), SHAPE, CPU, budget_of(1_000_000))
    size_bytes = cache.key_values.numel() * 4
    assert size_bytes == 512_000_000
    assert process.memory_info().rss - before_bytes < size_bytes / 10
    assert cache.key_values[3, 0, 1, 1, 999_999].eq(0).all()


def test_reorder_moves_rows_and_their_padding() -> None:
    asked = CacheRequest(0, 2, 3, 10, DType.FLOAT32, left_padding=(0, 1, 2))
    cache = SpanCache(asked, SHAPE, CPU, budget_of(100))
    cache.length = 4
    for row in range(3):
        cache.key_values[:, row, ..., :4, :] = row + 1
    cache.reorder((2, 0, 0))
    assert cache.key_values[1, :, 1, 0, 3, 0].tolist() == [3, 1, 1]
    assert cache.padding == (2, 0, 0)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 60), st.booleans()), max_size=40))
def test_reservations_never_exceed_the_budget(wishes: list[tuple[int, int, bool]]) -> None:
    budget = budget_of(200)
    held: list[SpanCache] = []
    for rows, tokens, close_one in wishes:
        try:
            held.append(SpanCache(request(rows, tokens), SHAPE, CPU, budget))
        except ProtocolError:
            assert rows * tokens > budget.tokens_free
        if close_one and held:
            held.pop(0).close()
        assert 0 <= budget.reserved_bytes <= budget.total_bytes
    for cache in held:
        cache.close()
    assert budget.reserved_bytes == 0
