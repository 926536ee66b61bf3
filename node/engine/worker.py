"""The one thread that owns the device, and its queue.

The event loop puts steps in and awaits their futures; it never waits for torch. The thread takes
what ``batching`` chooses, computes, and hands results back to the loop. Rules:

- An error concerns one step where it can be told apart (input or output not finite, bad position),
  and otherwise the steps of its batch; never the thread, never other sessions.
- A step that has not started can be withdrawn; one that runs is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from swarm.compute.devices import check_magnitude
from swarm.compute.wire_tensors import TORCH_DTYPES, tensor_from_wire, tensor_to_wire
from swarm.node.engine.adapted_layers import Segment
from swarm.node.engine.api import StepInput, StepOutput
from swarm.node.engine.batching import (
    SHORT_STEP_TOKENS,
    BatchLimits,
    Turns,
    WaitingStep,
    choose_batch,
)
from swarm.node.engine.cache import SpanCache
from swarm.node.engine.contention import ContentionMeter, ThreadGovernor
from swarm.node.engine.device_threads import DeviceThreads
from swarm.node.engine.freed_memory import return_freed_memory
from swarm.node.engine.ragged import RaggedBatch
from swarm.node.engine.span_loader import Span
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.tensors import WireTensor

_log = logging.getLogger(__name__)
_BUSY_WINDOW_S = 10.0
_FLOAT16_MAXIMUM = 65504.0
_ACTIVE_S = 0.5
"""A session whose last step is younger counts as active: its next step is worth waiting for."""
_GATHER_GAP = 0.5
"""How long an idle device waits for one more step, as a share of the last batch's time."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What ran in one batch, for metrics."""

    steps: int
    tokens: int
    compute_s: float
    longest_wait_s: float


T = TypeVar("T")
BatchObserver = Callable[[BatchReport], None]
Result = StepOutput | ProtocolError


@dataclass(slots=True, eq=False)
class _Job:
    cache: SpanCache
    step: StepInput
    waiting: WaitingStep
    future: asyncio.Future[StepOutput]
    queued_at_s: float = field(default_factory=time.perf_counter)


@dataclass(slots=True, eq=False)
class _Call:
    """Something short for the device thread to do between two batches."""

    cache: SpanCache | None
    function: Callable[[], Any]
    future: asyncio.Future[Any]


class BetweenShare:
    """How much of a busy device's time work gets that is not in a hurry. Pure."""

    SHARE = 0.25

    def __init__(self) -> None:
        self._credit_s = 0.0
        self._latest_s = 0.0
        self._steps_ran = False

    @property
    def is_due(self) -> bool:
        """Whether it has waited for so long that steps may wait for it: for one call, not more."""
        return self._steps_ran and self._credit_s > 0

    def ran_steps(self, duration_s: float) -> None:
        """A batch of steps took this long; the credit is bounded by what one call takes."""
        earned_s = duration_s * self.SHARE / (1 - self.SHARE)
        self._credit_s = min(self._credit_s + earned_s, self._latest_s)
        self._steps_ran = True

    def ran_between(self, duration_s: float) -> None:
        """A call took this long; what it takes while nobody waits is free."""
        self._latest_s = duration_s
        self._credit_s = max(-duration_s, self._credit_s - duration_s)
        self._steps_ran = False


class Worker:
    """Runs steps of one span. All methods are for the event loop; ``_run`` is the thread."""

    def __init__(self, span: Span, limits: BatchLimits, threads: int | None) -> None:
        self._span = span
        self._limits = limits
        self._threads = threads
        self._waiting: list[_Job] = []
        self._calls: deque[_Call] = deque()
        self._between: deque[_Call] = deque()
        self._share = BetweenShare()
        self._changed = threading.Condition()
        self._stopping = False
        self._turns = Turns()
        self._last_steps: dict[int, float] = {}
        self._last_compute_s = 0.0
        self._ran_long_step = False
        self._busy: deque[tuple[float, float]] = deque()
        self._observers: list[BatchObserver] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._meter: ContentionMeter | None = None

    @property
    def queued_steps(self) -> int:
        return len(self._waiting)

    @property
    def busy_fraction(self) -> float:
        """Share of the last 10 s in which the device worked."""
        since = time.perf_counter() - _BUSY_WINDOW_S
        while self._busy and self._busy[0][1] < since:
            self._busy.popleft()
        worked = sum(end - max(start, since) for start, end in tuple(self._busy))
        return min(1.0, worked / _BUSY_WINDOW_S)

    def observe(self, observer: BatchObserver) -> None:
        """Call ``observer`` on the event loop after each batch."""
        self._observers.append(observer)

    async def run(self, cache: SpanCache, step: StepInput) -> StepOutput:
        """Queue one step and wait for it. Cancelling withdraws it, or waits if it runs already."""
        loop = self._start()
        rows, tokens, _ = step.activations.shape
        blocks = (cache.request.first_block, cache.request.end_block)
        request = cache.request
        waiting = WaitingStep(
            id(cache), blocks, rows * tokens, payer=request.payer, priority=request.priority
        )
        job = _Job(cache, step, waiting, loop.create_future())
        with self._changed:
            if self._stopping:
                raise ProtocolError(ErrorCode.DRAINING, "the engine is closed")
            self._waiting.append(job)
            self._last_steps[id(cache)] = job.queued_at_s
            self._changed.notify()
        try:
            return await asyncio.shield(job.future)
        except asyncio.CancelledError:
            if not self._withdraw(job):
                await _finished(job.future)
            raise

    async def call(self, cache: SpanCache, function: Callable[[], T]) -> T:
        """Run ``function``, which is short, on the device thread between two batches.

        Other sessions' steps wait for one call at most. Cancelling waits for it.
        """
        loop = self._start()
        call = _Call(cache, function, loop.create_future())
        with self._changed:
            if self._stopping:
                raise ProtocolError(ErrorCode.DRAINING, "the engine is closed")
            cache.steps_running += 1
            self._calls.append(call)
            self._changed.notify()
        try:
            result: T = await asyncio.shield(call.future)
        except asyncio.CancelledError:
            await _finished(call.future)
            raise
        return result

    async def run_between(self, function: Callable[[], T]) -> T:
        """Run ``function`` when no step waits, and otherwise within its share of the time.

        For work that is not in a hurry. Steps may wait for one such call. Cancelling waits for it.
        """
        loop = self._start()
        call = _Call(None, function, loop.create_future())
        with self._changed:
            if self._stopping:
                raise ProtocolError(ErrorCode.DRAINING, "the engine is closed")
            self._between.append(call)
            self._changed.notify()
        try:
            result: T = await asyncio.shield(call.future)
        except asyncio.CancelledError:
            await _finished(call.future)
            raise
        return result

    def drop(self, cache: SpanCache) -> None:
        """Refuse the steps of ``cache`` that have not started."""
        with self._changed:
            dropped = [job for job in self._waiting if job.cache is cache]
            self._waiting = [job for job in self._waiting if job.cache is not cache]
            self._last_steps.pop(id(cache), None)
        for job in dropped:
            _refuse(job, ProtocolError(ErrorCode.UNKNOWN_SESSION, "the session was closed"))

    async def close(self) -> None:
        """Finish the running batch, refuse the rest, end the thread."""
        with self._changed:
            self._stopping = True
            dropped, self._waiting = self._waiting, []
            calls = [*self._calls, *self._between]
            self._calls.clear()
            self._between.clear()
            self._changed.notify()
        for call in calls:
            self._call_ended(call, None, ProtocolError(ErrorCode.DRAINING, "the engine is closing"))
        for job in dropped:
            _refuse(job, ProtocolError(ErrorCode.DRAINING, "the engine is closing"))
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            # Results that the thread has handed over just before its end.
            await asyncio.sleep(0)

    def _start(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(
                target=self._run, args=(self._loop,), name="swarm-device", daemon=True
            )
            self._thread.start()
        return self._loop

    def _withdraw(self, job: _Job) -> bool:
        with self._changed:
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
        job.future.cancel()
        return True

    # --- the device thread --------------------------------------------------------------------
    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        threads = self._threads or torch.get_num_threads()
        team = DeviceThreads()
        team.use(threads)
        meter = ContentionMeter(ThreadGovernor(threads), team.use, team.waited_s)
        self._meter = meter
        while jobs := self._take():
            started_s = time.perf_counter()
            meter.begins(started_s)
            try:
                results = compute_batch(self._span, [(job.cache, job.step) for job in jobs])
            except Exception:  # whatever happened: these steps fail, the thread lives on
                _log.exception("a batch of %d steps failed", len(jobs))
                failed = ProtocolError(ErrorCode.INTERNAL, "the batch failed")
                results = [failed] * len(jobs)
            ended_s = time.perf_counter()
            self._last_compute_s = ended_s - started_s
            self._share.ran_steps(ended_s - started_s)
            self._ran_long_step |= any(job.waiting.tokens > SHORT_STEP_TOKENS for job in jobs)
            report = BatchReport(
                steps=len(jobs),
                tokens=sum(job.waiting.tokens for job in jobs),
                compute_s=ended_s - started_s,
                longest_wait_s=max(started_s - job.queued_at_s for job in jobs),
            )
            # The loop may be closed when a program ends without closing the engine.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._deliver, jobs, results, report, started_s, ended_s)
            meter.computed(ended_s, ended_s - started_s)
            self._span.layouts.after_step(report.tokens)

    def _take(self) -> list[_Job]:
        """Wait for the next batch; empty at the end."""
        with self._changed:
            while not self._stopping:
                if self._calls:
                    self._run_call(self._calls.popleft())
                if self._between and (not self._waiting or self._share.is_due):
                    self._run_between()
                    continue
                if not self._waiting:
                    self._give_back_memory()
                    self._changed.wait_for(
                        lambda: self._waiting or self._calls or self._between or self._stopping
                    )
                    if not self._waiting:
                        continue
                    self._gather()
                waiting = [job.waiting for job in self._waiting]
                chosen = set(
                    choose_batch(
                        waiting,
                        self._limits,
                        self._turns.served(waiting),
                        oldest_first=self._turns.is_for_the_oldest,
                    )
                )
                jobs = [job for index, job in enumerate(self._waiting) if index in chosen]
                self._waiting = [
                    job for index, job in enumerate(self._waiting) if index not in chosen
                ]
                self._turns.serve([job.waiting for job in jobs])
                for job in jobs:
                    job.cache.steps_running += 1
                if jobs:  # none when the waiting one was withdrawn meanwhile
                    return jobs
        return []

    def _give_back_memory(self) -> None:
        """After a long step, and only once nobody waits: its activations were megabytes."""
        if self._ran_long_step:
            self._ran_long_step = False
            self._changed.release()
            try:
                return_freed_memory()
            finally:
                self._changed.acquire()

    def _run_between(self) -> None:
        started_s = time.perf_counter()
        self._run_call(self._between.popleft())
        ended_s = time.perf_counter()
        self._share.ran_between(ended_s - started_s)
        self._busy.append((started_s, ended_s))
        if self._meter is not None:
            self._meter.computed(ended_s, ended_s - started_s)

    def _run_call(self, call: _Call) -> None:
        """One call, while the event loop may add steps."""
        self._changed.release()
        try:
            result, error = call.function(), None
        except Exception as raised:
            result, error = None, raised
        finally:
            self._changed.acquire()
        with contextlib.suppress(RuntimeError):  # the loop may be closed, as after a batch
            call.future.get_loop().call_soon_threadsafe(self._call_ended, call, result, error)

    def _call_ended(self, call: _Call, result: Any, error: Exception | None) -> None:
        """On the event loop: wake who waits, and free the cache if it was closed meanwhile."""
        if call.cache is not None:
            with self._changed:
                call.cache.steps_running -= 1
            call.cache.release_if_idle()
        if call.future.done():
            return
        if error is None:
            call.future.set_result(result)
        else:
            call.future.set_exception(error)

    def _gather(self) -> None:
        """Give steps that arrive in a row, but one by one, the time to meet in one batch.

        Without it the first of them runs alone and the others wait for it. The device waits while
        steps keep coming, each within a gap, and no longer than one batch takes. A lone session
        never waits.
        """
        since = time.perf_counter() - _ACTIVE_S
        self._last_steps = {key: at for key, at in self._last_steps.items() if at > since}
        until_s = time.perf_counter() + self._last_compute_s
        gap_s = _GATHER_GAP * self._last_compute_s
        while not self._stopping and len(self._waiting) < len(self._last_steps):
            here = len(self._waiting)
            arrived = self._changed.wait_for(
                lambda: self._stopping or len(self._waiting) != here,  # noqa: B023 (used at once)
                timeout=min(gap_s, until_s - time.perf_counter()),
            )
            if not arrived:
                break

    def _deliver(
        self,
        jobs: list[_Job],
        results: list[WireTensor | ProtocolError],
        report: BatchReport,
        started_s: float,
        ended_s: float,
    ) -> None:
        """On the event loop: wake those who wait."""
        with self._changed:
            for job in jobs:
                job.cache.steps_running -= 1
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, ProtocolError):
                _refuse(job, result)
            elif not job.future.done():
                job.future.set_result(
                    StepOutput(
                        activations=result,
                        queue_us=int((started_s - job.queued_at_s) * 1e6),
                        compute_us=int((ended_s - started_s) * 1e6),
                    )
                )
            job.cache.release_if_idle()
        self._busy.append((started_s, ended_s))
        for observer in self._observers:
            observer(report)


async def _finished(future: asyncio.Future[Any]) -> None:
    """Wait for a running step through further cancellations; it takes one batch at most."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([future])
    future.exception()  # nobody else will look at it


def _refuse(job: _Job, error: ProtocolError) -> None:
    if not job.future.done():
        job.future.set_exception(error)


@torch.inference_mode()
def compute_batch(
    span: Span, steps: list[tuple[SpanCache, StepInput]]
) -> list[WireTensor | ProtocolError]:
    """One batch of steps of different sessions with the same blocks; one result for each.

    A step whose input or output is refused gets its error here; the others are not affected.
    """
    results: dict[int, WireTensor | ProtocolError] = {}
    running: list[int] = []
    inputs: list[torch.Tensor] = []
    for index, (cache, step) in enumerate(steps):
        try:
            inputs.append(_prepare(span, cache, step))
            running.append(index)
        except ProtocolError as error:
            results[index] = error
    if running:
        # Sessions with the same adapter lie side by side.
        order = sorted(range(len(running)), key=lambda place: _adapter_id(steps[running[place]][0]))
        running, inputs = [running[place] for place in order], [inputs[place] for place in order]
        caches = [steps[index][0] for index in running]
        positions = [steps[index][1].position for index in running]
        tokens = [steps[index][1].activations.shape[1] for index in running]
        batch = RaggedBatch(caches, positions, tokens)
        flat = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
        request = caches[0].request
        first_layer, end_layer = (
            block - span.first_block for block in (request.first_block, request.end_block)
        )
        with span.adapted.active(_segments(caches, tokens), first_layer, end_layer):
            output = span.forward(
                flat.unsqueeze(0), batch, request.first_block, request.end_block
            ).squeeze(0)
        start = 0
        for index, cache, count in zip(running, caches, tokens, strict=True):
            end = start + cache.request.rows * count
            results[index] = _finish(cache, steps[index][1], output[start:end])
            start = end
    return [results[index] for index in range(len(steps))]


def _adapter_id(cache: SpanCache) -> bytes:
    return b"" if cache.adapter is None else cache.adapter.adapter_id


def _segments(caches: Sequence[SpanCache], tokens: Sequence[int]) -> list[Segment]:
    """The rows of sessions with adapters, where sessions with the same one are neighbours."""
    segments: list[Segment] = []
    end = 0
    for cache, count in zip(caches, tokens, strict=True):
        start, end = end, end + cache.request.rows * count
        if cache.adapter is None:
            continue
        if segments and segments[-1].adapter is cache.adapter:
            start = segments.pop().start
        segments.append(Segment(start, end, cache.adapter))
    return segments


def _prepare(span: Span, cache: SpanCache, step: StepInput) -> torch.Tensor:
    """Check a step, bring its cache into the right state; ``[rows * tokens, hidden]``."""
    rows, tokens, hidden_size = step.activations.shape
    if cache.closed:
        raise ProtocolError(ErrorCode.UNKNOWN_SESSION, "the session was closed")
    if step.position > cache.length or step.position + tokens > cache.request.maximum_tokens:
        raise ProtocolError(
            ErrorCode.BAD_POSITION, f"position {step.position} with {cache.length} cached"
        )
    hidden = tensor_from_wire(step.activations).view(rows * tokens, hidden_size)
    if not check_magnitude(hidden):
        raise ProtocolError(ErrorCode.INPUT_NOT_FINITE)
    cache.length = step.position
    if step.row_order:
        cache.reorder(step.row_order)
    return hidden.to(device=span.device, dtype=span.dtype)


def _finish(cache: SpanCache, step: StepInput, output: torch.Tensor) -> WireTensor | ProtocolError:
    """Check and convert one session's ``[rows * tokens, hidden]``; its cache grows on success."""
    rows, tokens, hidden_size = step.activations.shape
    wanted = output.view(rows, tokens, hidden_size)[:, tokens - step.output_tokens :]
    limits = [_FLOAT16_MAXIMUM] if TORCH_DTYPES[cache.request.wire_dtype] == torch.float16 else []
    if not check_magnitude(wanted, *limits):
        return ProtocolError(ErrorCode.NOT_FINITE)
    cache.length = step.position + tokens
    return tensor_to_wire(wanted, cache.request.wire_dtype)
