"""The control stream to one hop of a training session."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from swarm.client.link import DIRECT_WITHIN_S, HopFailed
from swarm.compute.lora import split_name
from swarm.connection import Connection, PassportCheck, remote_error
from swarm.ports import Clock, Transport
from swarm.protocol.errors import (
    ErrorCode,
    NetworkError,
    ProtocolError,
    RemoteError,
    SwarmError,
    UsageError,
)
from swarm.protocol.messages import (
    MAX_PAYLOAD_BYTES,
    AskState,
    CloseSession,
    Error,
    GradientNorm,
    GradientsApplied,
    Message,
    OpenTraining,
    Ping,
    Pong,
    RouteReady,
    SessionClosed,
    SetRoute,
    ShowMicroBatch,
    ShownPart,
    StateEnd,
    StatePart,
    StateRestored,
    TrainingOpened,
)
from swarm.protocol.tensors import DType, WireTensor
from swarm.protocol.version import STREAM_PROTOCOL
from swarm.routing import Hop as PlannedHop
from swarm.training_parts import HandledMicroBatch, ShownAssembly, StateAssembly

CLOSE_S = 2.0

M = TypeVar("M", bound=Message)


class TrainingLink:
    """One hop, seen by its client.

    One task reads; any task may ask, one question of a kind at a time.
    """

    def __init__(
        self,
        hop: PlannedHop,
        connection: Connection,
        opened: TrainingOpened,
        state_elements: int,
        clock: Clock,
    ) -> None:
        self.hop = hop
        self.connection = connection
        self.session_id = opened.session_id
        self.reserved_bytes = opened.reserved_bytes
        self.dtype_class = opened.dtype_class
        self.audited_micro_batches = opened.audited_micro_batches
        self.heard_s = clock.monotonic_s()
        self._clock = clock
        self._state_elements = state_elements
        self._failure: SwarmError | None = None
        self._expected: dict[type[Message], asyncio.Future[Message]] = {}
        self._announced: dict[str, int] = {}
        self._assembly = StateAssembly({})
        self._whole_state: dict[str, WireTensor] = {}
        self._showing: ShownAssembly | None = None
        self._shown: HandledMicroBatch | None = None
        self._pinging: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        transport: Transport,
        hop: PlannedHop,
        request: OpenTraining,
        *,
        state_elements: int,
        clock: Clock,
        timeout_s: float,
        only_for: PassportCheck | None,
    ) -> TrainingLink:
        """Open a session on a hop, if its passport passes. Raises HopFailed."""
        connection: Connection | None = None
        try:
            async with asyncio.timeout(timeout_s):
                connection = Connection(
                    await transport.open(
                        hop.peer_id,
                        STREAM_PROTOCOL,
                        hop.addresses,
                        direct_within_s=DIRECT_WITHIN_S,
                    )
                )
                await connection.say_hello(request, only_for=only_for)
                opened = await connection.receive_only(TrainingOpened)
                connection.maximum_payload_bytes = MAX_PAYLOAD_BYTES
                return cls(hop, connection, opened, state_elements, clock)
        except BaseException as error:
            if connection is not None:
                await connection.close()
            if isinstance(error, TimeoutError):
                reason = NetworkError(f"did not open the session within {timeout_s:.0f} s")
                raise HopFailed(hop, reason) from None
            if isinstance(error, SwarmError):
                raise HopFailed(hop, error) from error
            raise

    def has(self, name: str) -> bool:
        """Whether the tensor of a state belongs to this hop's blocks."""
        return _block_of(name) in range(self.hop.first_block, self.hop.end_block)

    async def receive(self) -> Message:
        """The next message that is for the chain. Raises SwarmErrors of the stream."""
        while True:
            message = await self.connection.receive()
            self.heard_s = self._clock.monotonic_s()
            match message:
                case Pong():
                    pass
                case Ping():
                    await self.connection.send(Pong(nonce=message.nonce))
                case StatePart():
                    self._take_state(message)
                case StateEnd():
                    self._whole_state = self._assembly.finish(message)
                    self._settle(message)
                case ShownPart():
                    self._take_shown(message)
                case RouteReady() | GradientNorm() | GradientsApplied() | StateRestored():
                    self._settle(message)
                case SessionClosed():
                    self._settle(message)
                case Error(code=ErrorCode.UNKNOWN_MICRO_BATCH) if ShownPart in self._expected:
                    self._refuse(ShownPart, remote_error(message, self.hop.peer_id))
                case Error():
                    raise remote_error(message, self.hop.peer_id)
                case _:
                    return message

    def ping(self, ping: Ping) -> None:
        """Ask for a sign of life, unless the last ping is not even sent yet."""
        if self._pinging is None or self._pinging.done():
            self._pinging = asyncio.get_running_loop().create_task(self._send_ping(ping))

    async def _send_ping(self, ping: Ping) -> None:
        try:
            await self.connection.send(ping)
        except NetworkError:
            return  # the reader notices too, and says it

    async def ask(self, question: Message, kind: type[M], timeout_s: float) -> M:
        """Send a question and wait for the answer of ``kind``. Raises what the chain failed of."""
        if self._failure is not None:
            raise self._failure
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._expected[kind] = future
        try:
            async with asyncio.timeout(timeout_s):
                await self.connection.send(question)
                answer = await future
        except TimeoutError:
            reason = NetworkError(f"no answer to {type(question).__name__} in {timeout_s:.0f} s")
            raise HopFailed(self.hop, reason) from None
        except NetworkError as error:
            if isinstance(error, HopFailed) or self._failure is error:
                raise
            raise HopFailed(self.hop, error) from error
        finally:
            self._expected.pop(kind, None)
        if not isinstance(answer, kind):
            raise TypeError(f"{type(answer).__name__} under the key of {kind.__name__}")
        return answer

    async def set_route(self, message: SetRoute, timeout_s: float) -> None:
        await self.ask(message, RouteReady, timeout_s)

    async def ask_state(self, question: AskState, timeout_s: float) -> dict[str, WireTensor]:
        """Adapter and optimizer of this hop's blocks."""
        self._announced.clear()
        self._assembly = StateAssembly({})
        end = await self.ask(question, StateEnd, timeout_s)
        state, self._whole_state = self._whole_state, {}
        if end.step != question.step:
            raise HopFailed(self.hop, ProtocolError(ErrorCode.BAD_STATE, "of another step"))
        return state

    async def show(
        self, micro_batch: int, tokens: int, hidden_size: int, dtype: DType, timeout_s: float
    ) -> HandledMicroBatch | None:
        """What the hop handled; None if it refuses. Raises as :meth:`ask`."""
        self._showing, self._shown = ShownAssembly(micro_batch, tokens, hidden_size, dtype), None
        try:
            await self.ask(ShowMicroBatch(micro_batch=micro_batch), ShownPart, timeout_s)
        except RemoteError as error:
            if error.code is not ErrorCode.UNKNOWN_MICRO_BATCH:
                raise
        finally:
            self._showing = None
        shown, self._shown = self._shown, None
        return shown

    def fail(self, error: SwarmError) -> None:
        """Whoever waits for an answer gets this reason."""
        self._failure = error
        for future in self._expected.values():
            if not future.done():
                future.set_exception(error)
                future.exception()

    async def close(self) -> None:
        """End the session on the hop and the stream; never raises."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self.connection.send(CloseSession())
                while not isinstance(await self.connection.receive(), SessionClosed):
                    pass
        except (SwarmError, TimeoutError):
            pass
        finally:
            if self._pinging is not None:
                self._pinging.cancel()
            await self.connection.close()

    def _take_state(self, part: StatePart) -> None:
        if StateEnd not in self._expected:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "a state that nobody asked for")
        if not self.has(part.name):
            raise ProtocolError(ErrorCode.BAD_STATE, "of other blocks")
        if part.name not in self._announced:
            self._announced[part.name] = part.elements
            if sum(self._announced.values()) > self._state_elements:
                raise ProtocolError(ErrorCode.BAD_STATE, "larger than an adapter can be")
            self._assembly.expect(part.name, part.elements)
        self._assembly.add(part)

    def _take_shown(self, part: ShownPart) -> None:
        if self._showing is None or self._shown is not None:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "a micro-batch nobody asked for")
        self._shown = self._showing.add(part)
        if self._shown is not None:
            self._settle(part)

    def _refuse(self, kind: type[Message], error: SwarmError) -> None:
        future = self._expected[kind]
        if not future.done():
            future.set_exception(error)

    def _settle(self, answer: Message) -> None:
        future = self._expected.get(type(answer))
        if future is None:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(answer).__name__)
        if not future.done():
            future.set_result(answer)


def _block_of(name: str) -> int:
    """The block that a state's tensor belongs to; -1 for a name that is none."""
    try:
        block, _, _ = split_name(name.partition("#")[0])
    except UsageError:
        return -1
    return block
