"""One session on one node: its cache, its place in a chain, and the steps on their way through.

Three tasks, owned by :meth:`Hop.running`, pass each step along: the caller submits it, one task
computes in order, one sends, so that a slow link does not keep the device waiting. Rules:

1. Steps are accepted by ``HopSession`` alone, and computed and sent in the order of acceptance.
2. A failure inside the engine ends the session: the client is told the code and the control stream
   closes. A mistake of a peer changes nothing.
3. Losing the next or the previous hop does not end the session; the client is told, and decides.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from swarm.connection import Connection, error_message
from swarm.node.engine.api import Engine, SessionCache, StepInput
from swarm.ports import Clock
from swarm.protocol.errors import ErrorCode, NetworkError, ProtocolError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import (
    MAX_HOPS,
    SESSION_ID_BYTES,
    Error,
    Ping,
    Pong,
    Step,
    StepResult,
)
from swarm.protocol.session import HopSession, SessionTerms, Verdict
from swarm.protocol.tensors import WireTensor

log = logging.getLogger(__name__)


class HopObserver(Protocol):
    """What is counted for each step."""

    def step_done(self, *, rows: int, tokens: int, queue_us: int, compute_us: int) -> None: ...


@dataclass(frozen=True, slots=True)
class HopLimits:
    """How long a session may stay without steps, and altogether."""

    idle_s: float
    lifetime_s: float


@dataclass(frozen=True, slots=True)
class _Accepted:
    step: Step
    deadline_monotonic_s: float | None


class Hop:
    """The node's side of one session."""

    def __init__(
        self,
        *,
        terms: SessionTerms,
        previous_peer: PeerId,
        control: Connection,
        engine: Engine,
        cache: SessionCache,
        observer: HopObserver,
        clock: Clock,
        limits: HopLimits,
    ) -> None:
        self.session_id = secrets.token_bytes(SESSION_ID_BYTES)
        self.terms = terms
        self._previous_peer = previous_peer
        self._control = control
        self._engine = engine
        self._cache = cache
        self._observer = observer
        self._clock = clock
        self._limits = limits
        self._state = HopSession(terms)
        self._accepted: asyncio.Queue[_Accepted] = asyncio.Queue(terms.maximum_steps_in_flight)
        self._outbox: asyncio.Queue[Step | StepResult] = asyncio.Queue(
            terms.maximum_steps_in_flight
        )
        self._kept: dict[int, Step | StepResult] = {}
        self._route_version = 0
        self._next_hop: Connection | None = None
        self._attached_version = -1
        self._upstream: Connection | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._opened_s = self._last_step_s = clock.monotonic_s()
        self._mistakes = 0

    # --- life
    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Own the session's tasks; leaving frees the cache and closes the streams to neighbours."""
        failure: Exception | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                own = [
                    tasks.create_task(self._compute_steps()),
                    tasks.create_task(self._send_outputs()),
                    tasks.create_task(self._expire()),
                ]
                try:
                    yield
                except Exception as error:  # re-raised below, outside of the group's wrapping
                    failure = error
                finally:
                    for task in own:
                        task.cancel()
                    await self._close_neighbours()
        finally:
            self._tasks = None
            self._cache.close()
        if failure is not None:
            raise failure

    async def _close_neighbours(self) -> None:
        for connection in (self._next_hop, self._upstream):
            if connection is not None:
                await connection.close()

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

    async def tell_client(self, code: ErrorCode, *, step: int = 0) -> None:
        """Send the client a code; if the control stream is gone, the session is ending anyway."""
        try:
            await self._control.send(error_message(code, step=step))
        except NetworkError:
            return

    def count_mistake(self, allowed: int, error: ProtocolError) -> None:
        """Forgive a few mistakes of a peer; raise ``error`` again when there are too many."""
        self._mistakes += 1
        if self._mistakes > allowed:
            raise error

    # --- neighbours
    def require_previous(self, peer: PeerId) -> None:
        """Raise ProtocolError unless the session named ``peer`` as the source of activations."""
        if peer != self._previous_peer:
            raise ProtocolError(ErrorCode.NOT_NAMED_BY_SESSION, f"steps from {peer}")

    async def attached(self, upstream: Connection, route_version: int) -> None:
        """Take ``upstream`` as the stream of the previous hop, in place of an older one."""
        if route_version <= self._attached_version:
            raise ProtocolError(ErrorCode.BAD_FIELD, "an older route")
        self._attached_version = route_version
        previous, self._upstream = self._upstream, upstream
        if previous is not None:
            await previous.close()

    async def detached(self, upstream: Connection) -> None:
        """The previous hop's stream ended; tell the client unless a newer one took its place."""
        if self._upstream is upstream:
            self._upstream = None
            if self._tasks is not None:
                await self.tell_client(ErrorCode.PREVIOUS_HOP_LOST)

    def require_newer_route(self, route_version: int) -> None:
        """Raise ProtocolError for a route that is not newer than the present one."""
        if route_version <= self._route_version:
            raise ProtocolError(ErrorCode.BAD_FIELD, "an older route")

    async def route_to_client(self, route_version: int) -> None:
        """From now on this is the last hop: results go to the client."""
        await self._reroute(route_version, None)

    async def route_to_peer(self, route_version: int, next_hop: Connection) -> None:
        """From now on outputs go to ``next_hop``, which this session owns and closes."""
        await self._reroute(route_version, next_hop)
        if self._tasks is None:
            await next_hop.close()
        else:
            self._tasks.create_task(self._watch(next_hop))

    async def _reroute(self, route_version: int, next_hop: Connection | None) -> None:
        self._route_version = route_version
        previous, self._next_hop = self._next_hop, next_hop
        if previous is not None:
            await previous.close()

    async def _watch(self, next_hop: Connection) -> None:
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
        if self._next_hop is next_hop:
            await self.tell_client(ErrorCode.NEXT_HOP_LOST)

    # --- steps
    async def submit(self, step: Step) -> None:
        """Accept a step from the previous hop. Raises ProtocolError, and then nothing changed."""
        if len(step.hop_compute_us) >= MAX_HOPS or len(step.hop_queue_us) >= MAX_HOPS:
            raise ProtocolError(ErrorCode.BAD_FIELD, "too many hops")
        match self._state.accept(step):
            case Verdict.APPLY:
                self._last_step_s = self._clock.monotonic_s()
                deadline_s = (
                    self._last_step_s + step.deadline_ms / 1000 if step.deadline_ms else None
                )
                self._accepted.put_nowait(_Accepted(step, deadline_s))
            case Verdict.ANSWER_AGAIN:
                await self._outbox.put(self._kept[step.step])
            case Verdict.IN_PROGRESS:
                pass

    async def _compute_steps(self) -> None:
        while True:
            accepted = await self._accepted.get()
            try:
                message = await self._compute(accepted)
            except ProtocolError as error:
                log.warning("step failed: %s", error)
                await self._fail(error.code, accepted.step.step)
                return
            except Exception:  # the one place for a session's engine: log and end the session
                log.exception("the engine failed")
                await self._fail(ErrorCode.INTERNAL, accepted.step.step)
                return
            number = accepted.step.step
            self._kept[number] = message
            for dropped in self._state.completed(number):
                del self._kept[dropped]
            await self._outbox.put(message)

    async def _compute(self, accepted: _Accepted) -> Step | StepResult:
        step, deadline_s = accepted.step, accepted.deadline_monotonic_s
        if deadline_s is not None and self._clock.monotonic_s() >= deadline_s:
            raise ProtocolError(ErrorCode.DEADLINE_PASSED)
        last = self._next_hop is None
        rows, tokens, _ = step.activations.shape
        output = await self._engine.step(
            self._cache,
            StepInput(
                activations=step.activations,
                position=step.position,
                output_tokens=step.output_tokens if last else tokens,
                row_order=step.row_order,
            ),
        )
        self._observer.step_done(
            rows=rows, tokens=tokens, queue_us=output.queue_us, compute_us=output.compute_us
        )
        queue_us = (*step.hop_queue_us, output.queue_us)
        compute_us = (*step.hop_compute_us, output.compute_us)
        activations = WireTensor(
            dtype=output.activations.dtype,
            shape=output.activations.shape,
            data=output.activations.data,
            encoding=self.terms.wire_encoding,
        )
        if last:
            return StepResult(
                step=step.step,
                position=step.position,
                activations=activations,
                hop_queue_us=queue_us,
                hop_compute_us=compute_us,
            )
        left_ms = 0
        if deadline_s is not None:
            left_ms = max(1, round((deadline_s - self._clock.monotonic_s()) * 1000))
        return Step(
            step=step.step,
            position=step.position,
            output_tokens=step.output_tokens,
            activations=activations,
            row_order=step.row_order,
            deadline_ms=left_ms,
            hop_queue_us=queue_us,
            hop_compute_us=compute_us,
        )

    async def _send_outputs(self) -> None:
        while True:
            message = await self._outbox.get()
            next_hop = self._next_hop
            target = self._control if isinstance(message, StepResult) else next_hop
            if target is None:
                log.warning("an output for a next hop that is gone was dropped")
                continue
            try:
                await target.send(message)
            except NetworkError as error:
                log.debug("output to %s lost: %s", target.peer, error)
                if target is next_hop:
                    await self.tell_client(ErrorCode.NEXT_HOP_LOST, step=message.step)
