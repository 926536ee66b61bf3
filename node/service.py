"""Answers peers: opens sessions for clients, takes steps, sends results on to the next hop.

A session belongs to the *control stream* on which a client opened it and ends with it. Steps come
from the one peer that the client named: on the control stream for the first hop, otherwise on a
stream that the previous hop has attached. Outputs go to the next hop, or, from the last one, to
the client. Nothing of a session outlives its control stream.

What a step means is decided by ``swarm.protocol.session``, what it computes by ``node.engine``;
``node.hop`` holds one session, this module the streams and the limits.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from swarm.connection import KEEPS_FRAMING, Connection
from swarm.node.engine.api import CacheRequest, Engine
from swarm.node.hop import Hop, HopLimits, HopObserver
from swarm.ports import Clock, Stream, Transport
from swarm.protocol.errors import (
    DecodeError,
    ErrorCode,
    NetworkError,
    ProtocolError,
    RemoteError,
)
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import (
    AskLoad,
    Attach,
    Attached,
    CloseSession,
    LoadReport,
    Message,
    OpenSession,
    Ping,
    Pong,
    RouteReady,
    SessionClosed,
    SessionOpened,
    SetRoute,
    Step,
)
from swarm.protocol.session import SessionTerms, check_open
from swarm.protocol.version import STREAM_PROTOCOL

log = logging.getLogger(__name__)

Resolver = Callable[[PeerId], Awaitable[Sequence[str] | None]]
"""Addresses of a peer that hosts the same model by the directory; None when it is unknown there."""


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What one node grants to peers whom it does not know."""

    sessions: int = 256
    sessions_per_peer: int = 32
    streams_per_peer: int = 128
    steps_in_flight: int = 4
    hello_timeout_s: float = 5.0
    attach_timeout_s: float = 10.0
    silence_timeout_s: float = 30.0
    """A control stream without any frame (clients ping) for this long is dead."""
    session_idle_s: float = 600.0
    """A session without a step for this long is closed."""
    session_lifetime_s: float = 6 * 3600.0
    errors_per_stream: int = 16
    retry_after_ms: int = 2000


class ServiceObserver(HopObserver, Protocol):
    """What a node counts. ``node.metrics`` implements it."""

    def session_opened(self) -> None: ...

    def session_closed(self) -> None: ...

    def refused(self, code: ErrorCode) -> None: ...

    def bytes_moved(self, *, sent: int, received: int) -> None: ...


class NodeService:
    """Serves the blocks of one engine to clients and to neighbouring hops."""

    def __init__(
        self,
        transport: Transport,
        engine: Engine,
        *,
        model_revision: bytes,
        resolve: Resolver,
        observer: ServiceObserver,
        clock: Clock,
        limits: ServiceLimits | None = None,
    ) -> None:
        self._transport = transport
        self._engine = engine
        self._model_revision = model_revision
        self._resolve = resolve
        self._observer = observer
        self._clock = clock
        self._limits = limits or ServiceLimits()
        self._hops: dict[bytes, Hop] = {}
        self._sessions_of: Counter[PeerId] = Counter()
        self._streams_of: Counter[PeerId] = Counter()
        self._connections: set[Connection] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._accepting = True

    @property
    def sessions(self) -> int:
        """Sessions open now."""
        return len(self._hops)

    @property
    def streams(self) -> int:
        """Streams being served now."""
        return len(self._connections)

    async def start(self) -> None:
        """Begin to answer peers."""
        await self._transport.serve(STREAM_PROTOCOL, self._serve_stream)

    def stop_accepting(self) -> None:
        """Refuse new sessions with DRAINING; running ones go on."""
        self._accepting = False

    async def close(self) -> None:
        """Close all streams and wait until their handlers have freed everything."""
        self._accepting = False
        for connection in tuple(self._connections):
            await connection.close()
        await self._idle.wait()

    # --- streams
    async def _serve_stream(self, stream: Stream) -> None:
        connection = Connection(stream, self._observer.bytes_moved)
        try:
            with self._counted(connection):
                await self._converse(connection)
        except ProtocolError as error:
            self._refused(connection.peer, error)
            await connection.refuse(error, retry_after_ms=self._retry_after_ms(error))
        except (NetworkError, RemoteError) as error:
            log.debug("stream of %s ended: %s", connection.peer, error)
        except Exception:  # the one place for a stream: log, answer with a code, go on serving
            log.exception("stream of %s failed", connection.peer)
            self._observer.refused(ErrorCode.INTERNAL)
            await connection.refuse(ProtocolError(ErrorCode.INTERNAL))
        finally:
            await connection.close()

    @contextmanager
    def _counted(self, connection: Connection) -> Iterator[None]:
        peer = connection.peer
        if self._streams_of[peer] >= self._limits.streams_per_peer:
            raise ProtocolError(ErrorCode.TOO_MANY_SESSIONS, "too many streams")
        self._streams_of[peer] += 1
        self._connections.add(connection)
        self._idle.clear()
        try:
            yield
        finally:
            self._connections.discard(connection)
            self._streams_of[peer] -= 1
            if not self._streams_of[peer]:
                del self._streams_of[peer]
            if not self._connections:
                self._idle.set()

    async def _converse(self, connection: Connection) -> None:
        await connection.answer_hello(self._limits.hello_timeout_s)
        first = await self._receive(connection)
        while isinstance(first, AskLoad):
            await connection.send(self._report_load(first))
            first = await self._receive(connection)
        match first:
            case OpenSession():
                await self._serve_client(connection, first)
            case Attach():
                await self._serve_previous_hop(connection, first)
            case _:
                raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(first).__name__)

    def _report_load(self, question: AskLoad) -> LoadReport:
        load = self._engine.load
        return LoadReport(
            accepting=int(
                self._accepting
                and question.model_revision == self._model_revision
                and self._hosts(question.first_block, question.end_block)
                and question.tokens <= load.cache_tokens_free
                and len(self._hops) < self._limits.sessions
            ),
            queued_steps=load.queued_steps,
            cache_tokens_free=load.cache_tokens_free,
            busy_permille=min(1000, round(load.busy_fraction * 1000)),
            sessions=len(self._hops),
        )

    def _hosts(self, first_block: int, end_block: int) -> bool:
        return self._engine.first_block <= first_block < end_block <= self._engine.end_block

    async def _receive(self, connection: Connection) -> Message:
        """The next message that is no ping; a silent peer is a gone peer."""
        mistakes = 0
        while True:
            try:
                async with asyncio.timeout(self._limits.silence_timeout_s):
                    message = await connection.receive()
            except TimeoutError:
                raise NetworkError("silent for too long") from None
            except DecodeError as error:
                # The frame was whole, only its content was wrong: say so and read on, a few times.
                mistakes += 1
                if error.code not in KEEPS_FRAMING or mistakes > self._limits.errors_per_stream:
                    raise
                self._refused(connection.peer, error)
                await connection.refuse(error)
                continue
            if isinstance(message, Ping):
                await connection.send(
                    Pong(nonce=message.nonce, unix_ms=round(self._clock.unix_s() * 1000))
                )
                continue
            return message

    # --- the control stream of a client
    async def _serve_client(self, connection: Connection, request: OpenSession) -> None:
        hop = self._open(connection, request)
        peer = connection.peer
        self._hops[hop.session_id] = hop
        self._sessions_of[peer] += 1
        self._observer.session_opened()
        try:
            connection.maximum_payload_bytes = hop.terms.maximum_payload_bytes
            await connection.send(
                SessionOpened(
                    session_id=hop.session_id,
                    maximum_step_tokens=hop.terms.maximum_step_tokens,
                    maximum_steps_in_flight=hop.terms.maximum_steps_in_flight,
                    free_cache_tokens=self._engine.load.cache_tokens_free,
                )
            )
            async with hop.running():
                await self._read_control(connection, hop)
        finally:
            del self._hops[hop.session_id]
            self._sessions_of[peer] -= 1
            if not self._sessions_of[peer]:
                del self._sessions_of[peer]
            self._observer.session_closed()
        await connection.send(SessionClosed())

    def _open(self, connection: Connection, request: OpenSession) -> Hop:
        dtype, encoding = check_open(request)
        if request.model_revision != self._model_revision:
            raise ProtocolError(ErrorCode.UNKNOWN_MODEL)
        engine = self._engine
        if not self._hosts(request.first_block, request.end_block):
            raise ProtocolError(ErrorCode.BLOCKS_NOT_HOSTED)
        if not self._accepting:
            raise ProtocolError(ErrorCode.DRAINING)
        if len(self._hops) >= self._limits.sessions:
            raise ProtocolError(ErrorCode.NO_CAPACITY, "sessions")
        if self._sessions_of[connection.peer] >= self._limits.sessions_per_peer:
            raise ProtocolError(ErrorCode.TOO_MANY_SESSIONS)
        terms = SessionTerms(
            rows=request.rows,
            maximum_tokens=request.maximum_tokens,
            hidden_size=engine.hidden_size,
            wire_dtype=dtype,
            wire_encoding=encoding,
            maximum_step_tokens=engine.maximum_step_tokens,
            maximum_steps_in_flight=self._limits.steps_in_flight,
        )
        cache = engine.reserve(
            CacheRequest(
                first_block=request.first_block,
                end_block=request.end_block,
                rows=request.rows,
                maximum_tokens=request.maximum_tokens,
                wire_dtype=dtype,
                left_padding=request.left_padding,
            )
        )
        return Hop(
            terms=terms,
            previous_peer=PeerId(request.previous_peer),
            control=connection,
            engine=engine,
            cache=cache,
            observer=self._observer,
            clock=self._clock,
            limits=HopLimits(self._limits.session_idle_s, self._limits.session_lifetime_s),
        )

    async def _read_control(self, connection: Connection, hop: Hop) -> None:
        while True:
            message = await self._receive(connection)
            try:
                match message:
                    case Step():
                        hop.require_previous(connection.peer)
                        await hop.submit(message)
                    case SetRoute():
                        await self._set_route(hop, message)
                        await connection.send(RouteReady(route_version=message.route_version))
                    case CloseSession():
                        return
                    case _:
                        raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(message).__name__)
            except ProtocolError as error:
                step = message.step if isinstance(message, Step) else 0
                self._refused(connection.peer, error)
                hop.count_mistake(self._limits.errors_per_stream, error)
                await connection.refuse(error, step=step)

    async def _set_route(self, hop: Hop, message: SetRoute) -> None:
        hop.require_newer_route(message.route_version)
        if not message.next_peer:
            await hop.route_to_client(message.route_version)
            return
        peer = PeerId(message.next_peer)
        addresses = await self._resolve(peer)
        if addresses is None:
            raise ProtocolError(ErrorCode.NEXT_HOP_UNKNOWN)
        try:
            async with asyncio.timeout(self._limits.attach_timeout_s):
                stream = await self._transport.open(peer, STREAM_PROTOCOL, addresses)
                next_hop = Connection(stream, self._observer.bytes_moved)
                try:
                    await next_hop.say_hello(
                        Attach(
                            session_id=message.next_session_id,
                            route_version=message.route_version,
                        )
                    )
                    await next_hop.receive_only(Attached)
                except BaseException:
                    await next_hop.close()
                    raise
        except RemoteError as error:
            raise ProtocolError(error.code, f"next hop {peer} refused") from None
        except (TimeoutError, NetworkError, ProtocolError) as error:
            log.info("next hop %s cannot be attached: %s", peer, error)
            raise ProtocolError(ErrorCode.NEXT_HOP_LOST) from None
        await hop.route_to_peer(message.route_version, next_hop)

    # --- the stream of the previous hop
    async def _serve_previous_hop(self, connection: Connection, attach: Attach) -> None:
        hop = self._hops.get(attach.session_id)
        if hop is None:
            raise ProtocolError(ErrorCode.UNKNOWN_SESSION)
        hop.require_previous(connection.peer)
        await hop.attached(connection, attach.route_version)
        connection.maximum_payload_bytes = hop.terms.maximum_payload_bytes
        try:
            await connection.send(Attached(route_version=attach.route_version))
            while True:
                message = await connection.receive()
                match message:
                    case Step():
                        try:
                            await hop.submit(message)
                        except ProtocolError as error:
                            self._refused(connection.peer, error)
                            hop.count_mistake(self._limits.errors_per_stream, error)
                            await hop.tell_client(error.code, step=message.step)
                    case Ping():
                        await connection.send(Pong(nonce=message.nonce))
                    case _:
                        raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(message).__name__)
        finally:
            await hop.detached(connection)

    # --- bookkeeping
    def _refused(self, peer: PeerId, error: ProtocolError) -> None:
        log.info("refused %s: %s", peer, error)
        self._observer.refused(error.code)

    def _retry_after_ms(self, error: ProtocolError) -> int:
        busy = {ErrorCode.NO_CAPACITY, ErrorCode.TOO_MANY_SESSIONS}
        return self._limits.retry_after_ms if error.code in busy else 0
