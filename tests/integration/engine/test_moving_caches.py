"""A session's cache moves from one engine to another and goes on bit for bit."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from swarm.compute.wire_tensors import tensor_from_wire, tensor_to_wire
from swarm.node.engine.api import (
    CacheRegion,
    CacheRequest,
    CacheState,
    SessionCache,
    StepInput,
)
from swarm.node.engine.cache import PIECE_BYTES
from swarm.node.engine.engine import SpanEngine, load_engine_blocking
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.tensors import DType, WireTensor

LENGTH = 24


def hidden_of(rows: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, tokens, 64, generator=torch.Generator().manual_seed(seed))


async def run_step(
    engine: SpanEngine,
    cache: SessionCache,
    hidden: torch.Tensor,
    position: int,
    row_order: tuple[int, ...] = (),
) -> torch.Tensor:
    wire = tensor_to_wire(hidden, DType.FLOAT32)
    output = await engine.step(cache, StepInput(wire, position, hidden.shape[1], row_order))
    return tensor_from_wire(output.activations)


async def move(
    source: SpanEngine,
    old: SessionCache,
    target: SpanEngine,
    new: SessionCache,
) -> None:
    state = await source.export_state(old)
    for piece in source.pieces(old, 0, state.length):
        content = await source.export_region(old, piece)
        assert len(content.data) <= PIECE_BYTES
        await target.import_region(new, piece, content)
    await target.import_state(new, state)


@pytest.mark.parametrize(
    "family", ["llama", "mistral_sliding", "qwen3", "phi3", "gemma3", "mixtral"]
)
async def test_a_moved_session_goes_on_bit_for_bit(
    family: str, make_tiny: Any, load_chain: Any
) -> None:
    """Into an engine of the same span, with prompt, decode, a rollback and a beam's reorder."""
    chain = load_chain(make_tiny(family), [(1, 5), (1, 5)])
    source, target = chain.engines
    request = CacheRequest(1, 5, 2, 64, DType.FLOAT32, (0, 3))
    old, new = source.reserve(request), target.reserve(request)
    await run_step(source, old, hidden_of(2, LENGTH, 1), 0)
    await run_step(source, old, hidden_of(2, 1, 2), LENGTH, (1, 0))
    await move(source, old, target, new)
    steps = [
        (hidden_of(2, 1, 3), LENGTH + 1, ()),
        (hidden_of(2, 5, 4), LENGTH + 2, ()),
        (hidden_of(2, 1, 5), LENGTH + 4, ()),
        (hidden_of(2, 1, 6), LENGTH + 5, (1, 1)),
        (hidden_of(2, 2, 7), LENGTH + 6, ()),
    ]
    for hidden, position, row_order in steps:
        expected = await run_step(source, old, hidden, position, row_order)
        assert torch.equal(await run_step(target, new, hidden, position, row_order), expected)
    await chain.close()


async def test_a_part_of_the_blocks_moves_into_another_span(
    make_tiny: Any, load_chain: Any
) -> None:
    chain = load_chain(make_tiny("gemma3"), [(0, 6), (2, 6)])
    source, target = chain.engines
    old = source.reserve(CacheRequest(0, 6, 1, 64, DType.FLOAT32))
    new = target.reserve(CacheRequest(3, 5, 1, 64, DType.FLOAT32))
    # What the blocks 3 and 4 of the whole session would be fed with is not to be had from outside:
    # a second session of only these blocks, filled in the same steps, says what must come out.
    alone = target.reserve(CacheRequest(3, 5, 1, 64, DType.FLOAT32))
    part = source.reserve(CacheRequest(3, 5, 1, 64, DType.FLOAT32))
    await run_step(source, old, hidden_of(1, LENGTH, 1), 0)
    for engine, cache in ((source, part), (target, alone)):
        await run_step(engine, cache, hidden_of(1, LENGTH, 2), 0)
    before = await run_step(target, alone, hidden_of(1, 1, 3), LENGTH)
    await move(source, part, target, new)
    assert torch.equal(await run_step(target, new, hidden_of(1, 1, 3), LENGTH), before)
    # Blocks of the larger session are bit for bit in the smaller one, at the places of the blocks.
    for block in (3, 4):
        region = CacheRegion(block, block + 1, 0, LENGTH)
        content = await source.export_region(old, region)
        await target.import_region(new, region, content)
        assert bytes((await target.export_region(new, region)).data) == bytes(content.data)
    await chain.close()


async def test_positions_in_several_rounds(make_tiny: Any, load_chain: Any) -> None:
    """What was moved before a rollback is overwritten by the round that follows it."""
    chain = load_chain(make_tiny("llama"), [(0, 6), (0, 6)])
    source, target = chain.engines
    request = CacheRequest(0, 6, 1, 64, DType.FLOAT32)
    old, new = source.reserve(request), target.reserve(request)
    await run_step(source, old, hidden_of(1, LENGTH, 1), 0)
    await move(source, old, target, new)
    await run_step(source, old, hidden_of(1, 2, 2), LENGTH - 4)
    for piece in source.pieces(old, LENGTH - 4, LENGTH - 2):
        await target.import_region(new, piece, await source.export_region(old, piece))
    await target.import_state(new, await source.export_state(old))
    with pytest.raises(ProtocolError, match="BAD_POSITION"):
        await target.export_region(new, CacheRegion(0, 1, 0, LENGTH))
    hidden = hidden_of(1, 3, 3)
    expected = await run_step(source, old, hidden, LENGTH - 2)
    assert torch.equal(await run_step(target, new, hidden, LENGTH - 2), expected)
    await chain.close()


async def test_a_region_of_any_size_is_cut_into_pieces_that_cover_it_once(
    make_tiny: Any, load_chain: Any
) -> None:
    chain = load_chain(make_tiny("llama"), [(0, 6)], cache_tokens=10_000)
    engine = chain.engines[0]
    cache = engine.reserve(CacheRequest(1, 6, 2, 4096, DType.FLOAT32))
    for positions in ((0, 1), (0, 200), (100, 1500), (0, 4096), (4095, 4096)):
        covered = set()
        for piece in engine.pieces(cache, *positions):
            for block in range(piece.first_block, piece.end_block):
                for position in range(piece.first_position, piece.end_position):
                    assert (block, position) not in covered
                    covered.add((block, position))
        assert len(covered) == 5 * (positions[1] - positions[0])
    assert len(engine.pieces(cache, 10, 11)) == 1, "a step in one piece"
    await chain.close()


async def test_what_does_not_fit_is_refused_and_changes_nothing(
    make_tiny: Any, load_chain: Any
) -> None:
    tiny = make_tiny("llama")
    chain = load_chain(tiny, [(0, 6), (0, 6)])
    source, target = chain.engines
    old, new = (e.reserve(CacheRequest(1, 5, 1, 64, DType.FLOAT32)) for e in (source, target))
    await run_step(source, old, hidden_of(1, LENGTH, 1), 0)
    region = CacheRegion(1, 5, 0, LENGTH)
    content = await source.export_region(old, region)
    size = len(content.data)

    async def refused(code: ErrorCode, where: CacheRegion, what: WireTensor) -> None:
        with pytest.raises(ProtocolError) as error:
            await target.import_region(new, where, what)
        assert error.value.code is code

    halves = WireTensor(DType.BFLOAT16, content.shape, bytes(size // 2))
    await refused(ErrorCode.BAD_TENSOR, region, halves)
    rows, positions, head_dim = content.shape
    turned = WireTensor(content.dtype, (positions, rows, head_dim), content.data)
    await refused(ErrorCode.BAD_TENSOR, region, turned)
    broken = b"\xff" * size
    await refused(ErrorCode.NOT_FINITE, region, WireTensor(content.dtype, content.shape, broken))
    await refused(ErrorCode.BLOCKS_NOT_HOSTED, CacheRegion(0, 4, 0, LENGTH), content)
    await refused(ErrorCode.BLOCKS_NOT_HOSTED, CacheRegion(2, 6, 0, LENGTH), content)
    await refused(ErrorCode.BAD_POSITION, CacheRegion(1, 5, 41, 41 + LENGTH), content)
    for state in (CacheState(65, (0,)), CacheState(-1, (0,))):
        with pytest.raises(ProtocolError, match="BAD_POSITION"):
            await target.import_state(new, state)
    for padding in ((), (0, 0), (64,)):
        with pytest.raises(ProtocolError, match="BAD_FIELD"):
            await target.import_state(new, CacheState(LENGTH, padding))
    assert await target.export_state(new) == CacheState(0, (0,))
    with pytest.raises(ProtocolError, match="BAD_POSITION"):
        await source.export_region(old, CacheRegion(1, 5, 0, LENGTH + 1))
    other = load_engine_blocking(
        tiny.checkpoint, 1, 5, device="cpu", dtype="bfloat16", cache_tokens=256, threads=1
    )
    rounded = other.reserve(CacheRequest(1, 5, 1, 64, DType.FLOAT32))
    with pytest.raises(ProtocolError, match="BAD_TENSOR"):
        await other.import_region(rounded, region, content)
    await other.close()
    await chain.close()


async def test_a_closed_session_is_neither_read_nor_written_and_its_memory_is_freed(
    make_tiny: Any, load_chain: Any
) -> None:
    chain = load_chain(make_tiny("llama"), [(0, 6)])
    engine = chain.engines[0]
    cache = engine.reserve(CacheRequest(0, 6, 1, 64, DType.FLOAT32))
    await run_step(engine, cache, hidden_of(1, LENGTH, 1), 0)
    region = CacheRegion(0, 6, 0, LENGTH)
    reading = asyncio.create_task(engine.export_region(cache, region))
    await asyncio.sleep(0)
    cache.close()
    with pytest.raises(ProtocolError, match="UNKNOWN_SESSION"):
        await reading
    with pytest.raises(ProtocolError, match="UNKNOWN_SESSION"):
        await engine.export_region(cache, region)
    assert engine.load.cache_tokens_free == engine.load.cache_tokens_total
    await engine.close()
    with pytest.raises(ProtocolError, match="DRAINING"):
        await engine.export_region(cache, region)


async def test_moving_waits_for_the_running_batch_and_delays_steps_by_one_piece(
    make_tiny: Any, load_chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swarm.node.engine import worker as worker_module

    chain = load_chain(make_tiny("llama"), [(0, 6)])
    engine = chain.engines[0]
    cache = engine.reserve(CacheRequest(0, 6, 1, 64, DType.FLOAT32))
    await run_step(engine, cache, hidden_of(1, LENGTH, 1), 0)
    order: list[str] = []
    entered, opened = threading.Event(), threading.Event()
    compute = worker_module.compute_batch

    def held(*arguments: Any) -> Any:
        order.append("batch")
        entered.set()
        assert opened.wait(30)
        return compute(*arguments)

    monkeypatch.setattr(worker_module, "compute_batch", held)
    read = cache.cache.read

    def noted(region: CacheRegion) -> WireTensor:
        order.append("piece")
        content: WireTensor = read(region)
        return content

    monkeypatch.setattr(cache.cache, "read", noted)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(run_step(engine, cache, hidden_of(1, 1, 2), LENGTH))
        assert await asyncio.to_thread(entered.wait, 30)
        for _ in range(4):
            tasks.create_task(engine.export_region(cache, CacheRegion(0, 6, 0, LENGTH)))
        other = engine.reserve(CacheRequest(0, 6, 1, 64, DType.FLOAT32))
        tasks.create_task(run_step(engine, other, hidden_of(1, 1, 3), 0))
        while not engine.load.queued_steps:  # noqa: ASYNC110 (the engine has no such event)
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        opened.set()
    assert order == ["batch", "piece", "batch", "piece", "piece", "piece"]
    await chain.close()
