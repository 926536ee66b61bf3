"""Training sessions of one engine: admission, micro-batches block by block, optimizer.

What is computed on the device thread is one block of one micro-batch at a time, in the gaps between
steps of inference (``Worker.run_between``). Each block has a graph of its own: the gradient is
passed from one to the one before by hand, so that a block's activations can be dropped and computed
again. As many are kept as the session's memory allows; of the others only the input.

Memory comes out of the budget of the caches. A session reserves at its opening: its adapter, the
optimizer's state, the inputs of all blocks for all micro-batches in flight, one graph, and what is
to be had for further graphs. Nothing is evicted under it, and it can take no more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import TypeVar

import torch

from swarm.catalogue.checkpoint import Checkpoint
from swarm.compute.devices import check_magnitude
from swarm.compute.optimizers import NamedOptimizer, base_name, state_bytes
from swarm.compute.training_terms import TrainingTerms
from swarm.compute.wire_tensors import TORCH_DTYPES, tensor_from_wire, tensor_to_wire
from swarm.node.engine.adapted_linear import AdapterShard
from swarm.node.engine.cache import CacheBudget
from swarm.node.engine.freed_memory import return_freed_memory
from swarm.node.engine.span_loader import Span
from swarm.node.engine.trainable_span import (
    Linears,
    TrainableSpan,
    graph_bytes_per_token,
    linear_sizes,
    needs_copy,
)
from swarm.node.engine.training_api import MicroBatch, TrainingRequest
from swarm.node.engine.training_batch import TrainingBatch
from swarm.node.engine.worker import Worker
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.tensors import ITEM_BYTES, DType, WireTensor
from swarm.threads import run_in_own_thread

_log = logging.getLogger(__name__)

T = TypeVar("T")

_LINGER_S = 60.0
"""How long the copy of the weights stays when nobody trains: a chain that heals is back at once."""
_GRAPH_SHARE = 0.5
"""Of the memory that is free, how much a session may take to keep activations."""


@dataclass(slots=True, eq=False)
class _Kept:
    """What is kept of a micro-batch between its forward and its backward pass."""

    batch: TrainingBatch
    shard: AdapterShard | None
    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor | None] = field(default_factory=list)
    graph_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Reservation:
    total_bytes: int
    graph_bytes: int
    """Of these, for graphs beyond the one that is always needed."""
    graph_bytes_per_token: int


class SpanTraining:
    """All training of one engine. Methods are for the event loop."""

    def __init__(
        self, checkpoint: Checkpoint, span: Span, worker: Worker, budget: CacheBudget
    ) -> None:
        self._checkpoint = checkpoint
        self._span = span
        self._worker = worker
        self._budget = budget
        self._linears: Linears | None = None
        self._trainable: TrainableSpan | None = None
        self._weights_bytes = 0
        self._loading = asyncio.Lock()
        self._sessions: set[SpanTrainingSession] = set()
        self._lingering: asyncio.TimerHandle | None = None
        self._closed = False

    async def open(self, request: TrainingRequest) -> SpanTrainingSession:
        """Raises ProtocolError; see ``training_api.TrainingEngine``."""
        span = self._span
        if not span.first_block <= request.first_block < request.end_block <= span.end_block:
            raise ProtocolError(ErrorCode.BLOCKS_NOT_HOSTED)
        async with self._loading:
            if self._linears is None:
                self._linears = await run_in_own_thread(
                    partial(linear_sizes, self._checkpoint, span.first_block, span.end_block)
                )
            own = {
                block: self._linears[block]
                for block in range(request.first_block, request.end_block)
            }
            reservation = self._reserve(request, own)
            try:
                trainable = await self._load()
                shard = AdapterShard(
                    request.terms.adapter, request.terms.dropout, request.terms.seed
                )
                await run_in_own_thread(partial(_fill, shard, trainable, own))
            except BaseException:
                self._budget.release(reservation.total_bytes)
                self._linger()
                raise
        session = SpanTrainingSession(
            request, span, trainable, shard, self._worker, reservation, self._ended
        )
        self._sessions.add(session)
        return session

    async def close(self) -> None:
        """The engine ends: end all sessions and free the weights."""
        self._closed = True
        for session in tuple(self._sessions):
            await session.close()
        self._free_weights()

    def _reserve(self, request: TrainingRequest, linears: Linears) -> _Reservation:
        terms, span = request.terms, self._span
        blocks = len(linears)
        item_bytes = span.dtype.itemsize
        per_token = graph_bytes_per_token(
            linears, span.hidden_size, item_bytes, _expert_outputs(self._checkpoint)
        )
        tokens_in_flight = terms.maximum_tokens * terms.micro_batches_in_flight
        inputs_bytes = (blocks + 3) * tokens_in_flight * span.hidden_size * item_bytes
        one_graph_bytes = per_token * terms.maximum_tokens
        adapter_bytes = state_bytes(terms.optimizer.kind, adapter_elements(terms, linears))
        own_bytes = adapter_bytes + inputs_bytes + one_graph_bytes
        if request.audited_micro_batches:
            # The states before and after a step, four tensors of each micro-batch that is kept,
            # and two of those in flight.
            tensors = 4 * request.audited_micro_batches + 2 * terms.micro_batches_in_flight
            token_bytes = span.hidden_size * ITEM_BYTES[request.wire_dtype]
            own_bytes += 2 * adapter_bytes + tensors * terms.maximum_tokens * token_bytes
        if self._trainable is None and not self._weights_bytes and needs_copy(span):
            # Reserved here and not with the session: it stays for the next one.
            self._weights_bytes = self._budget.admit_bytes(span.weight_bytes)
        try:
            self._budget.admit_bytes(own_bytes)
        except ProtocolError:
            self._linger()
            raise
        wanted = per_token * tokens_in_flight * blocks - one_graph_bytes
        further = max(0, min(wanted, int(self._budget.free_bytes * _GRAPH_SHARE)))
        self._budget.admit_bytes(further)
        return _Reservation(own_bytes + further, further, per_token)

    async def _load(self) -> TrainableSpan:
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        if self._trainable is None:
            _log.info("loading blocks for training")
            self._trainable = await run_in_own_thread(
                partial(TrainableSpan.load, self._checkpoint, self._span)
            )
        return self._trainable

    def _ended(self, session: SpanTrainingSession) -> None:
        self._sessions.discard(session)
        self._budget.release(session.reserved_bytes)
        self._linger()

    def _linger(self) -> None:
        if self._sessions or self._closed or self._lingering is not None:
            return
        loop = asyncio.get_running_loop()
        self._lingering = loop.call_later(_LINGER_S, self._free_weights)

    def _free_weights(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        if self._sessions or self._loading.locked():
            return
        if self._trainable is not None:
            self._trainable.release()
            self._trainable = None
            return_freed_memory()
        self._budget.release(self._weights_bytes)
        self._weights_bytes = 0


class SpanTrainingSession:
    """Implements ``training_api.TrainingSession``."""

    def __init__(
        self,
        request: TrainingRequest,
        span: Span,
        trainable: TrainableSpan,
        shard: AdapterShard,
        worker: Worker,
        reservation: _Reservation,
        ended: Callable[[SpanTrainingSession], None],
    ) -> None:
        self._request = request
        self._span = span
        self._trainable: TrainableSpan | None = trainable
        self._shard = shard
        self._worker = worker
        self._reservation = reservation
        self._ended = ended
        self._optimizer = NamedOptimizer(shard.parameters(), request.terms.optimizer)
        self._shapes = self._optimizer.state_shapes()
        self._kept: dict[int, _Kept] = {}
        self._graph_bytes = 0
        self._order = asyncio.Lock()
        self._closed = False

    @property
    def reserved_bytes(self) -> int:
        return self._reservation.total_bytes

    @property
    def dtype_class(self) -> str:
        return str(self._span.dtype).removeprefix("torch.")

    @property
    def kept_graph_bytes(self) -> int:
        """Estimated size of the activations kept now, beyond the inputs of blocks."""
        return self._graph_bytes

    @property
    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    async def forward(self, micro_batch: MicroBatch, activations: WireTensor) -> WireTensor:
        async with self._order:
            hidden = self._received(activations)
            shard = self._shard if micro_batch.use_adapter else None
            kept = _Kept(TrainingBatch(micro_batch.lengths), shard)
            if micro_batch.needs_gradient:
                self._kept[micro_batch.number] = kept
            try:
                for block in range(self._request.first_block, self._request.end_block):
                    hidden = await self._compute(
                        partial(self._forward_block, block, hidden, kept, micro_batch)
                    )
                return self._sent(hidden)
            except BaseException:
                self._forget(micro_batch.number)
                raise

    async def backward(self, number: int, gradients: WireTensor) -> WireTensor:
        async with self._order:
            kept = self._kept.get(number)
            if kept is None:
                raise ProtocolError(ErrorCode.UNKNOWN_MICRO_BATCH)
            if gradients.shape[1] != kept.batch.total_tokens:
                raise ProtocolError(ErrorCode.BAD_TENSOR, "gradients of another length")
            try:
                gradient = self._received(gradients)
                for block in reversed(range(self._request.first_block, self._request.end_block)):
                    gradient = await self._compute(
                        partial(self._backward_block, block, gradient, kept, number)
                    )
                return self._sent(gradient)
            finally:
                self._forget(number)

    async def forget(self, number: int) -> None:
        async with self._order:
            self._forget(number)

    async def gradient_square_sum(self) -> float:
        async with self._order:
            return await self._compute(self._optimizer.square_sum)

    async def apply(self, scale: float, learning_rate: float) -> None:
        def change() -> None:
            self._optimizer.apply(scale, learning_rate)
            self._shard.changed()

        async with self._order:
            await self._compute(change)

    async def export_state(self) -> Sequence[tuple[str, WireTensor]]:
        def copy() -> list[tuple[str, WireTensor]]:
            return [
                (name, tensor_to_wire(tensor.reshape(1, 1, -1).clone(), DType.FLOAT32))
                for name, tensor in self._optimizer.export_state().items()
            ]

        async with self._order:
            return await self._compute(copy)

    async def import_state(self, tensors: Mapping[str, WireTensor]) -> None:
        def take_over() -> None:
            self._optimizer.import_state(values)
            self._shard.changed()

        values = {name: self._state_tensor(name, wire) for name, wire in tensors.items()}
        if missing := set(map(base_name, self._shapes)) - set(values):
            raise ProtocolError(ErrorCode.BAD_STATE, f"no {min(missing)}")
        async with self._order:
            for number in tuple(self._kept):
                self._forget(number)
            await self._compute(take_over)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        async with self._order:  # what computes still needs it all
            self._kept.clear()
            self._optimizer = NamedOptimizer({}, self._request.terms.optimizer)
            self._shard.pairs.clear()
            self._trainable = None
            self._ended(self)

    def _received(self, wire: WireTensor) -> torch.Tensor:
        if self._closed:
            raise ProtocolError(ErrorCode.UNKNOWN_SESSION, "the session was closed")
        tensor = tensor_from_wire(wire)
        if not check_magnitude(tensor):
            raise ProtocolError(ErrorCode.INPUT_NOT_FINITE)
        return tensor.to(device=self._span.device, dtype=self._span.dtype)

    def _sent(self, tensor: torch.Tensor) -> WireTensor:
        wire_dtype = self._request.wire_dtype
        limits = [65504.0] if TORCH_DTYPES[wire_dtype] == torch.float16 else []
        if not check_magnitude(tensor, *limits):
            raise ProtocolError(ErrorCode.NOT_FINITE)
        return tensor_to_wire(tensor, wire_dtype)

    async def _compute(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise ProtocolError(ErrorCode.UNKNOWN_SESSION, "the session was closed")
        return await self._worker.run_between(work)

    def _state_tensor(self, name: str, wire: WireTensor) -> torch.Tensor:
        shape = self._shapes.get(name)
        if shape is None or prod(wire.shape) != prod(shape) or wire.dtype is not DType.FLOAT32:
            raise ProtocolError(ErrorCode.BAD_STATE, name)
        tensor = tensor_from_wire(wire)
        if not check_magnitude(tensor):
            raise ProtocolError(ErrorCode.BAD_STATE, f"{name} is not finite")
        return tensor.view(shape)

    def _forget(self, number: int) -> None:
        kept = self._kept.pop(number, None)
        if kept is not None:
            self._graph_bytes -= kept.graph_bytes

    # --- on the device thread
    def _forward_block(
        self, block: int, hidden: torch.Tensor, kept: _Kept, micro_batch: MicroBatch
    ) -> torch.Tensor:
        trainable = self._trainable
        if trainable is None:
            raise ProtocolError(ErrorCode.UNKNOWN_SESSION, "the session was closed")
        if not micro_batch.needs_gradient:
            with torch.no_grad():
                return trainable.forward(block, hidden, kept.batch, kept.shard, micro_batch.number)
        size_bytes = self._reservation.graph_bytes_per_token * kept.batch.total_tokens
        keeps = self._graph_bytes + size_bytes <= self._reservation.graph_bytes
        hidden = hidden.detach().requires_grad_(keeps)
        with torch.set_grad_enabled(keeps):
            output = trainable.forward(block, hidden, kept.batch, kept.shard, micro_batch.number)
        kept.inputs.append(hidden)
        kept.outputs.append(output if keeps else None)
        if keeps:
            kept.graph_bytes += size_bytes
            self._graph_bytes += size_bytes
        return output.detach()

    def _backward_block(
        self, block: int, gradient: torch.Tensor, kept: _Kept, number: int
    ) -> torch.Tensor:
        trainable = self._trainable
        if trainable is None:
            raise ProtocolError(ErrorCode.UNKNOWN_SESSION, "the session was closed")
        hidden, output = kept.inputs.pop(), kept.outputs.pop()
        with torch.enable_grad():
            if output is None:
                hidden = hidden.detach().requires_grad_()
                output = trainable.forward(block, hidden, kept.batch, kept.shard, number)
            trained = [] if kept.shard is None else list(kept.shard.parameters(block).values())
            into_input, *into_trained = torch.autograd.grad(
                output, [hidden, *trained], gradient, allow_unused=True
            )
        for parameter, addition in zip(trained, into_trained, strict=True):
            if addition is None:
                continue
            if parameter.grad is None:
                parameter.grad = addition
            else:
                parameter.grad += addition
        return into_input


def adapter_elements(terms: TrainingTerms, linears: Linears) -> int:
    """How many numbers are trained in these blocks."""
    return sum(
        prod(shape)
        for block in linears.values()
        for shapes in terms.adapter.tensor_shapes(block).values()
        for shape in shapes.values()
    )


def _fill(shard: AdapterShard, trainable: TrainableSpan, blocks: Linears) -> None:
    for block in blocks:
        shard.add_block(block, trainable.linears[block])


def _expert_outputs(checkpoint: Checkpoint) -> int:
    """What the experts of a block that a token goes through put out together."""
    config = checkpoint.text_config
    if not config.get("num_local_experts"):
        return 0
    experts = int(config.get("num_experts_per_tok") or 1)
    return experts * (2 * int(config["intermediate_size"]) + int(config["hidden_size"]))
