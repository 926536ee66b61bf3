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
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from swarm.connection import KEEPS_FRAMING, Connection, PassportCheck
from swarm.gate import Gate
from swarm.journal import DEFAULT_BUDGET_BYTES, JournalBudget
from swarm.local_stream import stream_to_ourselves
from swarm.node.accounts import NodeLedger, Standing
from swarm.node.adapter_intake import AdapterCatalogue, AdapterIntake
from swarm.node.engine.api import CacheRequest, Engine
from swarm.node.engine.training_api import TrainingEngine
from swarm.node.hop import Hop, HopLimits, HopObserver
from swarm.node.training_service import Streams, TrainingLimits, TrainingService
from swarm.ports import Clock, Stream, Transport
from swarm.protocol.errors import (
    DecodeError,
    ErrorCode,
    NetworkError,
    PeerUnreachable,
    ProtocolError,
    RemoteError,
)
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import (
    MAX_PAYLOAD_BYTES,
    AskLoad,
    Attach,
    Attached,
    CloseSession,
    HandOver,
    LoadReport,
    Message,
    OpenSession,
    OpenTraining,
    Ping,
    Pong,
    PreviousSet,
    ProbePeer,
    PushAdapter,
    ReadTranscript,
    RenewAllowance,
    Replay,
    RouteReady,
    SessionClosed,
    SessionOpened,
    SetPrevious,
    SetRoute,
    SignedVoucher,
    Step,
    TakeOver,
)
from swarm.protocol.policy import Policy
from swarm.protocol.session import SessionTerms, accepted_step_tokens, check_open
from swarm.protocol.version import STREAM_PROTOCOL

log = logging.getLogger(__name__)

LEAVE_RELAYS_PERIOD_S = 2.0

_ROUTING = SetRoute | SetPrevious


class StreamOwner(Protocol):
    """A session that owns what runs for it."""

    @property
    def policy(self) -> Policy | None:
        """What the session's client demands of peers that it did not choose by hand."""

    def start(self, work: Coroutine[None, None, None]) -> None: ...


class Resolver(Protocol):
    """Addresses of a peer that hosts the same model by the directory; None when it is unknown."""

    async def __call__(self, peer: PeerId, *, afresh: bool = False) -> Sequence[str] | None:
        """``afresh``: what is remembered does not do."""


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What one node grants to peers whom it does not know."""

    sessions: int = 256
    sessions_per_peer: int = 32
    streams_per_peer: int = 128
    steps_in_flight: int = 4
    hello_timeout_s: float = 5.0
    attach_timeout_s: float = 5.0
    probe_timeout_s: float = 0.8
    """How long a neighbour may take to answer when a client asks whether it is there."""
    silence_timeout_s: float = 30.0
    """A control stream without any frame (clients ping) for this long is dead."""
    session_idle_s: float = 600.0
    """A session without a step for this long is closed."""
    session_lifetime_s: float = 6 * 3600.0
    errors_per_stream: int = 16
    retry_after_ms: int = 2000
    journal_bytes: int = DEFAULT_BUDGET_BYTES
    """For the journals of all sessions together."""


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
        gate: Gate | None = None,
        adapter_catalogue: AdapterCatalogue | None = None,
        ledger: NodeLedger | None = None,
    ) -> None:
        """``gate`` has our own passport, in a swarm with a charter."""
        self._gate = gate
        self._ledger = ledger
        self._transport = transport
        self._engine = engine
        self._model_revision = model_revision
        self._resolve = resolve
        self._observer = observer
        self._clock = clock
        self._limits = limits or ServiceLimits()
        self.journals = JournalBudget(self._limits.journal_bytes)
        self._adapter_intake = AdapterIntake(adapter_catalogue)
        self._training = TrainingService(
            Streams(self._receive, self._dial, self._require_policy, self._refused),
            clock=clock,
            limits=TrainingLimits(
                errors_per_stream=self._limits.errors_per_stream,
                attach_timeout_s=self._limits.attach_timeout_s,
                idle_s=self._limits.session_idle_s,
            ),
            changed=self._sessions_changed,
        )
        self._hops: dict[bytes, Hop] = {}
        self._sessions_of: Counter[PeerId] = Counter()
        self._streams_of: Counter[PeerId] = Counter()
        self._connections: set[Connection] = set()
        self._session_streams = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._no_sessions = asyncio.Event()
        self._no_sessions.set()
        self._accepting = True
        self._drain_ends_s = 0.0

    @property
    def sessions(self) -> int:
        """Sessions open now, of both kinds."""
        return len(self._hops) + self._training.sessions

    @property
    def hops(self) -> Collection[Hop]:
        """The sessions that are open now, as this node sees them."""
        return self._hops.values()

    @property
    def streams(self) -> int:
        """Streams being served now."""
        return len(self._connections)

    @property
    def session_streams(self) -> int:
        """Those of them on which a session, or something for one, runs; others ask and ping."""
        return self._session_streams

    async def start(self) -> None:
        """Begin to answer peers."""
        await self._transport.serve(STREAM_PROTOCOL, self._serve_stream)

    def stop_accepting(self, wait_s: float = 0.0) -> None:
        """Refuse new sessions with DRAINING.

        Running ones go on; their clients are told that they have ``wait_s`` to move them.
        """
        self._accepting = False
        self._drain_ends_s = self._clock.monotonic_s() + wait_s
        for hop in self._hops.values():
            self._tell_draining(hop)
        self._training.tell_draining(wait_s)

    def serve(self, engine: Engine) -> None:
        """Serve the blocks of another engine from now on, and accept sessions (again).

        For when no session is open: each keeps the engine that it began with.
        """
        self._engine = engine
        self._accepting = True

    async def end_sessions(self) -> None:
        """End what did not move away, and wait until it is freed."""
        for hop in tuple(self._hops.values()):
            await hop.end_for_leaving()
        await self._training.end_sessions()
        await self.emptied()

    def _tell_draining(self, hop: Hop) -> None:
        left_s = max(0.0, self._drain_ends_s - self._clock.monotonic_s())
        with contextlib.suppress(ProtocolError):  # it ends, or begins and is told then
            hop.start(hop.tell_draining(left_s))

    async def leave_relays(self) -> None:
        """Move streams between hops off relays as soon as holes are punched; until cancelled."""
        while True:
            await self._clock.sleep(LEAVE_RELAYS_PERIOD_S)
            for hop in tuple(self._hops.values()):
                peer = hop.relayed_next_peer
                if peer is None:
                    continue
                with contextlib.suppress(NetworkError):
                    if await self._transport.is_direct(peer):
                        log.info("the next hop %s can be reached without a relay now", peer)
                        await hop.give_up_next_stream()

    async def emptied(self) -> None:
        """Wait until no session is open."""
        await self._no_sessions.wait()

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
        self._session_streams += 1
        try:
            await self._converse_for_session(connection, first)
        finally:
            self._session_streams -= 1

    async def _converse_for_session(self, connection: Connection, first: Message) -> None:
        match first:
            case OpenSession():
                await self._serve_client(connection, first)
            case OpenTraining():
                await self._serve_training(connection, first)
            case Attach() if self._training.has(first.session_id):
                await self._training.serve_previous_hop(connection, first)
            case Attach():
                await self._serve_previous_hop(connection, first)
            case TakeOver():
                await self._serve_leaving_hop(connection, first)
            case PushAdapter():
                if first.model_revision != self._model_revision:
                    raise ProtocolError(ErrorCode.UNKNOWN_MODEL)
                await self._adapter_intake.take(connection, first, self._engine, self._receive)
            case ReadTranscript():
                await self._serve_auditor(connection, first)
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
            has_adapter=int(question.adapter_id in self._engine.adapters),
        )

    def _hosts(self, first_block: int, end_block: int) -> bool:
        return self._engine.first_block <= first_block < end_block <= self._engine.end_block

    async def _receive(
        self, connection: Connection, pong: Callable[[int], Pong] | None = None
    ) -> Message:
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
                await connection.send((pong or self._pong)(message.nonce))
                continue
            return message

    def _pong(self, nonce: int) -> Pong:
        return Pong(nonce=nonce, unix_ms=round(self._clock.unix_s() * 1000))

    # --- the control stream of a client
    async def _serve_client(self, connection: Connection, request: OpenSession) -> None:
        hop = self._open(connection, request)
        peer = connection.peer
        self._hops[hop.session_id] = hop
        self._sessions_changed()
        self._sessions_of[peer] += 1
        self._observer.session_opened()
        try:
            async with hop.running():
                connection.maximum_payload_bytes = hop.terms.maximum_payload_bytes
                await connection.send(
                    SessionOpened(
                        session_id=hop.session_id,
                        maximum_step_tokens=min(
                            self._engine.maximum_step_tokens, hop.terms.maximum_step_tokens
                        ),
                        maximum_steps_in_flight=hop.terms.maximum_steps_in_flight,
                        free_cache_tokens=self._engine.load.cache_tokens_free,
                        adapter_id=request.adapter_id,
                        **self._account_terms(hop),
                    )
                )
                if not self._accepting:
                    self._tell_draining(hop)
                await self._read_control(connection, hop)
        finally:
            del self._hops[hop.session_id]
            self._sessions_changed()
            self._sessions_of[peer] -= 1
            if not self._sessions_of[peer]:
                del self._sessions_of[peer]
            self._observer.session_closed()
        if hop.last_receipt is not None:
            await connection.send(hop.last_receipt)
        await connection.send(SessionClosed())

    def _accepted_policy(self, content: bytes) -> Policy | None:
        """The session's policy, if we satisfy it ourselves. Raises ProtocolError."""
        policy = Policy.from_bytes(content)
        if policy is not None:
            gate = self._gate
            own = None if gate is None else gate.known(self._transport.peer_id)
            policy.check(self._transport.peer_id, own)
        return policy

    def _account_terms(self, hop: Hop) -> dict[str, Any]:
        if self._ledger is None or hop.account is None:
            return {}
        return {
            "keeps_books": int(hop.account.wants_vouchers),
            "mflop_per_block_token": self._ledger.terms.mflop_per_block_token,
            "dtype_class": self._ledger.terms.dtype_class,
            "takes_renewals": int(hop.account.wants_vouchers),
        }

    def _renew(self, peer: PeerId, hop: Hop, message: RenewAllowance) -> None:
        if self._ledger is None or hop.account is None:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "no books are kept here")
        hop.renew(self._ledger.renewed(message, peer, hop.account.standing))

    def _open(self, connection: Connection, request: OpenSession) -> Hop:
        dtype, encoding = check_open(request)
        policy = self._accepted_policy(request.policy)
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
            maximum_step_tokens=accepted_step_tokens(engine.hidden_size, dtype),
            maximum_steps_in_flight=self._limits.steps_in_flight,
        )
        peer = connection.peer
        standing = self._ledger.admit(request, peer) if self._ledger else Standing(peer, 0)
        cache = engine.reserve(
            CacheRequest(
                first_block=request.first_block,
                end_block=request.end_block,
                rows=request.rows,
                maximum_tokens=request.maximum_tokens,
                wire_dtype=dtype,
                left_padding=request.left_padding,
                adapter_id=request.adapter_id,
                payer=standing.payer,
                priority=standing.priority,
            )
        )
        hop = Hop(
            terms=terms,
            previous_peer=PeerId(request.previous_peer),
            first_step=request.first_step,
            state_from=PeerId(request.state_from) if request.state_from else None,
            policy=policy,
            control=connection,
            engine=engine,
            cache=cache,
            blocks=request.end_block - request.first_block,
            observer=self._observer,
            clock=self._clock,
            limits=HopLimits(self._limits.session_idle_s, self._limits.session_lifetime_s),
            journal_budget=self.journals,
        )
        if self._ledger is not None:
            hop.account = self._ledger.account(standing, request, hop.session_id)
        return hop

    async def _read_control(self, connection: Connection, hop: Hop) -> None:
        while True:
            message = await self._receive(connection, hop.pong)
            try:
                match message:
                    case Step() | Replay():
                        hop.require_previous(connection.peer)
                        await hop.submit(message)
                    case SetRoute():
                        hop.check_route(message)
                        # Not here: dialling may take seconds, and the client's pings must not wait.
                        hop.start(self._set_route(connection, hop, message))
                    case SetPrevious():
                        hop.set_previous(message)
                        await connection.send(PreviousSet(route_version=message.route_version))
                    case SignedVoucher():
                        hop.take_voucher(message)
                    case RenewAllowance():
                        self._renew(connection.peer, hop, message)
                    case ProbePeer():
                        hop.start(hop.probe(PeerId(message.peer), self._reaches))
                    case HandOver():
                        hop.start(hop.hand_over(message, partial(self._dial, hop)))
                    case CloseSession():
                        return
                    case _:
                        raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(message).__name__)
            except ProtocolError as error:
                step = message.step if isinstance(message, Step) else 0
                version = message.route_version if isinstance(message, _ROUTING) else 0
                self._refused(connection.peer, error)
                hop.count_mistake(self._limits.errors_per_stream, error)
                await connection.refuse(error, step=step, route_version=version)

    async def _set_route(self, connection: Connection, hop: Hop, message: SetRoute) -> None:
        try:
            next_hop = None
            if message.next_peer:
                next_hop = hop.prepared(message) or await self._attach(hop, message)
            if next_hop is not None and message.prepare:
                hop.prepare(message, next_hop)
            else:
                await hop.set_route(message, next_hop)
        except ProtocolError as error:
            self._refused(connection.peer, error)
            await connection.refuse(error, route_version=message.route_version)
            return
        with contextlib.suppress(NetworkError):  # then the session is ending anyway
            await connection.send(RouteReady(route_version=message.route_version))

    async def _attach(self, hop: Hop, message: SetRoute) -> Connection:
        """Dial the next hop of a session and name the session that our steps belong to."""
        peer, version = PeerId(message.next_peer), message.route_version
        try:
            async with asyncio.timeout(self._limits.attach_timeout_s):
                next_hop = await self._dial(
                    hop, peer, Attach(session_id=message.next_session_id, route_version=version)
                )
                try:
                    await next_hop.receive_only(Attached)
                except BaseException:
                    await next_hop.close()
                    raise
        except RemoteError as error:
            raise ProtocolError(error.code, f"next hop {peer} refused") from None
        except (TimeoutError, NetworkError) as error:
            log.info("next hop %s cannot be attached: %s", peer, error)
            raise ProtocolError(ErrorCode.NEXT_HOP_LOST) from None
        return next_hop

    async def _dial(self, hop: StreamOwner, peer: PeerId, first: Attach | TakeOver) -> Connection:
        """A stream to a host of the same model, ``first`` sent on it. Raises SwarmErrors."""
        try:
            async with asyncio.timeout(self._limits.attach_timeout_s):
                stream = await self._stream_to(hop, peer)
                connection = Connection(stream, self._observer.bytes_moved)
                try:
                    await connection.say_hello(first, only_for=self._check_for(hop, peer))
                except BaseException:
                    await connection.close()
                    raise
        except TimeoutError:
            raise NetworkError(f"{peer} does not answer") from None
        return connection

    def _check_for(self, hop: StreamOwner, peer: PeerId) -> PassportCheck | None:
        """What a peer must pass before it sees anything of a session; None: nothing."""
        if hop.policy is None or peer == self._transport.peer_id:
            return None
        return hop.policy.check

    async def _stream_to(self, hop: StreamOwner, peer: PeerId) -> Stream:
        """A stream to a host of our model, which may be this node itself."""
        if peer == self._transport.peer_id:
            stream, other_end = stream_to_ourselves(peer)
            hop.start(self._serve_stream(other_end))
            return stream
        addresses = await self._resolve(peer)
        if addresses is None:
            raise ProtocolError(ErrorCode.NEXT_HOP_UNKNOWN)
        try:
            return await self._transport.open(peer, STREAM_PROTOCOL, addresses)
        except PeerUnreachable:
            # It may have started again elsewhere since we heard of it last.
            now_at = await self._resolve(peer, afresh=True)
            if now_at is None or set(now_at) == set(addresses):
                raise
            return await self._transport.open(peer, STREAM_PROTOCOL, now_at)

    async def _reaches(self, peer: PeerId) -> bool:
        """Whether a neighbour of a session answers a ping."""
        try:
            async with asyncio.timeout(self._limits.probe_timeout_s):
                addresses = await self._resolve(peer)
                stream = await self._transport.open(peer, STREAM_PROTOCOL, addresses or ())
                async with Connection(stream, self._observer.bytes_moved) as connection:
                    await connection.say_hello(Ping(nonce=1))
                    await connection.receive_only(Pong)
        except (TimeoutError, NetworkError, ProtocolError, RemoteError):
            return False
        return True

    # --- the stream of the previous hop
    async def _serve_previous_hop(self, connection: Connection, attach: Attach) -> None:
        hop = self._hops.get(attach.session_id)
        if hop is None:
            raise ProtocolError(ErrorCode.UNKNOWN_SESSION)
        hop.require_previous(connection.peer)
        self._require_policy(hop, connection)
        hop.attached(connection, attach.route_version)
        connection.maximum_payload_bytes = hop.terms.maximum_payload_bytes
        try:
            await connection.send(Attached(route_version=attach.route_version))
            while True:
                try:
                    message = await connection.receive()
                except DecodeError:
                    # Beyond what the session allows, or no message: a new stream would not help.
                    await hop.tell_client(ErrorCode.BAD_TENSOR, route_version=attach.route_version)
                    raise
                match message:
                    case Step() | Replay():
                        await hop.heard_from(connection)
                        try:
                            await hop.submit(message, voucher_may_come=True)
                        except ProtocolError as error:
                            self._refused(connection.peer, error)
                            hop.count_mistake(self._limits.errors_per_stream, error)
                            await hop.tell_client(
                                error.code,
                                step=message.step if isinstance(message, Step) else 0,
                                route_version=attach.route_version,
                            )
                    case Ping():
                        await connection.send(self._pong(message.nonce))
                    case _:
                        raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(message).__name__)
        finally:
            await hop.detached(connection)

    # --- the stream of a hop that leaves
    async def _serve_leaving_hop(self, connection: Connection, message: TakeOver) -> None:
        hop = self._hops.get(message.session_id)
        if hop is None:
            raise ProtocolError(ErrorCode.UNKNOWN_SESSION)
        self._require_policy(hop, connection)
        connection.maximum_payload_bytes = MAX_PAYLOAD_BYTES
        await hop.take_over(connection)

    def _require_policy(self, hop: StreamOwner, connection: Connection) -> None:
        check = self._check_for(hop, connection.peer)
        if check is not None:
            check(connection.peer, connection.passport)

    # --- training
    async def _serve_training(self, connection: Connection, request: OpenTraining) -> None:
        engine = self._engine
        policy = self._accepted_policy(request.policy)
        if request.model_revision != self._model_revision:
            raise ProtocolError(ErrorCode.UNKNOWN_MODEL)
        if not self._hosts(request.first_block, request.end_block):
            raise ProtocolError(ErrorCode.BLOCKS_NOT_HOSTED)
        if not self._accepting:
            raise ProtocolError(ErrorCode.DRAINING)
        if not isinstance(engine, TrainingEngine):
            raise ProtocolError(ErrorCode.TRAINING_NOT_OFFERED)
        await self._training.serve_client(connection, request, engine, engine.hidden_size, policy)

    # --- the stream of a client that looks at what was done
    async def _serve_auditor(self, connection: Connection, message: ReadTranscript) -> None:
        hop = self._hops.get(message.session_id)
        if hop is None:
            raise ProtocolError(ErrorCode.UNKNOWN_SESSION)
        await hop.show_transcript(connection, message)

    # --- bookkeeping
    def _sessions_changed(self) -> None:
        if self.sessions:
            self._no_sessions.clear()
        else:
            self._no_sessions.set()

    def _refused(self, peer: PeerId, error: ProtocolError) -> None:
        log.info("refused %s: %s", peer, error)
        self._observer.refused(error.code)

    def _retry_after_ms(self, error: ProtocolError) -> int:
        busy = {
            ErrorCode.NO_CAPACITY,
            ErrorCode.TOO_MANY_SESSIONS,
            ErrorCode.ADAPTER_NO_ROOM,
        }
        return self._limits.retry_after_ms if error.code in busy else 0
