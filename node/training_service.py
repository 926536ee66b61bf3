"""Training sessions of a node: opened for clients, joined to neighbours, ended with their streams.

As with inference, a session belongs to the control stream of its client. What it computes is in
``node.engine.training``, one session in ``node.training_hop``; streams, limits and counters are the
service's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from swarm.compute.lora import AdapterShape, Method
from swarm.compute.training_terms import OptimizerKind, OptimizerSettings, TrainingTerms
from swarm.connection import Connection
from swarm.node.engine.training_api import TrainingEngine, TrainingRequest
from swarm.node.training_hop import TrainingHop
from swarm.ports import Clock
from swarm.protocol.errors import ErrorCode, NetworkError, ProtocolError, RemoteError, UsageError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import (
    MAX_PAYLOAD_BYTES,
    ApplyGradients,
    AskGradientNorm,
    AskState,
    Attach,
    Attached,
    BackwardPart,
    CloseSession,
    ForgetMicroBatch,
    ForwardPart,
    Message,
    OpenTraining,
    RouteReady,
    SessionClosed,
    SetRoute,
    ShowMicroBatch,
    StateEnd,
    StatePart,
    TrainingOpened,
)
from swarm.protocol.policy import Policy
from swarm.protocol.tensors import DType

MAXIMUM_TRAINED_TOKENS = 1 << 16
"""Of one micro-batch; what is really accepted depends on the memory that is free."""


@dataclass(frozen=True, slots=True)
class Streams:
    """What the service does for sessions of both kinds."""

    receive: Callable[[Connection], Awaitable[Message]]
    """The next message that is no ping. Raises NetworkError when the peer is gone."""
    dial: Callable[[TrainingHop, PeerId, Attach], Awaitable[Connection]]
    """A stream to a host of the same model, its first message sent. Raises SwarmErrors."""
    require_policy: Callable[[TrainingHop, Connection], None]
    """Raises ProtocolError for a peer that the session's policy keeps out."""
    refused: Callable[[PeerId, ProtocolError], None]
    """Logs and counts."""


@dataclass(frozen=True, slots=True)
class TrainingLimits:
    sessions: int = 16
    sessions_per_peer: int = 4
    errors_per_stream: int = 16
    attach_timeout_s: float = 5.0
    idle_s: float = 600.0


class TrainingService:
    """The training sessions of one node."""

    def __init__(
        self,
        streams: Streams,
        *,
        clock: Clock,
        limits: TrainingLimits,
        changed: Callable[[], None],
    ) -> None:
        """``changed`` is called whenever a session has begun or ended."""
        self._streams = streams
        self._clock = clock
        self._limits = limits
        self._changed = changed
        self._hops: dict[bytes, TrainingHop] = {}
        self._sessions_of: Counter[PeerId] = Counter()

    @property
    def sessions(self) -> int:
        return len(self._hops)

    def has(self, session_id: bytes) -> bool:
        return session_id in self._hops

    def tell_draining(self, wait_s: float) -> None:
        for hop in self._hops.values():
            with contextlib.suppress(ProtocolError):  # it ends at this moment
                hop.start(hop.tell_draining(wait_s))

    async def end_sessions(self) -> None:
        for hop in tuple(self._hops.values()):
            await hop.end_for_leaving()

    # --- the control stream of a client
    async def serve_client(
        self,
        connection: Connection,
        message: OpenTraining,
        engine: TrainingEngine,
        hidden_size: int,
        policy: Policy | None,
    ) -> None:
        """One session from its opening to its end; revision and policy have been checked."""
        request = training_request(message)
        async with self._counted(connection.peer):
            session = await engine.open_training(request)
            hop = TrainingHop(
                request=request,
                hidden_size=hidden_size,
                previous_peer=PeerId(message.previous_peer),
                policy=policy,
                control=connection,
                session=session,
                clock=self._clock,
                idle_s=self._limits.idle_s,
            )
            self._hops[hop.session_id] = hop
            self._changed()
            try:
                async with hop.running():
                    connection.maximum_payload_bytes = MAX_PAYLOAD_BYTES
                    await connection.send(
                        TrainingOpened(
                            session_id=hop.session_id,
                            reserved_bytes=session.reserved_bytes,
                            dtype_class=session.dtype_class,
                            audited_micro_batches=request.audited_micro_batches,
                        )
                    )
                    await self._read_control(connection, hop)
            finally:
                del self._hops[hop.session_id]
                self._changed()
        await connection.send(SessionClosed())

    @asynccontextmanager
    async def _counted(self, peer: PeerId) -> AsyncIterator[None]:
        if self._sessions_of.total() >= self._limits.sessions:
            raise ProtocolError(ErrorCode.NO_CAPACITY, "training sessions")
        if self._sessions_of[peer] >= self._limits.sessions_per_peer:
            raise ProtocolError(ErrorCode.TOO_MANY_SESSIONS)
        self._sessions_of[peer] += 1
        try:
            yield
        finally:
            self._sessions_of[peer] -= 1
            if not self._sessions_of[peer]:
                del self._sessions_of[peer]

    async def _read_control(self, connection: Connection, hop: TrainingHop) -> None:
        while True:
            message = await self._streams.receive(connection)
            try:
                match message:
                    case ForwardPart():
                        hop.take_activations(message, connection)
                    case BackwardPart():
                        hop.take_gradients(message, connection)
                    case ForgetMicroBatch():
                        hop.forget(message.micro_batch)
                    case AskGradientNorm():
                        hop.ask_norm(message)
                    case ApplyGradients():
                        hop.apply(message)
                    case AskState():
                        hop.ask_state(message)
                    case ShowMicroBatch():
                        hop.show(message.micro_batch)
                    case StatePart() | StateEnd():
                        hop.take_state(message)
                    case SetRoute():
                        hop.claim_route()
                        hop.start(self._set_route(connection, hop, message))
                    case CloseSession():
                        return
                    case _:
                        raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(message).__name__)
            except ProtocolError as error:
                self._streams.refused(connection.peer, error)
                hop.count_mistake(self._limits.errors_per_stream, error)
                await connection.refuse(error)

    async def _set_route(self, connection: Connection, hop: TrainingHop, message: SetRoute) -> None:
        try:
            hop.set_next(await self._attach(hop, message) if message.next_peer else None)
        except ProtocolError as error:
            self._streams.refused(connection.peer, error)
            await connection.refuse(error, route_version=message.route_version)
            return
        with contextlib.suppress(NetworkError):  # then the session is ending anyway
            await connection.send(RouteReady(route_version=message.route_version))

    async def _attach(self, hop: TrainingHop, message: SetRoute) -> Connection:
        peer = PeerId(message.next_peer)
        attach = Attach(session_id=message.next_session_id, route_version=message.route_version)
        try:
            async with asyncio.timeout(self._limits.attach_timeout_s):
                next_hop = await self._streams.dial(hop, peer, attach)
                next_hop.maximum_payload_bytes = MAX_PAYLOAD_BYTES
                try:
                    await next_hop.receive_only(Attached)
                except BaseException:
                    await next_hop.close()
                    raise
        except RemoteError as error:
            raise ProtocolError(error.code, f"next hop {peer} refused") from None
        except (TimeoutError, NetworkError):
            raise ProtocolError(ErrorCode.NEXT_HOP_LOST) from None
        return next_hop

    # --- the stream of the previous hop
    async def serve_previous_hop(self, connection: Connection, attach: Attach) -> None:
        """Activations of a session that is here, until the stream ends."""
        hop = self._hops[attach.session_id]
        self._streams.require_policy(hop, connection)
        hop.attached(connection)
        connection.maximum_payload_bytes = MAX_PAYLOAD_BYTES
        try:
            await connection.send(Attached(route_version=attach.route_version))
            while True:
                message = await connection.receive()
                if not isinstance(message, ForwardPart):
                    raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(message).__name__)
                hop.take_activations(message, connection)
        except ProtocolError as error:
            await hop.tell_client(error.code)
            raise
        except NetworkError:
            await hop.tell_client(ErrorCode.PREVIOUS_HOP_LOST)
            raise


def training_request(message: OpenTraining) -> TrainingRequest:
    """Check what the field bounds cannot say. Raises ProtocolError."""
    if not 1 <= message.maximum_tokens <= MAXIMUM_TRAINED_TOKENS:
        raise ProtocolError(ErrorCode.TOO_LARGE, "tokens of a micro-batch")
    try:
        shape = AdapterShape(
            Method(message.method), message.rank, message.alpha, message.target_modules
        )
        terms = TrainingTerms(
            adapter=shape,
            optimizer=OptimizerSettings(
                OptimizerKind(message.optimizer),
                message.beta1,
                message.beta2,
                message.epsilon,
                message.weight_decay,
            ),
            dropout=message.dropout,
            seed=message.seed,
            maximum_tokens=message.maximum_tokens,
            micro_batches_in_flight=message.micro_batches_in_flight,
        )
    except (ValueError, UsageError):
        raise ProtocolError(ErrorCode.BAD_FIELD, "terms of training") from None
    try:
        dtype = DType(message.wire_dtype)
    except ValueError:
        raise ProtocolError(ErrorCode.UNSUPPORTED_DTYPE) from None
    return TrainingRequest(
        message.first_block, message.end_block, dtype, terms, message.audited_micro_batches
    )
