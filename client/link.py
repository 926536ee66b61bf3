"""The control stream to one hop of a session: questions, their answers, and what the hop tells.

A link has one reader, ``Chain``; any task may ask over it. It fails once, for one reason, and
whoever waits for an answer then gets that reason.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TypeVar

from swarm.connection import Connection, remote_error
from swarm.ports import Clock, Transport
from swarm.protocol.errors import (
    ERROR_TEXTS,
    ErrorCode,
    NetworkError,
    ProtocolError,
    RemoteError,
    SwarmError,
)
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import (
    Error,
    HandedOver,
    Message,
    OpenSession,
    Pong,
    PreviousSet,
    ProbeReport,
    Replayed,
    RouteReady,
    SessionOpened,
    SetPrevious,
    SetRoute,
)
from swarm.protocol.version import STREAM_PROTOCOL
from swarm.routing import Hop as PlannedHop

Answer = RouteReady | PreviousSet | ProbeReport | HandedOver
A = TypeVar("A", bound=Answer)


class HopFailed(NetworkError):
    """A hop refused, broke the protocol or is gone; ``peer_id`` says which, the cause says why."""

    def __init__(self, hop: PlannedHop, cause: SwarmError) -> None:
        self.hop = hop
        self.is_counted = False
        self.peer_id = hop.peer_id
        self.code = cause.code if isinstance(cause, RemoteError | ProtocolError) else None
        self.retry_after_ms = cause.retry_after_ms if isinstance(cause, RemoteError) else 0
        name = hop.display_name or hop.peer_id
        reason = ERROR_TEXTS[cause.code] if isinstance(cause, RemoteError) else str(cause)
        super().__init__(f"{name} (blocks {hop.first_block}-{hop.end_block - 1}): {reason}")
        self.__cause__ = cause


@dataclass(slots=True)
class HopTimes:
    """What one hop reported for the latest step, in microseconds."""

    queue_us: int = 0
    compute_us: int = 0


class Link:
    """One hop of a session, seen by its client."""

    def __init__(
        self, hop: PlannedHop, connection: Connection, opened: SessionOpened, clock: Clock
    ) -> None:
        self.hop = hop
        self.connection = connection
        self.opened = opened
        self.times = HopTimes()
        self.route_version = 0
        """Of the route that the client last asked for."""
        self.received_step = 0
        """What the hop said last of its progress."""
        self.computed_step = 0
        self.replayed_length = 0
        self.last_heard_s = clock.monotonic_s()
        self.failure: HopFailed | None = None
        self._clock = clock
        self._expected: dict[tuple[type[Answer], int | str], asyncio.Future[Answer]] = {}
        self._replayed = asyncio.Event()

    @classmethod
    async def open(
        cls,
        transport: Transport,
        hop: PlannedHop,
        request: OpenSession,
        *,
        clock: Clock,
        timeout_s: float,
    ) -> Link:
        """Open a session on a hop. Raises HopFailed; nothing stays open then."""
        connection: Connection | None = None
        try:
            async with asyncio.timeout(timeout_s):
                connection = Connection(
                    await transport.open(hop.peer_id, STREAM_PROTOCOL, hop.addresses)
                )
                await connection.say_hello(request)
                opened = await connection.receive_only(SessionOpened)
                if opened.maximum_step_tokens < 1 or opened.maximum_steps_in_flight < 1:
                    raise ProtocolError(ErrorCode.BAD_FIELD, "accepts no steps")
                return cls(hop, connection, opened, clock)
        except TimeoutError:
            if connection is not None:
                await connection.close()
            reason = NetworkError(f"did not open the session within {timeout_s:.0f} s")
            raise HopFailed(hop, reason) from None
        except SwarmError as error:
            if connection is not None:
                await connection.close()
            raise HopFailed(hop, error) from error
        except asyncio.CancelledError:
            if connection is not None:
                await connection.close()
            raise

    @property
    def peer_id(self) -> PeerId:
        return self.hop.peer_id

    async def receive(self) -> Message:
        """The next message that is for the chain. Raises SwarmErrors of the stream."""
        while True:
            message = await self.connection.receive()
            self.last_heard_s = self._clock.monotonic_s()
            match message:
                case RouteReady() | PreviousSet():
                    self._settle(type(message), message.route_version, message)
                case ProbeReport():
                    self._settle(ProbeReport, message.peer, message)
                case HandedOver():
                    self._settle(HandedOver, 0, message)
                case Error() if message.route_version and self._refuse(message):
                    pass
                case Replayed():
                    self.replayed_length = message.length
                    self._replayed.set()
                case Pong():
                    self.received_step = max(self.received_step, message.received_step)
                    self.computed_step = max(self.computed_step, message.computed_step)
                    return message
                case _:
                    return message

    async def set_route(self, message: SetRoute, timeout_s: float) -> None:
        """Raises RemoteError when the hop refuses, HopFailed when it is gone."""
        self.route_version = message.route_version
        await self.ask(message, RouteReady, message.route_version, timeout_s)

    async def set_previous(self, message: SetPrevious, timeout_s: float) -> None:
        """Raises RemoteError when the hop refuses, HopFailed when it is gone."""
        await self.ask(message, PreviousSet, message.route_version, timeout_s)

    async def ask(self, question: Message, kind: type[A], key: int | str, timeout_s: float) -> A:
        """Send a question and wait for its answer, which carries ``key``."""
        if self.failure is not None:
            raise self.failure
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._expected[kind, key] = future
        try:
            async with asyncio.timeout(timeout_s):
                await self.connection.send(question)
                answer = await future
        except TimeoutError:
            reason = NetworkError(f"no answer to {type(question).__name__} in {timeout_s:.0f} s")
            raise HopFailed(self.hop, reason) from None
        except HopFailed:
            raise
        except NetworkError as error:
            raise HopFailed(self.hop, error) from error
        finally:
            self._expected.pop((kind, key), None)
        if not isinstance(answer, kind):
            raise TypeError(f"{type(answer).__name__} under the key of {kind.__name__}")
        return answer

    async def replayed_to(self, length: int, stall_s: float) -> None:
        """Wait until the hop has ``length`` positions again. Raises HopFailed.

        It may take as long as it goes on; after ``stall_s`` without progress it has failed.
        """
        while self.replayed_length < length:
            if self.failure is not None:
                raise self.failure
            self._replayed.clear()
            try:
                async with asyncio.timeout(stall_s):
                    await self._replayed.wait()
            except TimeoutError:
                reason = NetworkError("is not getting on with what it has to catch up")
                raise HopFailed(self.hop, reason) from None

    def fail(self, error: HopFailed) -> None:
        """Note why this hop is given up; whoever waits for it gets the reason."""
        if self.failure is not None:
            return
        self.failure = error
        for future in self._expected.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # its waiter may have been cancelled
        self._replayed.set()

    def _settle(self, kind: type[Answer], key: int | str, answer: Answer) -> None:
        future = self._expected.get((kind, key))
        if future is not None and not future.done():
            future.set_result(answer)

    def _refuse(self, error: Error) -> bool:
        for kind in (RouteReady, PreviousSet):
            future = self._expected.get((kind, error.route_version))
            if future is not None and not future.done():
                future.set_exception(remote_error(error, self.peer_id))
                return True
        return False
