"""One training session over all hops of a chain: activations down, gradients up, optimizer steps.

A chain that breaks is not mended: its hops hold gradients and optimizer states that have to be of
one step, so whoever trains opens a new chain and restores the last common state (``trainer``).
Activations and gradients go from hop to hop; the client sends and receives at the ends only.

One task, :meth:`TrainingChain.run`, owns all reading; any task may call the other methods. When the
chain fails, all of them raise the one reason.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from swarm.client.finetune.link import TrainingLink
from swarm.client.healing import could_not_open
from swarm.client.link import HopFailed
from swarm.client.planner import Planner
from swarm.client.results import require_finite
from swarm.compute.lora import AdapterShape, Method
from swarm.compute.training_terms import TrainingTerms
from swarm.ports import Clock, Transport
from swarm.protocol.errors import (
    ErrorCode,
    NetworkError,
    NoRouteError,
    ProtocolError,
    SwarmError,
    UsageError,
)
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import (
    ApplyGradients,
    AskGradientNorm,
    AskState,
    BackwardPart,
    Draining,
    ForgetMicroBatch,
    ForwardPart,
    GradientNorm,
    GradientsApplied,
    Message,
    OpenTraining,
    Ping,
    SetRoute,
    StateRestored,
)
from swarm.protocol.policy import Policy
from swarm.protocol.tensors import DType, WireTensor
from swarm.routing import ChainPlan
from swarm.routing import Hop as PlannedHop
from swarm.training_parts import TensorAssembly, backward_parts, forward_parts, state_messages

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

OPEN_ATTEMPTS = 4
ROUTE_VERSION = 1


@dataclass(frozen=True, slots=True)
class TrainingTimeouts:
    open_s: float = 180.0
    """A node may have to load its blocks once more for training."""
    answer_s: float = 60.0
    """For steps of the optimizer and the like, beyond the work that is queued before them."""
    ping_interval_s: float = 1.0
    silence_s: float = 8.0
    """A hop that answers no ping for so long is gone."""
    stall_s: float = 300.0
    """Nothing came back for so long although something should."""


@dataclass(frozen=True, slots=True)
class TrainingChainRequest:
    """What a chain is opened for."""

    model_revision: bytes
    number_of_blocks: int
    hidden_size: int
    wire_dtype: DType
    terms: TrainingTerms
    maximum_state_elements_per_block: int
    """More elements in a block's state are refused."""
    policy: Policy | None = None
    """Which peers may see anything of the training; None: all. Every hop checks it as well."""


class TrainingChain:
    """All hops of one training session."""

    def __init__(
        self,
        transport: Transport,
        planner: Planner,
        request: TrainingChainRequest,
        *,
        clock: Clock,
        timeouts: TrainingTimeouts | None = None,
    ) -> None:
        self._transport = transport
        self._planner = planner
        self._request = request
        self._clock = clock
        self._timeouts = timeouts or TrainingTimeouts()
        self._excluded: list[PeerId] = []
        self._links: list[TrainingLink] = []
        self._plan = ChainPlan((), 0.0)
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closing = asyncio.Event()
        self._ended = asyncio.Event()
        self._failure: SwarmError | None = None
        self._outputs: dict[int, asyncio.Future[WireTensor]] = {}
        self._gradients: dict[int, asyncio.Future[WireTensor]] = {}
        self._tokens: dict[int, int] = {}
        self._waiting_for_gradient: set[int] = set()
        self._arriving: dict[type[Message], tuple[int, TensorAssembly]] = {}
        self._sending_down = asyncio.Lock()
        self._sending_up = asyncio.Lock()
        self._progress_s = 0.0
        self.draining = False
        """A node of the chain asks to be replaced."""

    @property
    def plan(self) -> ChainPlan:
        return self._plan

    @property
    def failure(self) -> SwarmError | None:
        return self._failure

    @property
    def tensors_relayed(self) -> int:
        """Tensors that went between the client and hops that are neither first nor last.

        Snapshots count; between two of them it must not grow.
        """
        return sum(
            link.connection.tensors_received + link.connection.tensors_sent
            for link in self._links[1:-1]
        )

    @property
    def bytes_sent(self) -> int:
        return sum(link.connection.bytes_sent for link in self._links)

    # --- life
    async def run(self) -> None:
        """Open the chain and serve it until :meth:`close` or until it fails."""
        try:
            await self._open_all()
            self._progress_s = self._clock.monotonic_s()
            async with asyncio.TaskGroup() as tasks:
                own = [tasks.create_task(self._read(link)) for link in self._links]
                own.append(tasks.create_task(self._ping_all()))
                try:
                    await self._join()
                    if not self._opened.done():
                        self._opened.set_result(None)
                    await self._closing.wait()
                except SwarmError as error:
                    self._fail(error)
                finally:
                    for task in own:
                        task.cancel()
        except SwarmError as error:
            self._fail(error)
        finally:
            self._fail(NetworkError("the training session is closed"))
            await asyncio.gather(*(link.close() for link in self._links))
            self._ended.set()

    async def opened(self) -> None:
        """Wait until it is. Raises NoRouteError or NetworkError."""
        await asyncio.shield(self._opened)

    async def close(self) -> None:
        """End the session on all hops; a second call does nothing."""
        self._closing.set()
        await self._ended.wait()

    def _fail(self, error: SwarmError) -> None:
        if self._failure is not None:
            return
        self._failure = error
        waiting: list[asyncio.Future[WireTensor]] = [
            *self._outputs.values(),
            *self._gradients.values(),
        ]
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody may be waiting
        for link in self._links:
            link.fail(error)
        if not self._opened.done():
            self._opened.set_exception(error)
            self._opened.exception()
        self._closing.set()

    def _hop_failed(self, link: TrainingLink, cause: SwarmError) -> None:
        failure = HopFailed(link.hop, cause)
        log.info("training: %s", failure)
        self._fail(failure)

    async def _open_all(self) -> None:
        failures: list[HopFailed] = []
        last: SwarmError | None = None
        request = self._request
        while len(failures) < OPEN_ATTEMPTS:
            try:
                plan = await self._planner.plan(
                    0, request.number_of_blocks, excluded=self._excluded
                )
            except NoRouteError as error:
                last = error
                break
            opening = [self._open(plan, index) for index in range(len(plan.hops))]
            results = await asyncio.gather(*opening, return_exceptions=True)
            links = [result for result in results if isinstance(result, TrainingLink)]
            if len(links) == len(results):
                self._links, self._plan = links, plan
                return
            await asyncio.gather(*(link.close() for link in links))
            for result in results:
                if isinstance(result, HopFailed):
                    failures.append(result)
                    self._excluded.append(result.peer_id)
                elif isinstance(result, BaseException):
                    raise result
        raise could_not_open(failures, last)

    async def _open(self, plan: ChainPlan, index: int) -> TrainingLink:
        hop = plan.hops[index]
        previous = self._transport.peer_id if index == 0 else plan.hops[index - 1].peer_id
        return await TrainingLink.open(
            self._transport,
            hop,
            _open_message(self._request, hop, previous),
            state_elements=(
                self._request.maximum_state_elements_per_block * (hop.end_block - hop.first_block)
            ),
            clock=self._clock,
            timeout_s=self._timeouts.open_s,
            only_for=None if self._request.policy is None else self._request.policy.check,
        )

    async def _join(self) -> None:
        """Tell each hop who comes next."""
        routes = []
        for link, following in zip(self._links, [*self._links[1:], None], strict=True):
            message = SetRoute(
                route_version=ROUTE_VERSION,
                next_peer=following.hop.peer_id if following else "",
                next_session_id=following.session_id if following else b"",
            )
            routes.append(link.set_route(message, self._timeouts.answer_s))
        await asyncio.gather(*routes)

    async def _ping_all(self) -> None:
        nonce = 0
        while not self._closing.is_set():
            slept_s = self._clock.monotonic_s()
            await self._clock.sleep(self._timeouts.ping_interval_s)
            now_s = self._clock.monotonic_s()
            if now_s - slept_s > self._timeouts.ping_interval_s + self._timeouts.silence_s / 2:
                for link in self._links:  # it was this process that did not listen
                    link.heard_s = now_s
            for link in self._links:
                if now_s - link.heard_s > self._timeouts.silence_s:
                    self._hop_failed(link, NetworkError("does not answer"))
                    return
                nonce += 1
                link.ping(Ping(nonce=nonce))
            if not (self._outputs or self._gradients):
                self._progress_s = now_s
            if now_s - self._progress_s > self._timeouts.stall_s:
                self._fail(NetworkError("the chain is not getting on"))
                return

    # --- reading
    async def _read(self, link: TrainingLink) -> None:
        try:
            while True:
                message = await link.receive()
                self._progress_s = self._clock.monotonic_s()
                match message:
                    case ForwardPart() if link is self._links[-1]:
                        self._arrived(
                            ForwardPart,
                            message.micro_batch,
                            message.first_token,
                            message.activations,
                            self._outputs,
                        )
                    case BackwardPart() if link is self._links[0]:
                        self._arrived(
                            BackwardPart,
                            message.micro_batch,
                            message.first_token,
                            message.gradients,
                            self._gradients,
                        )
                    case Draining():
                        self.draining = True
                    case _:
                        raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(message).__name__)
        except SwarmError as error:
            self._hop_failed(link, error)

    def _arrived(
        self,
        kind: type[Message],
        number: int,
        first_token: int,
        part: WireTensor,
        waiting: dict[int, asyncio.Future[WireTensor]],
    ) -> None:
        future = waiting.get(number)
        if future is None:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "nobody asked for this")
        require_finite(part)
        begun, assembly = self._arriving.get(kind) or (
            number,
            TensorAssembly(
                self._tokens[number], self._request.hidden_size, self._request.wire_dtype
            ),
        )
        if begun != number:
            raise ProtocolError(ErrorCode.GAP, "a micro-batch is cut short")
        self._arriving[kind] = (begun, assembly)
        whole = assembly.add(first_token, part)
        if whole is None:
            return
        del self._arriving[kind]
        del waiting[number]
        if number not in self._waiting_for_gradient or kind is BackwardPart:
            del self._tokens[number]
        if not future.done():
            future.set_result(whole)

    # --- micro-batches
    async def start_forward(
        self,
        number: int,
        lengths: Sequence[int],
        activations: WireTensor,
        *,
        use_adapter: bool = True,
        needs_gradient: bool = True,
    ) -> asyncio.Future[WireTensor]:
        """Send ``[1, sum(lengths), hidden]``; the future has the last block's output.

        Numbers must grow from call to call. Raises what the chain failed of.
        """
        self._check_alive()
        terms = self._request.terms
        tokens = sum(lengths)
        if activations.shape != (1, tokens, self._request.hidden_size) or min(lengths) < 1:
            raise UsageError(f"lengths {tuple(lengths)} do not fit {activations.shape}")
        if tokens > terms.maximum_tokens:
            raise UsageError(
                f"a micro-batch of {tokens} tokens; the session has room for {terms.maximum_tokens}"
            )
        if len(self._waiting_for_gradient) >= terms.micro_batches_in_flight:
            raise UsageError(
                f"{terms.micro_batches_in_flight} micro-batches wait for their gradients already"
            )
        future: asyncio.Future[WireTensor] = asyncio.get_running_loop().create_future()
        async with self._sending_down:
            self._outputs[number] = future
            self._tokens[number] = tokens
            if needs_gradient:
                self._waiting_for_gradient.add(number)
            for message in forward_parts(
                number,
                tuple(lengths),
                activations,
                use_adapter=use_adapter,
                needs_gradient=needs_gradient,
            ):
                await self._send(self._links[0], message)
        return future

    async def forward(
        self,
        number: int,
        lengths: Sequence[int],
        activations: WireTensor,
        *,
        use_adapter: bool = True,
        needs_gradient: bool = True,
    ) -> WireTensor:
        """The output of :meth:`start_forward`."""
        return await (
            await self.start_forward(
                number,
                lengths,
                activations,
                use_adapter=use_adapter,
                needs_gradient=needs_gradient,
            )
        )

    async def backward(self, number: int, gradients: WireTensor) -> WireTensor:
        """The gradient of the outputs, ``[1, tokens, hidden]``, to that of the inputs."""
        self._check_alive()
        future: asyncio.Future[WireTensor] = asyncio.get_running_loop().create_future()
        async with self._sending_up:
            self._gradients[number] = future
            for message in backward_parts(number, gradients):
                await self._send(self._links[-1], message)
        try:
            return await future
        finally:
            self._waiting_for_gradient.discard(number)

    async def forget(self, number: int) -> None:
        """No gradient will be sent for a micro-batch whose output has come."""
        self._waiting_for_gradient.discard(number)
        self._tokens.pop(number, None)
        if self._failure is None:
            for link in self._links:
                await self._send(link, ForgetMicroBatch(micro_batch=number))

    # --- steps of the optimizer
    async def optimizer_step(
        self,
        step: int,
        micro_batches: int,
        *,
        learning_rate: float,
        maximum_norm: float,
        own_square_sum: float = 0.0,
    ) -> tuple[float, float]:
        """Clip by the global norm and let all hops take step ``step``.

        ``own_square_sum`` is of gradients that the client holds. ``maximum_norm`` 0: no clipping.
        Returns the norm before clipping and the factor, which the client applies to its own.
        """
        question = AskGradientNorm(step=step, micro_batches=micro_batches)
        norms = await self._ask_all(question, GradientNorm)
        norm = (own_square_sum + sum(answer.square_sum for answer in norms)) ** 0.5
        scale = 1.0
        if maximum_norm > 0:
            scale = min(1.0, maximum_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        order = ApplyGradients(step=step, scale=scale, learning_rate=learning_rate)
        await self._ask_all(order, GradientsApplied)
        return norm, scale

    async def export_state(self, step: int) -> dict[str, WireTensor]:
        """Adapter and optimizer of all blocks after ``step``."""
        self._check_alive()
        states = await asyncio.gather(
            *(link.ask_state(AskState(step=step), self._timeouts.stall_s) for link in self._links)
        )
        return {name: tensor for state in states for name, tensor in state.items()}

    async def restore(self, step: int, tensors: Mapping[str, WireTensor]) -> None:
        """Let every hop go on from its part of a state, wherever that was taken."""
        self._check_alive()
        await asyncio.gather(*(self._restore(link, step, tensors) for link in self._links))

    async def _restore(
        self, link: TrainingLink, step: int, tensors: Mapping[str, WireTensor]
    ) -> None:
        own = [(name, tensor) for name, tensor in tensors.items() if link.has(name)]
        *parts, end = state_messages(step, own)
        for part in parts:
            await self._send(link, part)
        await link.ask(end, StateRestored, self._timeouts.stall_s)

    async def _ask_all(self, question: Message, kind: type[M]) -> list[M]:
        self._check_alive()
        asking = [link.ask(question, kind, self._timeouts.stall_s) for link in self._links]
        return list(await asyncio.gather(*asking))

    async def _send(self, link: TrainingLink, message: Message) -> None:
        try:
            await link.connection.send(message)
        except NetworkError as error:
            self._hop_failed(link, error)
            self._check_alive()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._failure


def _open_message(request: TrainingChainRequest, hop: PlannedHop, previous: PeerId) -> OpenTraining:
    terms: TrainingTerms = request.terms
    shape: AdapterShape = terms.adapter
    trains = shape.method is not Method.NONE
    return OpenTraining(
        model_revision=request.model_revision,
        first_block=hop.first_block,
        end_block=hop.end_block,
        wire_dtype=int(request.wire_dtype),
        previous_peer=previous,
        maximum_tokens=terms.maximum_tokens,
        micro_batches_in_flight=terms.micro_batches_in_flight,
        method=int(shape.method),
        optimizer=int(terms.optimizer.kind),
        rank=shape.rank if trains else 0,
        alpha=float(shape.alpha) if trains else 0.0,
        target_modules=shape.target_modules if trains else (),
        dropout=float(terms.dropout),
        seed=terms.seed,
        beta1=float(terms.optimizer.beta1),
        beta2=float(terms.optimizer.beta2),
        epsilon=float(terms.optimizer.epsilon),
        weight_decay=float(terms.optimizer.weight_decay),
        policy=b"" if request.policy is None else request.policy.to_bytes(),
    )
