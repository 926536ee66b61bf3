"""A live chain: one session through the hops that together hold all blocks of a model.

Activations go to the first hop and come back from the last one; between hops they travel directly.
``Chain.run`` is the one task of a chain and owns its readers and its heartbeat; the application
puts it into its TaskGroup. ``step`` may be called from any task of the same loop, one at a time.

The chain knows neither tokens nor torch: ``client.model`` and ``client.generate`` do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from swarm.client.pieces import join_tokens, slice_tokens
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
from swarm.protocol.messages import (
    MAX_DEADLINE_MS,
    CloseSession,
    Error,
    Message,
    OpenSession,
    Ping,
    Pong,
    RouteReady,
    SessionClosed,
    SessionOpened,
    SetRoute,
    Step,
    StepResult,
)
from swarm.protocol.session import ClientSession, SessionTerms
from swarm.protocol.tensors import DType, Encoding, WireTensor
from swarm.protocol.version import STREAM_PROTOCOL
from swarm.routing import ChainPlan, is_one_machine
from swarm.routing import Hop as PlannedHop

log = logging.getLogger(__name__)

T = TypeVar("T")

ROUTE_VERSION = 1
PIPELINED_PIECE_TOKENS = 128
"""Small enough to fill a chain of a few hops with a common prompt, large enough for the device."""


class HopFailed(NetworkError):
    """A hop refused, broke the protocol or is gone; ``peer_id`` says which, the cause says why."""

    def __init__(self, hop: PlannedHop, cause: SwarmError) -> None:
        self.peer_id = hop.peer_id
        self.code = cause.code if isinstance(cause, RemoteError | ProtocolError) else None
        self.retry_after_ms = cause.retry_after_ms if isinstance(cause, RemoteError) else 0
        name = hop.display_name or hop.peer_id
        reason = ERROR_TEXTS[cause.code] if isinstance(cause, RemoteError) else str(cause)
        super().__init__(f"{name} (blocks {hop.first_block}-{hop.end_block - 1}): {reason}")
        self.__cause__ = cause


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """What a session needs from every hop."""

    model_revision: bytes
    hidden_size: int
    rows: int
    maximum_tokens: int
    wire_dtype: DType
    left_padding: tuple[int, ...] = ()
    wire_encoding: Encoding = Encoding.RAW


@dataclass(frozen=True, slots=True)
class ChainTimeouts:
    """How long a client waits for what."""

    open_s: float = 20.0
    step_s: float = 120.0
    heartbeat_s: float = 3.0
    silence_s: float = 12.0
    """A hop that answers no ping for this long is gone."""
    close_s: float = 2.0


class ChainObserver(Protocol):
    """What a client counts; ``client.metrics`` implements it. Hops are numbered from 0."""

    def chain_pass(self, rows: int, tokens: int, duration_s: float) -> None: ...

    def hops_through_client(self, count: int) -> None:
        """So many tensors crossed the client between two hops; always 0 by design."""

    def retried(self, reason: str) -> None:
        """A chain was given up for another; ``reason`` is one of a few fixed words."""

    def sent(self, hop: int, size_bytes: int) -> None: ...

    def received(self, hop: int, size_bytes: int) -> None: ...


@dataclass(slots=True)
class HopTimes:
    """What one hop reported for the latest step, in microseconds."""

    queue_us: int = 0
    compute_us: int = 0


@dataclass(slots=True)
class _Link:
    """The control stream of one hop."""

    plan: PlannedHop
    connection: Connection
    opened: SessionOpened
    last_heard_s: float
    times: HopTimes = field(default_factory=HopTimes)


class Chain:
    """One session through a chain of hops."""

    def __init__(
        self,
        transport: Transport,
        plan: ChainPlan,
        request: SessionRequest,
        *,
        clock: Clock,
        observer: ChainObserver | None = None,
        timeouts: ChainTimeouts | None = None,
    ) -> None:
        self._transport = transport
        self._plan = plan
        self._request = request
        self._clock = clock
        self._observer = observer
        self._timeouts = timeouts or ChainTimeouts()
        self._links: list[_Link] = []
        self._session: ClientSession | None = None
        self._results: dict[int, asyncio.Future[StepResult]] = {}
        self._may_issue = asyncio.Event()
        self._may_issue.set()
        self._goodbyes = asyncio.Semaphore(0)
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closing = asyncio.Event()
        self._ended = asyncio.Event()
        self._failure: SwarmError | None = None
        self._passes = 0
        self._one_step = asyncio.Lock()

    # --- what callers see
    @property
    def plan(self) -> ChainPlan:
        """The hops that serve this session."""
        return self._plan

    @property
    def passes(self) -> int:
        """Steps that went through the whole chain so far; a long prompt takes several."""
        return self._passes

    @property
    def length(self) -> int:
        """Tokens in the remote caches."""
        return self._session.length if self._session is not None else 0

    @property
    def hop_times(self) -> tuple[HopTimes, ...]:
        """Queue and compute time of each hop in the latest step."""
        return tuple(link.times for link in self._links)

    async def opened(self) -> None:
        """Wait until the chain is ready; raises why it could not be opened."""
        await asyncio.shield(self._opened)

    async def step(
        self,
        activations: WireTensor,
        position: int,
        *,
        output_tokens: int,
        row_order: tuple[int, ...] = (),
    ) -> WireTensor:
        """Pass ``[rows, tokens, hidden]`` through all blocks: ``[rows, output_tokens, hidden]``.

        ``position`` below :attr:`length` first drops what is cached from there on. Long inputs go
        as several steps, of which the hops work on different ones at the same time. Raises
        HopFailed when a hop fails and NetworkError when the answer is late; the chain is then of no
        more use. Cancelling is safe, but the chain must be closed afterwards.
        """
        async with self._one_step:
            session = self._usable_session()
            started_s = self._clock.monotonic_s()
            rows, tokens, _ = activations.shape
            per_step = max(1, self._piece_tokens(session) // rows)
            pending: list[asyncio.Future[StepResult]] = []
            try:
                async with asyncio.timeout(self._timeouts.step_s) as deadline:
                    for first in range(0, tokens, per_step):
                        last = min(first + per_step, tokens)
                        # Of an earlier piece the caller may want some positions too; at least one
                        # always comes back, since a result is also the acknowledgement.
                        wanted = max(1, last - max(first, tokens - output_tokens))
                        pending.append(
                            await self._send(
                                session,
                                slice_tokens(activations, first, last),
                                position + first,
                                output_tokens=wanted,
                                row_order=row_order if first == 0 else (),
                                deadline_s=deadline.when(),
                            )
                        )
                    results = [await future for future in pending]
            except TimeoutError:
                error = NetworkError(
                    f"no answer from the chain within {self._timeouts.step_s:.0f} s"
                )
                self._fail(error)
                raise error from None
            if self._observer is not None:
                self._observer.chain_pass(rows, tokens, self._clock.monotonic_s() - started_s)
            return join_tokens([result.activations for result in results], output_tokens)

    async def close(self) -> None:
        """Free the session on all hops and wait until the chain's task has ended."""
        self._closing.set()
        await self._ended.wait()

    @property
    def hops_through_client(self) -> int:
        """Tensors that crossed the client between two hops, counted on the streams: 0 by design."""
        return sum(self._relayed_by_client(link) for link in self._links)

    def _relayed_by_client(self, link: _Link) -> int:
        relayed = 0
        if link is not self._links[0]:
            relayed += link.connection.tensors_sent
        if link is not self._links[-1]:
            relayed += link.connection.tensors_received
        return relayed

    # --- the chain's task
    async def run(self) -> None:
        """Open the chain, keep it alive until :meth:`close` or a failure, then free it.

        Never raises for what a peer did: callers of ``opened`` and ``step`` get that.
        """
        try:
            async with AsyncExitStack() as stack:
                try:
                    async with asyncio.timeout(self._timeouts.open_s):
                        await self._open(stack)
                except TimeoutError:
                    raise NetworkError(
                        f"the chain could not be opened within {self._timeouts.open_s:.0f} s"
                    ) from None
                self._opened.set_result(None)
                async with asyncio.TaskGroup() as tasks:
                    own = [tasks.create_task(self._read(link)) for link in self._links]
                    own.append(tasks.create_task(self._heartbeat()))
                    await self._closing.wait()
                    if self._failure is None:
                        await self._say_goodbye()
                    for task in own:
                        task.cancel()
        except SwarmError as error:
            self._fail(error)
        finally:
            self._report()
            self._fail(NetworkError("the chain is closed"))
            if not self._opened.done():
                self._opened.set_exception(self._failure or NetworkError("the chain is closed"))
            if not self._opened.cancelled():
                self._opened.exception()  # read it once: nobody may be waiting
            self._ended.set()

    async def _open(self, stack: AsyncExitStack) -> None:
        hops = self._plan.hops
        async with asyncio.TaskGroup() as tasks:
            opening = [
                tasks.create_task(_outcome(self._open_hop(stack, index)))
                for index in range(len(hops))
            ]
        for task in opening:
            link = task.result()
            if isinstance(link, SwarmError):
                raise link
            self._links.append(link)
        request = self._request
        terms = SessionTerms(
            rows=request.rows,
            maximum_tokens=request.maximum_tokens,
            hidden_size=request.hidden_size,
            wire_dtype=request.wire_dtype,
            wire_encoding=request.wire_encoding,
            # What all hops accept.
            maximum_step_tokens=min(link.opened.maximum_step_tokens for link in self._links),
            maximum_steps_in_flight=min(
                link.opened.maximum_steps_in_flight for link in self._links
            ),
        )
        if terms.maximum_step_tokens < 1 or terms.maximum_steps_in_flight < 1:
            raise ProtocolError(ErrorCode.BAD_FIELD, "a hop accepts no steps")
        self._session = ClientSession(terms)
        self._links[-1].connection.maximum_payload_bytes = terms.maximum_payload_bytes
        async with asyncio.TaskGroup() as tasks:
            routing = [
                tasks.create_task(_outcome(self._route(link, following)))
                for link, following in zip(self._links, self._links[1:], strict=False)
            ]
        for routed in routing:
            failure = routed.result()
            if failure is not None:
                raise failure

    async def _open_hop(self, stack: AsyncExitStack, index: int) -> _Link:
        hop = self._plan.hops[index]
        own = self._transport.peer_id
        previous = self._plan.hops[index - 1].peer_id if index else own
        request = self._request
        try:
            connection = Connection(
                await self._transport.open(hop.peer_id, STREAM_PROTOCOL, hop.addresses)
            )
            stack.push_async_callback(connection.close)
            await connection.say_hello(
                OpenSession(
                    model_revision=request.model_revision,
                    first_block=hop.first_block,
                    end_block=hop.end_block,
                    rows=request.rows,
                    maximum_tokens=request.maximum_tokens,
                    wire_dtype=int(request.wire_dtype),
                    wire_encoding=int(request.wire_encoding),
                    previous_peer=previous,
                    left_padding=request.left_padding,
                )
            )
            opened = await connection.receive_only(SessionOpened)
        except SwarmError as error:
            raise HopFailed(hop, error) from error
        return _Link(hop, connection, opened, self._clock.monotonic_s())

    async def _route(self, link: _Link, following: _Link) -> None:
        try:
            await link.connection.send(
                SetRoute(
                    route_version=ROUTE_VERSION,
                    next_peer=following.plan.peer_id,
                    next_session_id=following.opened.session_id,
                )
            )
            await link.connection.receive_only(RouteReady)
        except SwarmError as error:
            raise HopFailed(link.plan, error) from error

    def _report(self) -> None:
        if self._observer is None:
            return
        self._observer.hops_through_client(self.hops_through_client)
        for index, link in enumerate(self._links):
            self._observer.sent(index, link.connection.bytes_sent)
            self._observer.received(index, link.connection.bytes_received)

    async def _say_goodbye(self) -> None:
        """Ask all hops to free the session; the readers wait for their last words."""
        try:
            async with asyncio.timeout(self._timeouts.close_s):
                for link in self._links:
                    await link.connection.send(CloseSession())
                for _ in self._links:
                    await self._goodbyes.acquire()
        except (TimeoutError, NetworkError) as error:
            log.debug("a hop did not say goodbye: %s", error)

    # --- messages from hops
    async def _read(self, link: _Link) -> None:
        try:
            while True:
                message = await link.connection.receive()
                link.last_heard_s = self._clock.monotonic_s()
                if isinstance(message, SessionClosed):
                    if self._closing.is_set():
                        self._goodbyes.release()
                        return
                    raise NetworkError(f"{link.plan.peer_id} closed the session")
                await self._handle(link, message)
        except SwarmError as error:
            if self._closing.is_set():
                self._goodbyes.release()
            self._fail(HopFailed(link.plan, error))

    async def _handle(self, link: _Link, message: Message) -> None:
        match message:
            case StepResult() if link is self._links[-1] and self._session is not None:
                self._take_result(self._session, message)
            case Pong():
                pass
            case Ping():
                await link.connection.send(Pong(nonce=message.nonce))
            case Error():
                if self._closing.is_set():
                    return
                raise remote_error(message, link.plan.peer_id)
            case _:
                raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(message).__name__)

    def _take_result(self, session: ClientSession, result: StepResult) -> None:
        issued = session.accept(result)
        if issued is None:
            return
        for link, queue_us, compute_us in zip(
            self._links, result.hop_queue_us, result.hop_compute_us, strict=False
        ):
            link.times = HopTimes(queue_us, compute_us)
        self._passes += 1
        future = self._results.pop(issued.step)
        if not future.done():
            future.set_result(result)
        self._may_issue.set()

    async def _heartbeat(self) -> None:
        nonce = 0
        while True:
            await self._clock.sleep(self._timeouts.heartbeat_s)
            nonce += 1
            now_s = self._clock.monotonic_s()
            for link in self._links:
                if now_s - link.last_heard_s > self._timeouts.silence_s:
                    self._fail(HopFailed(link.plan, NetworkError("silent for too long")))
                    return
                try:
                    await link.connection.send(Ping(nonce=nonce))
                except NetworkError as error:
                    self._fail(HopFailed(link.plan, error))
                    return

    # --- steps
    async def _send(
        self,
        session: ClientSession,
        activations: WireTensor,
        position: int,
        *,
        output_tokens: int,
        row_order: tuple[int, ...],
        deadline_s: float | None,
    ) -> asyncio.Future[StepResult]:
        await self._may_issue.wait()
        self._usable_session()
        issued = session.issue(position, activations.shape[1], output_tokens)
        if not session.may_issue:
            self._may_issue.clear()
        loop = asyncio.get_running_loop()
        future = self._results[issued.step] = loop.create_future()
        left_ms = MAX_DEADLINE_MS
        if deadline_s is not None:
            left_ms = min(max(1, round((deadline_s - loop.time()) * 1000)), MAX_DEADLINE_MS)
        try:
            await self._links[0].connection.send(
                Step(
                    step=issued.step,
                    position=issued.position,
                    output_tokens=issued.output_tokens,
                    activations=replace(activations, encoding=session.terms.wire_encoding),
                    row_order=row_order,
                    deadline_ms=left_ms,
                )
            )
        except NetworkError as error:
            self._fail(HopFailed(self._links[0].plan, error))
            self._usable_session()
        return future

    def _piece_tokens(self, session: ClientSession) -> int:
        """Most ``rows x tokens`` of one piece of a long prompt.

        Hops on different machines work on different pieces at the same time. On one machine they
        would only take each other's cores: there a prompt goes in as few pieces as nodes allow.
        """
        most = session.terms.maximum_step_tokens
        if len(self._plan.hops) == 1 or is_one_machine(self._plan):
            return most
        return min(most, PIPELINED_PIECE_TOKENS)

    def _usable_session(self) -> ClientSession:
        if self._failure is not None:
            raise self._failure
        if self._session is None or not self._opened.done():
            raise RuntimeError("await opened() first")
        return self._session

    def _fail(self, error: SwarmError) -> None:
        """The first failure ends the chain: everybody who waits gets it."""
        if self._failure is not None:
            return
        self._failure = error
        for future in self._results.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # its waiter may have been cancelled
        self._results.clear()
        self._may_issue.set()
        self._closing.set()


async def _outcome(work: Coroutine[None, None, T]) -> T | SwarmError:
    """The result or our error: so that one hop's refusal does not cancel the others unasked."""
    try:
        return await work
    except SwarmError as error:
        return error
