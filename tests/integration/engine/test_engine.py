"""The engine as the node's service uses it: batching, isolation, cancellation, capacity."""

from __future__ import annotations

import asyncio
import threading
import weakref
from typing import Any

import pytest
import torch

from swarm.compute.wire_tensors import tensor_from_wire, tensor_to_wire
from swarm.node.engine import worker as worker_module
from swarm.node.engine.api import CacheRequest, StepInput
from swarm.node.engine.engine import SpanEngine
from swarm.node.engine.worker import BatchReport
from swarm.protocol.errors import ErrorCode, ProtocolError, UsageError
from swarm.protocol.tensors import DType


def activations(rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, tokens, 64, generator=torch.Generator().manual_seed(seed))


def step_of(hidden: torch.Tensor, position: int, output_tokens: int = 1) -> StepInput:
    return StepInput(tensor_to_wire(hidden, DType.FLOAT32), position, output_tokens)


def request(
    first_block: int = 0, end_block: int = 6, tokens: int = 64, rows: int = 1
) -> CacheRequest:
    return CacheRequest(first_block, end_block, rows, tokens, DType.FLOAT32)


async def queued_steps(engine: SpanEngine, count: int) -> None:
    """Wait until ``count`` steps wait at the engine."""
    while engine.load.queued_steps < count:  # noqa: ASYNC110 (the engine has no such event)
        await asyncio.sleep(0)


class Gate:
    """Holds the device thread inside a batch until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        compute = worker_module.compute_batch

        def held(*arguments: Any) -> Any:
            self.entered.set()
            assert self.opened.wait(30)
            return compute(*arguments)

        monkeypatch.setattr(worker_module, "compute_batch", held)

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 30)


async def test_the_fast_path_is_on(make_tiny: Any, load_chain: Any) -> None:
    engine = load_chain(make_tiny("llama"), [(0, 6)]).engines[0]
    described = engine.describe()
    assert (described["device"], described["dtype"]) == ("cpu", "float32")
    assert described["packed_linears"] == 6 * 4
    assert described["fused_attentions"] == described["fused_gated_mlps"] == 6
    assert described["fused_rms_norms"] == 12
    assert engine.decode_tokens_per_s > 0
    assert engine.prefill_tokens_per_s > 0
    await engine.close()


async def test_waiting_sessions_share_a_batch_and_get_what_each_gets_alone(
    make_tiny: Any, load_chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = load_chain(make_tiny("llama"), [(0, 6)])
    engine = chain.engines[0]
    reports: list[BatchReport] = []
    engine.observe_batches(reports.append)
    caches = [engine.reserve(request()) for _ in range(5)]
    alone = [engine.reserve(request()) for _ in range(5)]
    for index in range(5):
        prompt = activations(1, 3 + 4 * index, seed=index)
        for cache in (caches[index], alone[index]):
            await engine.step(cache, step_of(prompt, 0))
    gate = Gate(monkeypatch)
    blocker = asyncio.create_task(engine.step(caches[0], step_of(activations(1, 1), 3)))
    await gate.wait_entered()
    others = [
        asyncio.create_task(
            engine.step(caches[index], step_of(activations(1, 1, seed=index), 3 + 4 * index))
        )
        for index in range(1, 5)
    ]
    await queued_steps(engine, 4)
    gate.opened.set()
    await blocker
    together = await asyncio.gather(*others)
    assert reports[-1].steps == 4
    assert reports[-1].tokens == 4
    for index, output in enumerate(together, start=1):
        single = await engine.step(
            alone[index], step_of(activations(1, 1, seed=index), 3 + 4 * index)
        )
        torch.testing.assert_close(
            tensor_from_wire(output.activations), tensor_from_wire(single.activations)
        )
    await chain.close()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
async def test_a_bad_input_concerns_its_session_only(
    bad: float, make_tiny: Any, load_chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = load_chain(make_tiny("llama"), [(0, 6)])
    engine = chain.engines[0]
    good, evil, blocking = (engine.reserve(request()) for _ in range(3))
    hidden = activations(1, 4)
    expected = await engine.step(blocking, step_of(hidden, 0, 4))
    gate = Gate(monkeypatch)
    blocker = asyncio.create_task(engine.step(blocking, step_of(hidden, 0)))
    await gate.wait_entered()
    poisoned = hidden.clone()
    poisoned[0, 2, 5] = bad
    steps = [
        asyncio.create_task(engine.step(evil, step_of(poisoned, 0))),
        asyncio.create_task(engine.step(good, step_of(hidden, 0, 4))),
    ]
    await queued_steps(engine, 2)
    gate.opened.set()
    await blocker
    refused, output = await asyncio.gather(*steps, return_exceptions=True)
    assert isinstance(refused, ProtocolError)
    assert refused.code is ErrorCode.INPUT_NOT_FINITE
    assert not isinstance(output, BaseException)
    torch.testing.assert_close(
        tensor_from_wire(output.activations), tensor_from_wire(expected.activations)
    )
    # the refused session is as it was, and goes on
    again = await engine.step(evil, step_of(hidden, 0, 4))
    torch.testing.assert_close(
        tensor_from_wire(again.activations), tensor_from_wire(expected.activations)
    )
    await chain.close()


async def test_an_output_that_overflows_the_wire_is_refused(
    make_tiny: Any, load_chain: Any
) -> None:
    chain = load_chain(make_tiny("llama"), [(0, 6)])
    engine = chain.engines[0]
    cache = engine.reserve(CacheRequest(0, 6, 1, 8, DType.FLOAT16))
    with pytest.raises(ProtocolError) as refused:
        await engine.step(cache, step_of(activations(1, 1) * 1e5, 0))
    assert refused.value.code is ErrorCode.NOT_FINITE
    await chain.close()


async def test_a_failing_batch_fails_its_steps_only(
    make_tiny: Any, load_chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = load_chain(make_tiny("llama"), [(0, 6)])
    engine = chain.engines[0]
    cache = engine.reserve(request())
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> Any:
            raise RuntimeError("out of memory")

        patch.setattr(worker_module, "compute_batch", fail)
        with pytest.raises(ProtocolError) as failed:
            await engine.step(cache, step_of(activations(1, 2), 0))
        assert failed.value.code is ErrorCode.INTERNAL
    await engine.step(cache, step_of(activations(1, 2), 0))
    await chain.close()


async def test_cancelling(make_tiny: Any, load_chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = load_chain(make_tiny("llama"), [(0, 6)])
    engine = chain.engines[0]
    first, second = engine.reserve(request()), engine.reserve(request())
    gate = Gate(monkeypatch)
    running = asyncio.create_task(engine.step(first, step_of(activations(1, 2), 0)))
    await gate.wait_entered()
    waiting = asyncio.create_task(engine.step(second, step_of(activations(1, 2), 0)))
    await queued_steps(engine, 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert engine.load.queued_steps == 0
    running.cancel()
    await asyncio.sleep(0)
    assert not running.done()  # it has started: the cancellation waits for it
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    # The cancelled step had run: its two positions are cached.
    await engine.step(first, step_of(activations(1, 1), 2))
    await chain.close()


async def test_closing_a_session_refuses_its_queue_and_frees_its_memory(
    make_tiny: Any, load_chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = load_chain(make_tiny("llama"), [(0, 6)])
    engine = chain.engines[0]
    free_tokens = engine.load.cache_tokens_free
    cache = engine.reserve(request())
    gate = Gate(monkeypatch)
    running = asyncio.create_task(engine.step(cache, step_of(activations(1, 2), 0)))
    await gate.wait_entered()
    queued = asyncio.create_task(engine.step(cache, step_of(activations(1, 1), 2)))
    await queued_steps(engine, 1)
    cache.close()
    cache.close()
    with pytest.raises(ProtocolError) as refused:
        await queued
    assert refused.value.code is ErrorCode.UNKNOWN_SESSION
    assert engine.load.cache_tokens_free == free_tokens - 64  # the running step still uses it
    gate.opened.set()
    with pytest.raises(ProtocolError):
        await running
    assert engine.load.cache_tokens_free == free_tokens
    with pytest.raises(ProtocolError):
        await engine.step(cache, step_of(activations(1, 1), 2))
    await chain.close()


async def test_a_closed_engine_refuses_steps(make_tiny: Any, load_chain: Any) -> None:
    engine = load_chain(make_tiny("llama"), [(0, 6)]).engines[0]
    cache = engine.reserve(request())
    await engine.step(cache, step_of(activations(1, 2), 0))
    await engine.close()
    with pytest.raises(ProtocolError) as refused:
        await engine.step(cache, step_of(activations(1, 1), 2))
    assert refused.value.code is ErrorCode.DRAINING


async def test_a_session_may_use_a_part_of_the_span(make_tiny: Any, load_chain: Any) -> None:
    for family in ("gemma3", "qwen2_sliding"):
        tiny = make_tiny(family)
        chain = load_chain(tiny, [(0, 6), (1, 5)])
        whole, inner = chain.engines
        hidden = activations(1, 20)
        for first, end in ((1, 3), (3, 5), (2, 3)):
            outputs = []
            for engine in (whole, inner):
                cache = engine.reserve(request(first, end))
                begun = await engine.step(cache, step_of(hidden[:, :19], 0, 19))
                ended = await engine.step(cache, step_of(hidden[:, 19:], 19))
                outputs.append(
                    [tensor_from_wire(begun.activations), tensor_from_wire(ended.activations)]
                )
            torch.testing.assert_close(outputs[0], outputs[1])
        await chain.close()


async def test_bad_requests(make_tiny: Any, load_chain: Any) -> None:
    chain = load_chain(make_tiny("llama"), [(1, 5)])
    engine = chain.engines[0]
    for blocks in ((0, 5), (1, 6), (3, 3), (4, 2)):
        with pytest.raises(ProtocolError) as refused:
            engine.reserve(request(*blocks))
        assert refused.value.code is ErrorCode.BLOCKS_NOT_HOSTED
    with pytest.raises(ProtocolError) as refused:
        engine.reserve(request(1, 5, tokens=5000))
    assert refused.value.code is ErrorCode.NO_CAPACITY
    cache = engine.reserve(request(1, 5, rows=2))
    bad_steps = {
        ErrorCode.BAD_TENSOR: step_of(activations(1, 1), 0),
        ErrorCode.BAD_POSITION: step_of(activations(2, 1), 64),
        ErrorCode.TOO_LARGE: step_of(activations(2, 300), 0),
        ErrorCode.BAD_FIELD: step_of(activations(2, 1), 0, 2),
    }
    for code, step in bad_steps.items():
        with pytest.raises(ProtocolError) as refused:
            await engine.step(cache, step)
        assert refused.value.code is code
    with pytest.raises(ProtocolError) as refused:  # known only when it runs
        await engine.step(cache, step_of(activations(2, 1), 3))
    assert refused.value.code is ErrorCode.BAD_POSITION
    with pytest.raises(UsageError):
        load_chain(make_tiny("llama"), [(0, 7)])
    await chain.close()


async def test_steps_of_one_session_run_in_order(make_tiny: Any, load_chain: Any) -> None:
    chain = load_chain(make_tiny("llama"), [(0, 6)])
    engine = chain.engines[0]
    hidden = activations(1, 12)
    one, other = engine.reserve(request()), engine.reserve(request())
    pipelined = await asyncio.gather(
        *(engine.step(one, step_of(hidden[:, at : at + 3], at, 3)) for at in range(0, 12, 3))
    )
    whole = await engine.step(other, step_of(hidden, 0, 12))
    torch.testing.assert_close(
        torch.cat([tensor_from_wire(output.activations) for output in pipelined], 1),
        tensor_from_wire(whole.activations),
    )
    await chain.close()


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
async def test_closing_frees_the_weights(family: str, make_tiny: Any, load_chain: Any) -> None:
    """At once: a node that moves loads other blocks into the same memory."""
    (engine,) = load_chain(make_tiny(family), [(0, 6)]).engines
    cache = engine.reserve(request())
    await engine.step(cache, step_of(activations(1, 4), 0))
    layers = [weakref.ref(layer) for layer in engine._span.layers]
    await engine.close()
    assert [layer() for layer in layers] == [None] * 6
