"""One training session on one node: its place in a chain, and micro-batches on their way.

Activations come from the previous hop and go to the next one; gradients come back on the same
streams. The first hop's previous and the last hop's next is the client, on the control stream.
Rules:

1. One task computes, in the order of arrival; one for each direction sends, so that a slow link
   does not keep the device waiting.
2. Whatever fails inside ends the session: the client is told the code. It goes on from its last
   snapshot with a new chain. A mistake of a peer changes nothing.
3. Losing a neighbour is told to the client, who does the same.
4. Optimizer steps are numbered: none is taken twice or left out.
5. In an audited session the client is told hashes of what was handled before it may ask for it
   (``training_record``).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from functools import partial

from swarm.connection import Connection, error_message
from swarm.node.engine.training_api import MicroBatch, TrainingRequest, TrainingSession
from swarm.node.training_record import State, TrainingRecord
from swarm.ports import Clock
from swarm.protocol.errors import ErrorCode, NetworkError, ProtocolError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import (
    SESSION_ID_BYTES,
    ApplyGradients,
    AskGradientNorm,
    AskState,
    BackwardPart,
    Draining,
    ForwardPart,
    GradientNorm,
    GradientsApplied,
    Message,
    StateEnd,
    StatePart,
    StateRestored,
)
from swarm.protocol.policy import Policy
from swarm.protocol.tensors import WireTensor
from swarm.training_parts import (
    StateAssembly,
    TensorAssembly,
    backward_parts,
    forward_parts,
    shown_parts,
    state_messages,
)

MAXIMUM_BACKGROUND_TASKS = 8

Work = Callable[[], Awaitable[None]]


class TrainingHop:
    """The node's side of one training session."""

    def __init__(
        self,
        *,
        request: TrainingRequest,
        hidden_size: int,
        previous_peer: PeerId,
        policy: Policy | None,
        control: Connection,
        session: TrainingSession,
        clock: Clock,
        idle_s: float,
    ) -> None:
        self.policy = policy
        self.session_id = secrets.token_bytes(SESSION_ID_BYTES)
        self._request = request
        self._hidden_size = hidden_size
        self._previous_peer = previous_peer
        self._control = control
        self._session = session
        self._clock = clock
        self._idle_s = idle_s
        self._previous: Connection | None = control if previous_peer == control.peer else None
        self._next: Connection | None = None
        self._has_route = False
        self._arriving: tuple[MicroBatch, TensorAssembly] | None = None
        self._returning: tuple[int, TensorAssembly] | None = None
        self._in_flight: dict[int, int] = {}
        """Micro-batches that wait for their gradient, with their tokens."""
        self._passing = 0
        """Micro-batches without a gradient that are not computed yet."""
        self._latest = -1
        self._work: asyncio.Queue[Work] = asyncio.Queue()
        # As many as there may be micro-batches in flight, so that the computing task never waits.
        self._down: asyncio.Queue[list[Message]] = asyncio.Queue()
        self._up: asyncio.Queue[list[Message]] = asyncio.Queue()
        self._step = 0
        self._returned = 0
        self._busy = 0
        self._state: StateAssembly | None = None
        audited = request.audited_micro_batches
        self._record = TrainingRecord(audited) if audited else None
        self._tasks: asyncio.TaskGroup | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._heard_s = clock.monotonic_s()
        self._mistakes = 0

    # --- life
    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Own the session's tasks; leaving frees the adapter and closes the streams to others."""
        failure: Exception | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                own = [
                    tasks.create_task(self._compute_all()),
                    tasks.create_task(self._send_all(self._down, lambda: self._next)),
                    tasks.create_task(self._send_all(self._up, lambda: self._previous)),
                    tasks.create_task(self._expire()),
                ]
                try:
                    yield
                except Exception as error:  # raised again below, outside of the group's wrapping
                    failure = error
                finally:
                    for task in (*own, *self._background):
                        task.cancel()
                    for neighbour in (self._previous, self._next):
                        if neighbour is not None and neighbour is not self._control:
                            await neighbour.close()
        finally:
            self._tasks = None
            await self._session.close()
        if failure is not None:
            raise failure

    def start(self, work: Coroutine[None, None, None]) -> None:
        """Run ``work`` beside the session, which owns it: it ends with it at the latest."""
        if self._tasks is None or len(self._background) >= MAXIMUM_BACKGROUND_TASKS:
            work.close()
            raise ProtocolError(ErrorCode.BAD_FIELD, "too much at once")
        task = self._tasks.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def tell_client(self, code: ErrorCode, *, step: int = 0) -> None:
        """Send the client a code; if the control stream is gone, the session is ending anyway."""
        with contextlib.suppress(NetworkError):
            await self._control.send(error_message(code, step=step))

    async def tell_draining(self, wait_s: float) -> None:
        """The client takes a snapshot and goes on elsewhere."""
        with contextlib.suppress(NetworkError):
            await self._control.send(Draining(wait_ms=round(wait_s * 1000)))

    async def end_for_leaving(self) -> None:
        """End the session because the node cannot wait any longer."""
        await self._fail(ErrorCode.DRAINING)

    def count_mistake(self, allowed: int, error: ProtocolError) -> None:
        """Forgive a few mistakes of a peer; raise ``error`` again when there are too many."""
        self._mistakes += 1
        if self._mistakes > allowed:
            raise error

    async def _fail(self, code: ErrorCode) -> None:
        await self.tell_client(code)
        await self._control.close()

    async def _expire(self) -> None:
        while (
            left_s := self._heard_s + self._idle_s - self._clock.monotonic_s()
        ) > 0 or self._busy:
            await self._clock.sleep(max(left_s, 1.0))
        await self._fail(ErrorCode.SESSION_EXPIRED)

    # --- neighbours
    def claim_route(self) -> None:
        """A session gets one route in its life; raises ProtocolError for another."""
        if self._has_route:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "the route is set already")
        self._has_route = True

    def set_next(self, next_hop: Connection | None) -> None:
        """Outputs go there from now on; None is the client."""
        self._next = self._control if next_hop is None else next_hop
        if next_hop is not None:
            self.start(self._read_gradients(next_hop))

    def attached(self, upstream: Connection) -> None:
        """Take activations from ``upstream``. Raises ProtocolError unless it is the named peer."""
        if upstream.peer != self._previous_peer:
            raise ProtocolError(ErrorCode.NOT_NAMED_BY_SESSION, f"training from {upstream.peer}")
        if self._previous is not None:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "the previous hop is attached")
        self._previous = upstream

    async def _read_gradients(self, next_hop: Connection) -> None:
        try:
            while True:
                message = await next_hop.receive()
                if not isinstance(message, BackwardPart):
                    raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(message).__name__)
                self.take_gradients(message, next_hop)
        except NetworkError:
            await self.tell_client(ErrorCode.NEXT_HOP_LOST)
        except ProtocolError as error:
            await self.tell_client(error.code)

    # --- micro-batches
    def take_activations(self, part: ForwardPart, source: Connection) -> None:
        """A part from the previous hop. Raises ProtocolError for what does not fit."""
        if source is not self._previous:
            raise ProtocolError(ErrorCode.NOT_NAMED_BY_SESSION, "activations")
        self._heard_s = self._clock.monotonic_s()
        micro_batch = MicroBatch(
            part.micro_batch, part.lengths, bool(part.use_adapter), bool(part.needs_gradient)
        )
        if self._arriving is None:
            self._check_new(micro_batch)
            tokens = sum(micro_batch.lengths)
            assembly = TensorAssembly(tokens, self._hidden_size, self._request.wire_dtype)
            self._arriving = (micro_batch, assembly)
        begun, assembly = self._arriving
        if begun != micro_batch:
            raise ProtocolError(ErrorCode.GAP, "a micro-batch is cut short")
        whole = assembly.add(part.first_token, part.activations)
        if whole is None:
            return
        self._arriving = None
        self._latest = micro_batch.number
        if micro_batch.needs_gradient:
            self._in_flight[micro_batch.number] = sum(micro_batch.lengths)
        else:
            self._passing += 1
        self._work.put_nowait(partial(self._forward, micro_batch, whole))

    def take_gradients(self, part: BackwardPart, source: Connection) -> None:
        """A part from the next hop. Raises ProtocolError for what does not fit."""
        if source is not self._next:
            raise ProtocolError(ErrorCode.NOT_NAMED_BY_SESSION, "gradients")
        self._heard_s = self._clock.monotonic_s()
        if self._returning is None:
            tokens = self._in_flight.get(part.micro_batch)
            if tokens is None:
                raise ProtocolError(ErrorCode.UNKNOWN_MICRO_BATCH)
            assembly = TensorAssembly(tokens, self._hidden_size, self._request.wire_dtype)
            self._returning = (part.micro_batch, assembly)
        number, assembly = self._returning
        if number != part.micro_batch:
            raise ProtocolError(ErrorCode.GAP, "a gradient is cut short")
        whole = assembly.add(part.first_token, part.gradients)
        if whole is None:
            return
        self._returning = None
        self._work.put_nowait(partial(self._backward, number, whole))

    def _check_new(self, micro_batch: MicroBatch) -> None:
        terms = self._request.terms
        if micro_batch.number <= self._latest:
            raise ProtocolError(ErrorCode.BAD_STEP, "numbers of micro-batches grow")
        if not micro_batch.lengths or min(micro_batch.lengths) < 1:
            raise ProtocolError(ErrorCode.BAD_FIELD, "a sequence without tokens")
        if sum(micro_batch.lengths) > terms.maximum_tokens:
            raise ProtocolError(ErrorCode.TOO_LARGE, f"{sum(micro_batch.lengths)} tokens")
        unsent = self._up.qsize() + self._down.qsize()
        in_flight = len(self._in_flight) + self._passing
        most = terms.micro_batches_in_flight
        if in_flight >= most or in_flight + unsent >= 2 * most:
            raise ProtocolError(ErrorCode.TOO_MANY_STEPS)
        if self._next is None:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "no route yet")

    def forget(self, number: int) -> None:
        """No gradient will come for this micro-batch; it may still be on its way down."""
        if number not in self._in_flight:
            raise ProtocolError(ErrorCode.UNKNOWN_MICRO_BATCH)
        self._enqueue(partial(self._forget, number))

    async def _forget(self, number: int) -> None:
        self._in_flight.pop(number, None)
        if self._record is not None:
            self._record.forget(number)
        await self._session.forget(number)

    async def _forward(self, micro_batch: MicroBatch, activations: WireTensor) -> None:
        output = await self._session.forward(micro_batch, activations)
        if not micro_batch.needs_gradient:
            self._passing -= 1
        elif self._record is not None:
            self._record.forwarded(micro_batch.number, activations, output)
        parts = forward_parts(
            micro_batch.number,
            micro_batch.lengths,
            output,
            use_adapter=micro_batch.use_adapter,
            needs_gradient=micro_batch.needs_gradient,
        )
        self._down.put_nowait(list(parts))

    async def _backward(self, number: int, gradients: WireTensor) -> None:
        into_inputs = await self._session.backward(number, gradients)
        self._in_flight.pop(number, None)
        self._returned += 1
        self._up.put_nowait(list(backward_parts(number, into_inputs)))
        if self._record is not None:
            await self._control.send(await self._record.returned(number, gradients, into_inputs))

    async def _compute_all(self) -> None:
        while True:
            work = await self._work.get()
            self._busy += 1
            try:
                await work()
            except ProtocolError as error:
                await self._fail(error.code)
            except NetworkError:
                return
            finally:
                self._busy -= 1
                self._heard_s = self._clock.monotonic_s()

    async def _send_all(
        self, queue: asyncio.Queue[list[Message]], to: Callable[[], Connection | None]
    ) -> None:
        lost = ErrorCode.NEXT_HOP_LOST if queue is self._down else ErrorCode.PREVIOUS_HOP_LOST
        while True:
            messages = await queue.get()
            connection = to()
            if connection is None:
                await self._fail(lost)
                return
            try:
                for message in messages:
                    await connection.send(message)
            except NetworkError:
                await self.tell_client(lost)

    # --- the optimizer
    def ask_norm(self, message: AskGradientNorm) -> None:
        """Raises ProtocolError unless all gradients of this step are here."""
        if (
            message.step != self._step + 1
            or message.micro_batches != self._returned
            or self._in_flight
        ):
            raise ProtocolError(
                ErrorCode.WRONG_OPTIMIZER_STEP,
                f"step {message.step} after {self._step}, {self._returned} micro-batches",
            )
        self._enqueue(partial(self._answer_norm, message.step))

    def apply(self, message: ApplyGradients) -> None:
        """Raises ProtocolError for a step that is neither the next nor the last."""
        if message.step == self._step:
            self._enqueue(partial(self._control.send, GradientsApplied(step=message.step)))
            return
        if message.step != self._step + 1 or self._in_flight:
            raise ProtocolError(
                ErrorCode.WRONG_OPTIMIZER_STEP, f"{message.step} after {self._step}"
            )
        self._step, self._returned = message.step, 0
        self._enqueue(partial(self._apply, message))

    def ask_state(self, message: AskState) -> None:
        """Raises ProtocolError for a state that is not kept."""
        kept = self._record.state(message.step) if self._record is not None else None
        if kept is None and (message.step != self._step or self._in_flight):
            raise ProtocolError(ErrorCode.WRONG_OPTIMIZER_STEP, f"state of step {message.step}")
        self._enqueue(partial(self._send_state, message.step, kept))

    def show(self, number: int) -> None:
        """Raises ProtocolError(UNKNOWN_MICRO_BATCH) for one that is not kept."""
        if self._record is None:
            raise ProtocolError(ErrorCode.UNKNOWN_MICRO_BATCH, "the session is not audited")
        messages = shown_parts(number, self._record.shown(number))
        self._enqueue(partial(self._send_control, list(messages)))

    def take_state(self, message: StatePart | StateEnd) -> None:
        """Raises ProtocolError(BAD_STATE) for tensors that the session does not have."""
        if self._state is None:
            self._state = StateAssembly(self._session.state_shapes)
        if isinstance(message, StatePart):
            self._state.add(message)
            return
        tensors = self._state.finish(message)
        self._state = None
        self._enqueue(partial(self._restore, message.step, tensors))

    def _enqueue(self, work: Work) -> None:
        if self._work.qsize() > 4 * self._request.terms.micro_batches_in_flight + 4:
            raise ProtocolError(ErrorCode.TOO_MANY_STEPS, "too many questions")
        self._heard_s = self._clock.monotonic_s()
        self._work.put_nowait(work)

    async def _answer_norm(self, step: int) -> None:
        square_sum = await self._session.gradient_square_sum()
        await self._control.send(GradientNorm(step=step, square_sum=min(square_sum, 1e300)))

    async def _apply(self, message: ApplyGradients) -> None:
        record, step = self._record, message.step
        before = record.state(step - 1) if record is not None else None
        if record is not None and before is None:
            before = await self._exported()
        await self._session.apply(message.scale, message.learning_rate)
        state_hash = b""
        if record is not None and before is not None:
            state_hash = await record.stepped(step, before, await self._exported())
        await self._control.send(GradientsApplied(step=step, state_hash=state_hash))

    async def _exported(self) -> State:
        return dict(await self._session.export_state())

    async def _send_state(self, step: int, kept: State | None) -> None:
        state = kept if kept is not None else await self._exported()
        await self._send_control(state_messages(step, tuple(state.items())))

    async def _send_control(self, messages: Iterable[Message]) -> None:
        for message in messages:
            await self._control.send(message)

    async def _restore(self, step: int, tensors: dict[str, WireTensor]) -> None:
        await self._session.import_state(tensors)
        if self._record is not None:
            self._record.clear()
        self._in_flight.clear()
        self._step, self._returned = step, 0
        await self._control.send(StateRestored(step=step))
