"""One session on one node: its cache, its place in a chain, and the steps on their way through.

Tasks owned by :meth:`Hop.running` pass each step along: the caller submits it, one task computes in
order, one sends, so that a slow link does not keep the device waiting. Rules:

1. Steps are accepted by ``HopSession`` alone, and computed and sent in the order of acceptance.
2. A failure inside the engine ends the session: the client is told the code and the control stream
   closes. A mistake of a peer changes nothing.
3. Losing the next or the previous hop does not end the session: the client is told, and decides.
   What was computed meanwhile is kept, in the journal and as the results of the latest steps.
4. An output belongs to the route in force when it was made. A new route begins with what the next
   hop lacks: replays out of the journal, then the kept steps from ``resume_step`` on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from swarm.connection import Connection, error_message
from swarm.journal import Journal, JournalBudget
from swarm.ledger.channel import Equivocation
from swarm.node.accounts import PendingReceipt, SessionAccount, Standing
from swarm.node.engine.api import Engine, SessionCache, StepInput
from swarm.node.handover import Dial, Mover, SessionState, receive_state
from swarm.pieces import join_tokens, pieces
from swarm.ports import Clock
from swarm.protocol.errors import ErrorCode, NetworkError, ProtocolError
from swarm.protocol.identity import PeerId
from swarm.protocol.ledger_objects import Work
from swarm.protocol.messages import (
    MAX_HOPS,
    MAX_TOKENS,
    SESSION_ID_BYTES,
    Draining,
    Error,
    HandOver,
    JournalChunk,
    Ping,
    Pong,
    ProbeReport,
    ReadTranscript,
    Replay,
    Replayed,
    SetPrevious,
    SetRoute,
    SignedReceipt,
    SignedVoucher,
    Step,
    StepResult,
    TranscriptEnd,
    TranscriptPart,
)
from swarm.protocol.policy import Policy
from swarm.protocol.prices import step_work
from swarm.protocol.session import HopSession, SessionTerms, Verdict
from swarm.protocol.tensors import WireTensor

log = logging.getLogger(__name__)

REPLAY_TOKENS = 256
"""``rows x tokens`` of one Replay: large enough for the device, small enough to show progress."""
REPLAYS_WAITING = 8
MAXIMUM_PREPARED_ROUTES = 4
LINKS_PER_PART = 256

MAXIMUM_BACKGROUND_TASKS = 8
VOUCHER_WAIT_S = 2.0
"""For a voucher that was overtaken by its step."""


class HopObserver(Protocol):
    """What is counted for each step."""

    def step_done(
        self, *, rows: int, tokens: int, blocks: int, queue_us: int, compute_us: int
    ) -> None: ...

    def replayed(self, *, tokens: int) -> None:
        """So many tokens (rows x positions) were computed again for a session that heals."""


@dataclass(frozen=True, slots=True)
class HopLimits:
    """How long a session may stay without steps, and altogether."""

    idle_s: float
    lifetime_s: float


@dataclass(frozen=True, slots=True)
class Route:
    """Where outputs go. ``next_hop`` is None for the last hop, whose results go to the client."""

    version: int
    next_hop: Connection | None = None
    forward_replays: bool = False


@dataclass(frozen=True, slots=True)
class _Accepted:
    step: Step
    deadline_monotonic_s: float | None


@dataclass(frozen=True, slots=True)
class _Again:
    """A step that came again; its kept result is sent again, in its turn."""

    step: int


@dataclass(frozen=True, slots=True)
class _CatchUp:
    """Send the next hop what it lacks: replays to ``replay_end``, steps from ``resume_step``."""

    replay_end: int
    resume_step: int


class Hop:
    """The node's side of one session."""

    def __init__(
        self,
        *,
        terms: SessionTerms,
        previous_peer: PeerId,
        first_step: int,
        state_from: PeerId | None,
        policy: Policy | None = None,
        control: Connection,
        engine: Engine,
        cache: SessionCache,
        blocks: int,
        observer: HopObserver,
        clock: Clock,
        limits: HopLimits,
        journal_budget: JournalBudget,
    ) -> None:
        self.session_id = secrets.token_bytes(SESSION_ID_BYTES)
        self.terms = terms
        self.policy = policy
        """Which peers may see anything of the session; None: all."""
        self._previous_peer = previous_peer
        self._control = control
        self._engine = engine
        self._cache = cache
        self._blocks = blocks
        self._observer = observer
        self._clock = clock
        self._limits = limits
        self._state = HopSession(terms, first_step)
        self._journal = Journal(
            rows=terms.rows,
            hidden_size=terms.hidden_size,
            dtype=terms.wire_dtype,
            budget=journal_budget,
        )
        self._moved_state = SessionState(self._state, engine, cache, self._journal)
        self._mover = Mover(self._moved_state)
        self._state_from = state_from
        self._inbox: asyncio.Queue[_Accepted | _Again | Replay] = asyncio.Queue(
            2 * terms.maximum_steps_in_flight + REPLAYS_WAITING
        )
        self._outbox: asyncio.Queue[tuple[Route, Step | StepResult | Replay | _CatchUp]] = (
            asyncio.Queue(terms.maximum_steps_in_flight)
        )
        self._kept: dict[int, Step | StepResult] = {}
        self._route = Route(0)
        self._next_peer: PeerId | None = None
        self._prepared: dict[tuple[str, bytes], Connection] = {}
        self._upstreams: dict[Connection, int] = {}
        self._attached_version = -1
        self._previous_version = 0
        self._tasks: asyncio.TaskGroup | None = None
        self._background: set[asyncio.Task[object]] = set()
        self._opened_s = self._last_step_s = clock.monotonic_s()
        self._mistakes = 0
        self.account: SessionAccount | None = None
        """Of a node that keeps books; set before the session runs."""
        self.last_receipt: SignedReceipt | None = None
        """After the session: for the last voucher that came."""
        self._voucher_came = asyncio.Event()

    # --- life
    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Own the session's tasks; leaving frees the cache and closes the streams to neighbours."""
        failure: Exception | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                own = [
                    tasks.create_task(self._compute_all()),
                    tasks.create_task(self._send_outputs()),
                    tasks.create_task(self._expire()),
                ]
                try:
                    yield
                except Exception as error:  # re-raised below, outside of the group's wrapping
                    failure = error
                finally:
                    for task in (*own, *self._background):
                        task.cancel()
                    await self._close_neighbours()
        finally:
            self._tasks = None
            self._cache.close()
            self._journal.drop()
            if self.account is not None:
                self.last_receipt = await self.account.close()
        if failure is not None:
            raise failure

    async def _close_neighbours(self) -> None:
        next_hop = [self._route.next_hop] if self._route.next_hop is not None else []
        for connection in (*next_hop, *self._prepared.values(), *self._upstreams):
            await connection.close()
        await self._mover.close()

    async def _expire(self) -> None:
        while True:
            now_s = self._clock.monotonic_s()
            left_s = min(
                self._last_step_s + self._limits.idle_s - now_s,
                self._opened_s + self._limits.lifetime_s - now_s,
            )
            if left_s <= 0:
                await self._fail(ErrorCode.SESSION_EXPIRED)
                return
            await self._clock.sleep(left_s)

    async def _fail(self, code: ErrorCode, step: int = 0) -> None:
        await self.tell_client(code, step=step)
        await self._control.close()

    async def tell_client(self, code: ErrorCode, *, step: int = 0, route_version: int = 0) -> None:
        """Send the client a code; if the control stream is gone, the session is ending anyway."""
        with contextlib.suppress(NetworkError):
            await self._control.send(error_message(code, step=step, route_version=route_version))

    def count_mistake(self, allowed: int, error: ProtocolError) -> None:
        """Forgive a few mistakes of a peer; raise ``error`` again when there are too many."""
        self._mistakes += 1
        if self._mistakes > allowed:
            raise error

    def pong(self, nonce: int) -> Pong:
        """The answer to the client's ping: how far the session's steps have come."""
        return Pong(
            nonce=nonce,
            received_step=self._state.received_step,
            computed_step=self._state.computed_step,
            unix_ms=round(self._clock.unix_s() * 1000),
        )

    def start(self, work: Coroutine[None, None, object]) -> None:
        """Run ``work`` beside the session, which owns it: it ends with it at the latest."""
        if self._tasks is None or len(self._background) >= MAXIMUM_BACKGROUND_TASKS:
            work.close()
            raise ProtocolError(ErrorCode.BAD_FIELD, "too much at once")
        task = self._tasks.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def probe(self, peer: PeerId, reaches: Callable[[PeerId], Awaitable[bool]]) -> None:
        """Report to the client whether a neighbour is there, as ``reaches`` finds it."""
        # Nobody is made to dial strangers.
        if peer not in (self._previous_peer, self._next_peer):
            await self.tell_client(ErrorCode.NOT_NAMED_BY_SESSION)
            return
        reachable = await reaches(peer)
        with contextlib.suppress(NetworkError):
            await self._control.send(ProbeReport(peer=peer, reachable=int(reachable)))

    # --- the previous hop
    def require_previous(self, peer: PeerId) -> None:
        """Raise ProtocolError unless the session named ``peer`` as the source of activations."""
        if peer != self._previous_peer:
            raise ProtocolError(ErrorCode.NOT_NAMED_BY_SESSION, f"steps from {peer}")

    def set_previous(self, message: SetPrevious) -> None:
        """Expect another peer's stream. Raises ProtocolError for an older route."""
        version = message.route_version
        if version <= self._previous_version:
            raise ProtocolError(ErrorCode.BAD_FIELD, "an older route")
        self._previous_version = version
        # Whatever version the former peer has claimed: what the client says is newer.
        self._attached_version = min(self._attached_version, version - 1)
        for upstream, claimed in self._upstreams.items():
            self._upstreams[upstream] = min(claimed, version - 1)
        self._previous_peer = PeerId(message.previous_peer)

    def attached(self, upstream: Connection, route_version: int) -> None:
        """Take steps from ``upstream`` too; its first one ends the streams of older routes."""
        if route_version <= self._attached_version or route_version < self._previous_version:
            raise ProtocolError(ErrorCode.BAD_FIELD, "an older route")
        self._attached_version = route_version
        self._upstreams[upstream] = route_version

    async def heard_from(self, upstream: Connection) -> None:
        """Something came over ``upstream``: streams of older routes have done their part."""
        if len(self._upstreams) < 2:
            return
        version = self._upstreams.get(upstream, 0)
        for other, other_version in tuple(self._upstreams.items()):
            if other_version < version:
                del self._upstreams[other]
                await other.close()

    async def detached(self, upstream: Connection) -> None:
        """A previous hop's stream ended; tell the client unless a newer one took its place."""
        version = self._upstreams.pop(upstream, None)
        if version == self._attached_version and self._tasks is not None:
            await self.tell_client(ErrorCode.PREVIOUS_HOP_LOST, route_version=version)

    # --- accounts
    def take_voucher(self, message: SignedVoucher) -> None:
        """A voucher counts at once; its receipt follows when it is kept. Raises ProtocolError."""
        account = self.account
        if account is None:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "no books are kept here")
        try:
            pending = account.accept(message)
        except Equivocation as error:
            self.start(account.keep_evidence(error))
            raise
        self._voucher_came.set()
        self.start(self._send_receipt(account, pending))

    def renew(self, standing: Standing) -> None:
        """Later vouchers draw on another allowance. Raises ProtocolError."""
        account = self.account
        if account is None:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "no books are kept here")
        last = account.renew(standing)
        if last is not None:
            self.start(account.end(last))

    async def _send_receipt(self, account: SessionAccount, pending: PendingReceipt) -> None:
        receipt = await account.keep(pending)
        with contextlib.suppress(NetworkError):
            await self._control.send(receipt)

    def _count(self, work: Work) -> None:
        if self.account is not None:
            self.account.add(work)

    async def _be_covered(self, work: Work, *, voucher_may_come: bool) -> None:
        """Refuse work beyond two windows that no voucher covers.

        A voucher and a step on different streams race: the step waits for it a little.
        """
        account = self.account
        if account is None or account.may_do(work):
            return
        if voucher_may_come:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(VOUCHER_WAIT_S):
                    while not account.may_do(work):
                        self._voucher_came.clear()
                        await self._voucher_came.wait()
        if not account.may_do(work):
            raise ProtocolError(ErrorCode.VOUCHER_MISSING)

    # --- moving to another node
    async def tell_draining(self, wait_s: float) -> None:
        """Ask the client for a replacement."""
        with contextlib.suppress(NetworkError):
            await self._control.send(Draining(wait_ms=round(wait_s * 1000)))

    async def end_for_leaving(self) -> None:
        """End the session because the node cannot wait any longer."""
        await self._fail(ErrorCode.DRAINING)

    async def hand_over(self, message: HandOver, dial: Dial) -> None:
        """Move the session's state as far as it is, and tell the client."""
        answer = await self._mover.hand_over(message, dial)
        with contextlib.suppress(NetworkError):
            await self._control.send(answer)

    async def take_over(self, leaving: Connection) -> None:
        """Take the session's state from the hop that the client named, then tell the client."""
        if leaving.peer != self._state_from or self._tasks is None:
            raise ProtocolError(ErrorCode.NOT_NAMED_BY_SESSION, f"state from {leaving.peer}")
        self._state_from = None  # one stream only
        self._upstreams[leaving] = -1
        try:
            answer = await receive_state(leaving, self._moved_state)
        finally:
            self._upstreams.pop(leaving, None)
        self._last_step_s = self._clock.monotonic_s()
        with contextlib.suppress(NetworkError):
            await self._control.send(answer)

    # --- what was handled
    async def show_transcript(self, connection: Connection, message: ReadTranscript) -> None:
        """Show the session's client what was handled, and what was sent on."""
        if connection.peer != self._control.peer:
            raise ProtocolError(ErrorCode.NOT_NAMED_BY_SESSION, "not the session's client")
        if self.account is None:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "no books are kept here")
        start, links = self.account.transcript.read()
        for first in range(0, len(links), LINKS_PER_PART):
            part = links[first : first + LINKS_PER_PART]
            await connection.send(TranscriptPart(links=tuple(link.to_bytes() for link in part)))
        end = min(message.end_position, self._journal.length)
        for position, piece in pieces(
            self._journal.read(0, end), max(1, REPLAY_TOKENS // self.terms.rows)
        ):
            await connection.send(JournalChunk(position=position, activations=piece))
        await connection.send(TranscriptEnd(start=start, journal_gone=int(self._journal.is_gone)))

    # --- the route
    def check_route(self, message: SetRoute) -> None:
        """Raise ProtocolError for a route that is not newer, or if the journal lacks its part."""
        if message.route_version <= self._route.version:
            raise ProtocolError(ErrorCode.BAD_FIELD, "an older route")
        if message.replay_end and (
            self._journal.is_gone
            or (message.replay_end < MAX_TOKENS and message.replay_end > self._journal.length)
        ):
            raise ProtocolError(ErrorCode.JOURNAL_GONE)
        if message.prepare and len(self._prepared) >= MAXIMUM_PREPARED_ROUTES:
            raise ProtocolError(ErrorCode.BAD_FIELD, "too many prepared routes")

    def prepared(self, message: SetRoute) -> Connection | None:
        """The stream that was attached in advance for this route, if there is one."""
        return self._prepared.pop((message.next_peer, message.next_session_id), None)

    def prepare(self, message: SetRoute, next_hop: Connection) -> None:
        """Keep a stream for a route that will be set later."""
        self._prepared[message.next_peer, message.next_session_id] = next_hop

    async def set_route(self, message: SetRoute, next_hop: Connection | None) -> None:
        """From now on outputs go to ``next_hop``, which this session owns and closes.

        None makes this the last hop: results go to the client. Raises ProtocolError for an older
        route.
        """
        if self._tasks is None or message.route_version <= self._route.version:
            if next_hop is not None:
                await next_hop.close()
            raise ProtocolError(ErrorCode.BAD_FIELD, "an older route")
        self._next_peer = PeerId(message.next_peer) if message.next_peer else None
        previous = self._route.next_hop
        route = Route(message.route_version, next_hop, bool(message.forward_replays))
        self._route = route
        # What waits belongs to the old route: it is in the journal or kept, and sent again from
        # there if it is missing.
        while not self._outbox.empty():
            self._outbox.get_nowait()
        if message.replay_end or message.resume_step:
            self._outbox.put_nowait((route, _CatchUp(message.replay_end, message.resume_step)))
        if next_hop is not None:
            self._tasks.create_task(self._watch(route, next_hop))
        if previous is not None:
            await previous.close()

    @property
    def relayed_next_peer(self) -> PeerId | None:
        """The next hop, when our stream to it goes through a relay."""
        next_hop = self._route.next_hop
        return next_hop.peer if next_hop is not None and next_hop.relayed else None

    async def give_up_next_stream(self) -> None:
        """Close it. The client is told, sets the route again, and nothing is lost."""
        if self._route.next_hop is not None:
            await self._route.next_hop.close()

    async def _watch(self, route: Route, next_hop: Connection) -> None:
        """Nothing but errors comes back from a next hop; its end must reach the client at once."""
        try:
            while True:
                message = await next_hop.receive()
                if isinstance(message, Ping):
                    await next_hop.send(Pong(nonce=message.nonce))
                elif isinstance(message, Error):
                    log.info("next hop %s answered code %d", next_hop.peer, message.code)
        except (NetworkError, ProtocolError) as error:
            log.debug("next hop %s: %s", next_hop.peer, error)
        finally:
            await next_hop.close()
        if self._route is route:
            await self.tell_client(ErrorCode.NEXT_HOP_LOST, route_version=route.version)

    # --- steps and replays
    async def submit(self, message: Step | Replay, *, voucher_may_come: bool = False) -> None:
        """Accept what the previous hop sent. Raises ProtocolError, and then nothing changed.

        ``voucher_may_come``: on another stream, and perhaps a moment later.
        """
        rows, tokens, _ = message.activations.shape
        if isinstance(message, Replay):
            work = Work(prefill_tokens=rows * tokens)
            await self._be_covered(work, voucher_may_come=voucher_may_come)
            self._state.accept_replay(message)
            self._count(work)
            self._last_step_s = self._clock.monotonic_s()
            await self._inbox.put(message)
            return
        if len(message.hop_compute_us) >= MAX_HOPS or len(message.hop_queue_us) >= MAX_HOPS:
            raise ProtocolError(ErrorCode.BAD_FIELD, "too many hops")
        work = step_work(rows, tokens)
        if message.step > self._state.received_step:
            await self._be_covered(work, voucher_may_come=voucher_may_come)
        match self._state.accept(message):
            case Verdict.APPLY:
                self._count(work)
                self._last_step_s = self._clock.monotonic_s()
                deadline_s = (
                    self._last_step_s + message.deadline_ms / 1000 if message.deadline_ms else None
                )
                await self._inbox.put(_Accepted(message, deadline_s))
            case Verdict.ANSWER_AGAIN:
                await self._inbox.put(_Again(message.step))
            case Verdict.IN_PROGRESS:
                pass

    async def _compute_all(self) -> None:
        while True:
            work = await self._inbox.get()
            step = work.step.step if isinstance(work, _Accepted) else 0
            try:
                match work:
                    case _Accepted():
                        message = await self._compute_step(work)
                        await self._outbox.put((self._route, message))
                    case _Again():
                        kept = self._kept.get(work.step)
                        if kept is not None:
                            await self._outbox.put((self._route, kept))
                    case Replay():
                        await self._compute_replay(work)
            except ProtocolError as error:
                log.warning("step failed: %s", error)
                await self._fail(error.code, step)
                return
            except Exception:  # the one place for a session's engine: log and end the session
                log.exception("the engine failed")
                await self._fail(ErrorCode.INTERNAL, step)
                return

    async def _compute_step(self, accepted: _Accepted) -> Step | StepResult:
        step, deadline_s = accepted.step, accepted.deadline_monotonic_s
        if deadline_s is not None and self._clock.monotonic_s() >= deadline_s:
            raise ProtocolError(ErrorCode.DEADLINE_PASSED)
        last = self._next_peer is None
        rows, tokens, _ = step.activations.shape
        row_order = self._state.row_order_of(step)
        output, queue_us, compute_us = await self._through_engine(
            step.activations, step.position, step.output_tokens if last else tokens, row_order
        )
        self._mover.changed(0 if row_order else step.position)
        if self.account is not None and self.account.wants_vouchers:
            self.account.transcript.add(
                step=step.step, position=step.position, given=step.activations, answered=output
            )
        self._observer.step_done(
            rows=rows,
            tokens=tokens,
            blocks=self._blocks,
            queue_us=queue_us,
            compute_us=compute_us,
        )
        hop_queue_us = (*step.hop_queue_us, queue_us)
        hop_compute_us = (*step.hop_compute_us, compute_us)
        message: Step | StepResult
        if last:
            message = StepResult(
                step=step.step,
                position=step.position,
                activations=output,
                hop_queue_us=hop_queue_us,
                hop_compute_us=hop_compute_us,
            )
        else:
            self._journal.append(step.position, output, row_order)
            left_ms = 0
            if deadline_s is not None:
                left_ms = max(1, round((deadline_s - self._clock.monotonic_s()) * 1000))
            message = Step(
                step=step.step,
                position=step.position,
                output_tokens=step.output_tokens,
                activations=output,
                row_order=step.row_order,
                deadline_ms=left_ms,
                hop_queue_us=hop_queue_us,
                hop_compute_us=hop_compute_us,
            )
        self._kept[step.step] = message
        for dropped in self._state.completed(step.step):
            del self._kept[dropped]
        return message

    async def _compute_replay(self, replay: Replay) -> None:
        rows, tokens, _ = replay.activations.shape
        last = self._next_peer is None
        output, _, _ = await self._through_engine(
            replay.activations, replay.position, 1 if last else tokens, ()
        )
        self._mover.changed(replay.position)
        if self.account is not None and self.account.wants_vouchers:
            self.account.transcript.add(
                step=0, position=replay.position, given=replay.activations, answered=output
            )
        self._observer.replayed(tokens=rows * tokens)
        if not last:
            self._journal.append(replay.position, output)
        if self._route.forward_replays:
            message = Replay(
                position=replay.position,
                activations=output,
                rows_as_of_step=replay.rows_as_of_step,
            )
            await self._outbox.put((self._route, message))
            return
        with contextlib.suppress(NetworkError):  # then the session is ending anyway
            await self._control.send(Replayed(length=replay.position + tokens))

    async def _through_engine(
        self,
        activations: WireTensor,
        position: int,
        output_tokens: int,
        row_order: tuple[int, ...],
    ) -> tuple[WireTensor, int, int]:
        """Activations out, queue and compute time in microseconds.

        What is longer than this engine likes goes through it in pieces.
        """
        rows, tokens, _ = activations.shape
        per_piece = max(1, self._engine.maximum_step_tokens // rows)
        outputs: list[WireTensor] = []
        queue_us = compute_us = 0
        for first, piece in pieces(activations, per_piece):
            last = first + piece.shape[1]
            output = await self._engine.step(
                self._cache,
                StepInput(
                    activations=piece,
                    position=position + first,
                    output_tokens=max(1, last - max(first, tokens - output_tokens)),
                    row_order=row_order if first == 0 else (),
                ),
            )
            outputs.append(output.activations)
            queue_us += output.queue_us
            compute_us += output.compute_us
        joined = join_tokens(outputs, output_tokens)
        return replace(joined, encoding=self.terms.wire_encoding), queue_us, compute_us

    # --- outputs
    async def _send_outputs(self) -> None:
        while True:
            route, message = await self._outbox.get()
            if route is not self._route:
                continue
            target = self._control if route.next_hop is None else route.next_hop
            try:
                if isinstance(message, _CatchUp):
                    await self._catch_up(route, message, target)
                else:
                    await target.send(message)
            except NetworkError as error:
                log.debug("output to %s lost: %s", target.peer, error)
                if route.next_hop is not None and route is self._route:
                    await self.tell_client(ErrorCode.NEXT_HOP_LOST, route_version=route.version)

    async def _catch_up(self, route: Route, work: _CatchUp, target: Connection) -> None:
        # All at once: a step computed meanwhile may permute the rows of what is still to be sent.
        journal = self._journal.read(0, work.replay_end)
        rows_as_of_step = self._state.rows_as_of_step
        for position, piece in pieces(journal, max(1, REPLAY_TOKENS // self.terms.rows)):
            if route is not self._route:
                return
            await target.send(
                Replay(
                    position=position,
                    activations=replace(piece, encoding=self.terms.wire_encoding),
                    rows_as_of_step=rows_as_of_step,
                )
            )
        if work.resume_step:
            for number in sorted(self._kept):
                if number >= work.resume_step:
                    await target.send(self._kept[number])
