"""One training session over all hops of a chain: activations down, gradients up, optimizer steps.

A chain that breaks is not mended: its hops hold gradients and optimizer states that have to be of
one step, so whoever trains opens a new chain and restores the last common state (``trainer``).
Activations and gradients go from hop to hop; the client sends and receives at the ends only.

One task, :meth:`TrainingChain.run`, owns all reading; any task may call the other methods. When the
chain fails, all of them raise the one reason.

In an audited session hops say what they handle. Before the optimizer's step this is compared among
them, and after it an auditor may look at what one of them did (``auditing``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from swarm.client.finetune.audited_training import AuditFailed, StepAuditor, TakenStep
from swarm.client.finetune.chain_request import TrainingChainRequest
from swarm.client.finetune.commitments import Commitments, Conflict
from swarm.client.finetune.link import TrainingLink
from swarm.client.finetune.opening import join_links, open_links
from swarm.client.link import HopFailed
from swarm.client.planner import Planner
from swarm.client.results import require_finite
from swarm.ports import Clock, Transport
from swarm.protocol.errors import (
    ErrorCode,
    NetworkError,
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
    MicroBatchDone,
    Ping,
    StateRestored,
)
from swarm.protocol.tensors import WireTensor
from swarm.routing import ChainPlan
from swarm.training_parts import (
    TensorAssembly,
    backward_parts,
    forward_parts,
    state_hash,
    state_messages,
)

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)


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
        blocks: range | None = None,
        auditor: StepAuditor | None = None,
        excluded: Collection[PeerId] = (),
    ) -> None:
        """``blocks``: all of the model if None. Peers that are ``excluded`` are no hops."""
        self._blocks = blocks or range(request.number_of_blocks)
        self._auditor = auditor
        self._transport = transport
        self._planner = planner
        self._request = request
        self._clock = clock
        self._timeouts = timeouts or TrainingTimeouts()
        self._excluded = tuple(excluded)
        self._commitments: Commitments | None = None
        self._state_hashes: tuple[bytes, ...] = ()
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
    def request(self) -> TrainingChainRequest:
        return self._request

    @property
    def planner(self) -> Planner:
        return self._planner

    @property
    def links(self) -> Sequence[TrainingLink]:
        """In the order of their blocks."""
        return self._links

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
                    await join_links(self._links, self._timeouts.answer_s)
                    if not self._opened.done():
                        self._opened.set_result(None)
                    if self._auditor is not None:
                        self._auditor.watch(self)
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
        excluded = {*self._excluded, *(self._auditor.wrong if self._auditor else ())}
        self._links, self._plan = await open_links(
            self._transport,
            self._planner,
            self._request,
            self._blocks,
            excluded,
            clock=self._clock,
            timeout_s=self._timeouts.open_s,
        )
        if self._request.audited_micro_batches:
            self._commitments = Commitments(
                [bool(link.audited_micro_batches) for link in self._links]
            )
            self._state_hashes = (b"",) * len(self._links)

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
                    case MicroBatchDone() if self._commitments is not None:
                        self._commitments.add(self._links.index(link), message)
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
        if self._commitments is not None:
            if kind is ForwardPart:
                self._commitments.received(number, whole)
            else:
                self._commitments.received_gradients(number, whole)
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
                if self._commitments is not None:
                    self._commitments.sent(
                        number, tuple(lengths), activations, use_adapter=use_adapter
                    )
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
            if self._commitments is not None:
                self._commitments.sent_gradients(number, gradients)
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
        if self._commitments is not None:
            self._commitments.forget(number)
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
        square_sums = await self.square_sums(step, micro_batches)
        norm = (own_square_sum + sum(square_sums)) ** 0.5
        scale = 1.0
        if maximum_norm > 0:
            scale = min(1.0, maximum_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        before = self._state_hashes
        await self.apply_gradients(step, scale, learning_rate)
        if self._commitments is not None:
            micro_batches_done = self._commitments.take()
            if self._auditor is not None:
                taken = TakenStep(
                    step,
                    scale,
                    learning_rate,
                    micro_batches_done,
                    square_sums,
                    before,
                    self._state_hashes,
                )
                await self._auditor.step_taken(self, taken)
        return norm, scale

    async def square_sums(self, step: int, micro_batches: int) -> tuple[float, ...]:
        """Of each hop's gradients. Raises HopFailed when hops contradict each other."""
        question = AskGradientNorm(step=step, micro_batches=micro_batches)
        norms = await self._ask_all(question, GradientNorm)
        # Hops have said what they handled before they answer this.
        if self._commitments is not None and (found := self._commitments.conflict()) is not None:
            await self._contradicted(found, step)
        return tuple(answer.square_sum for answer in norms)

    async def apply_gradients(self, step: int, scale: float, learning_rate: float) -> None:
        """Let all hops take a step."""
        order = ApplyGradients(step=step, scale=scale, learning_rate=learning_rate)
        applied = await self._ask_all(order, GradientsApplied)
        self._state_hashes = tuple(answer.state_hash for answer in applied)

    async def _contradicted(self, conflict: Conflict, step: int) -> None:
        links = [self._links[place] for place in conflict.hops]
        reason = AuditFailed(conflict.reason)
        if self._auditor is not None:
            peers = [link.hop.peer_id for link in links]
            await self._auditor.contradicted(self, peers, step, reason)
        self._hop_failed(links[0], reason)
        self._check_alive()

    async def begins_wrong(self, name: str) -> None:
        """A hop's first state is not as it should be: the chain fails. Raises HopFailed."""
        places = tuple(place for place, link in enumerate(self._links) if link.has(name))
        await self._contradicted(Conflict(places, f"{name} begins with other values"), 0)

    def refuted(self, peer: PeerId, reason: AuditFailed) -> None:
        """An audit found that a hop computes something else: the chain fails."""
        for link in self._links:
            if link.hop.peer_id == peer:
                self._hop_failed(link, reason)

    async def audited(self) -> None:
        """Wait for audits that run. Raises what the chain failed of."""
        if self._auditor is not None:
            await self._auditor.settled()
        self._check_alive()

    async def export_state(self, step: int) -> dict[str, WireTensor]:
        """Adapter and optimizer of all blocks after ``step``."""
        self._check_alive()
        states = await asyncio.gather(
            *(link.ask_state(AskState(step=step), self._timeouts.stall_s) for link in self._links)
        )
        await self._states_seen(states, step)
        return {name: tensor for state in states for name, tensor in state.items()}

    async def _states_seen(self, states: Sequence[Mapping[str, WireTensor]], step: int) -> None:
        """Remember the hashes of states, or compare them with what hops said of them."""
        if self._commitments is None:
            return
        seen = tuple(await asyncio.to_thread(lambda: [state_hash(state) for state in states]))
        for place, (said, found) in enumerate(zip(self._state_hashes, seen, strict=True)):
            if said not in (b"", found):
                await self._contradicted(Conflict((place,), "it shows another state"), step)
        self._state_hashes = seen

    async def restore(self, step: int, tensors: Mapping[str, WireTensor]) -> None:
        """Let every hop go on from its part of a state, wherever that was taken."""
        self._check_alive()
        states = [
            {name: tensor for name, tensor in tensors.items() if link.has(name)}
            for link in self._links
        ]
        restoring = zip(self._links, states, strict=True)
        await asyncio.gather(*(self._restore(link, step, state) for link, state in restoring))
        if self._commitments is not None:
            self._commitments.take()
            self._state_hashes = (b"",) * len(self._links)
            await self._states_seen(states, step)

    async def _restore(
        self, link: TrainingLink, step: int, state: Mapping[str, WireTensor]
    ) -> None:
        *parts, end = state_messages(step, tuple(state.items()))
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
