"""A live chain: one session through the hops that together hold all blocks of a model.

Activations go to the first hop and come back from the last one; between hops they travel directly.
``Chain.run`` is the one task of a chain and owns its readers, its watch and its healing; the
application puts it into its TaskGroup. ``step`` may be called from any task of the same loop, one
at a time.

When hops are lost, ``step`` just takes longer: the gap is filled (``client.hops``), and the steps
that had no result yet go on under their old numbers. When it cannot be filled, ``step`` raises and
the chain stays usable: the next ``step`` tries again.

The chain knows neither tokens nor torch: ``client.model`` and ``client.generate`` do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from swarm.client.audited_chain import AuditedHop
from swarm.client.complaints import Complaints
from swarm.client.healing import HEAL_ATTEMPTS, Healer, Patience
from swarm.client.hops import Hops, HopTimeouts, SessionRequest
from swarm.client.link import HopFailed, HopTimes, Link
from swarm.client.moving import Moves
from swarm.client.planner import Planner
from swarm.client.purse import AskGrant, Purse
from swarm.client.results import require_finite
from swarm.client.router import failure_kind
from swarm.client.steps import Steps
from swarm.client.vouchers import Grant, HopAccount
from swarm.client.watch import Watch, WatchSettings
from swarm.journal import JournalBudget
from swarm.ledger.audit_rule import Floats
from swarm.ledger.sketch import Sketcher
from swarm.pieces import join_tokens, slice_tokens
from swarm.ports import Clock, Transport
from swarm.protocol.errors import (
    ErrorCode,
    NetworkError,
    ProtocolError,
    SwarmError,
    UsageError,
)
from swarm.protocol.ledger_objects import Work
from swarm.protocol.messages import (
    CloseSession,
    Draining,
    Error,
    Message,
    Ping,
    Pong,
    SessionClosed,
    SignedReceipt,
    SignedVoucher,
    Step,
    StepResult,
)
from swarm.protocol.prices import step_work
from swarm.protocol.tensors import WireTensor
from swarm.routing import ChainPlan, is_one_machine

log = logging.getLogger(__name__)

PIPELINED_PIECE_TOKENS = 128
"""Small enough to fill a chain of a few hops with a common prompt, large enough for the device."""


@dataclass(frozen=True, slots=True)
class ChainTimeouts:
    """How long a client waits for what."""

    open_s: float = 20.0
    step_s: float = 120.0
    """For the answer to one step, healing included."""
    heal_s: float = 7.0
    """For replacements to turn up, when nobody has the blocks that are missing."""
    offline_s: float = 90.0
    """The same while no other peer answers either: then it is our own network that is gone."""
    hop: HopTimeouts = field(default_factory=HopTimeouts)
    watch: WatchSettings = field(default_factory=WatchSettings)
    close_s: float = 2.0


class ChainObserver(Protocol):
    """What a client counts; ``client.metrics`` implements it. Hops are numbered from 0."""

    def chain_pass(self, rows: int, tokens: int, duration_s: float) -> None: ...

    def hops_through_client(self, count: int) -> None:
        """So many tensors crossed the client between two hops; always 0 by design."""

    def retried(self, reason: str) -> None:
        """A hop was given up for another; ``reason`` is one of a few fixed words."""

    def healed(self, duration_s: float, replayed_tokens: int, replayed_bytes: int) -> None:
        """A chain was made whole; what the client itself had to send again for it."""

    def sent(self, hop: int, size_bytes: int) -> None: ...

    def received(self, hop: int, size_bytes: int) -> None: ...


class Chain:
    """One session through a chain of hops that are replaced when they fail."""

    def __init__(
        self,
        transport: Transport,
        planner: Planner,
        request: SessionRequest,
        number_of_blocks: int,
        *,
        clock: Clock,
        observer: ChainObserver | None = None,
        timeouts: ChainTimeouts | None = None,
        journal_budget: JournalBudget | None = None,
        grant: Grant | None = None,
        renew: AskGrant | None = None,
        on_renewal: Callable[[Grant], None] | None = None,
        sketcher: Sketcher | None = None,
        on_finished: Callable[[Chain], Awaitable[object]] | None = None,
    ) -> None:
        """``grant``: what vouchers for the hops draw on; None: there are none. ``renew`` gets
        another one before it is used up, ``on_renewal`` hears when that comes into force.

        ``sketcher`` makes the session fit for audits. ``on_finished`` is called before the hops
        free the session; nobody who closes the chain waits for it.
        """
        self._sketcher = sketcher
        self._on_finished = on_finished
        self._released = asyncio.Event()
        self._receipt_came = asyncio.Event()
        self._number_of_blocks = number_of_blocks
        self._planner = planner
        self._request = request
        self._clock = clock
        self._observer = observer
        self._timeouts = timeouts or ChainTimeouts()
        self._steps = Steps(request, journal_budget or JournalBudget(), sketcher)
        self._hops = Hops(
            transport,
            planner,
            request,
            number_of_blocks,
            clock=clock,
            timeouts=self._timeouts.hop,
            on_open=self._start_reading,
            on_loss=self._lost,
            work_since=self._steps.work_since,
            purse=Purse(grant, renew, clock, on_renewal),
        )
        self._session = self._steps.session
        self._healer = Healer(
            self._hops, self._steps, planner, clock=clock, count_failure=self._count_failure
        )
        self._complaints = Complaints(self._hops, self._session, mend=self._mend)
        self._watch = Watch(
            self._hops,
            self._session,
            planner,
            clock=clock,
            settings=self._timeouts.watch,
            mend=self._mend,
        )
        loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = loop.create_future()
        self._whole: asyncio.Future[None] = loop.create_future()
        """Done while the chain is whole; its exception says why it could not be healed."""
        self._trouble = asyncio.Event()
        self._goodbyes = asyncio.Semaphore(0)
        self._closing = asyncio.Event()
        self._failure: SwarmError | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._readers: set[asyncio.Task[None]] = set()
        self._relayed = 0
        self._timed: tuple[int, float] | None = None
        """The latest step that went alone and undisturbed, and when it was sent."""
        self._passes = 0
        self._one_step = asyncio.Lock()
        self._reshaping = asyncio.Lock()
        self._leaving: set[Link] = set()
        self._moves = Moves(
            self._hops,
            planner,
            self._session,
            clock=clock,
            answer_s=self._timeouts.hop.answer_s,
            between_steps=self._one_step,
            reshaping=self._reshaping,
        )

    # --- what callers see
    @property
    def plan(self) -> ChainPlan:
        """The hops that serve this session now."""
        return self._hops.plan

    @property
    def accounts(self) -> list[HopAccount]:
        """What each hop that this session ever had was vouched for."""
        return self._hops.purse.accounts

    @property
    def passes(self) -> int:
        """Steps that went through the whole chain so far; a long prompt takes several."""
        return self._passes

    @property
    def length(self) -> int:
        """Tokens in the remote caches."""
        return self._session.length

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
        as several steps, of which hops on different machines work on different ones at a time.

        Raises NoRouteError when lost hops could not be replaced, which names their blocks and what
        was tried; nothing of the step counts then, and it may be asked for again. Raises
        NetworkError when the answer is late; the chain is then of no more use. Cancelling is safe,
        but the chain must be closed afterwards.
        """
        async with self._one_step:
            self._require_usable()
            started_s = self._clock.monotonic_s()
            rows, tokens, _ = activations.shape
            pending: list[asyncio.Future[StepResult]] = []
            try:
                async with asyncio.timeout(self._timeouts.step_s) as deadline:
                    await self._be_whole()
                    per_step = max(1, self._piece_tokens() // rows)
                    for first in range(0, tokens, per_step):
                        last = min(first + per_step, tokens)
                        # Of an earlier piece the caller may want some positions too; at least one
                        # always comes back, since a result is also the acknowledgement.
                        wanted = max(1, last - max(first, tokens - output_tokens))
                        pending.append(
                            await self._send(
                                slice_tokens(activations, first, last),
                                position + first,
                                output_tokens=wanted,
                                row_order=row_order if first == 0 else (),
                                deadline_s=deadline.when(),
                            )
                        )
                        if self._shares_cores:
                            await pending[-1]
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
        """Free the session on all hops and wait until that is done, or left to an audit."""
        self._closing.set()
        self._trouble.set()
        await self._released.wait()

    @property
    def hops_through_client(self) -> int:
        """Tensors that crossed the client between two hops, counted on the streams: 0 by design."""
        return self._relayed + sum(map(self._relayed_by_client, self._hops.links))

    def _relayed_by_client(self, link: Link) -> int:
        relayed = 0
        if link.hop.first_block > 0:
            relayed += link.connection.tensors_sent
        if not self._hops.ends_with(link):
            relayed += link.connection.tensors_received
        return relayed

    # --- for audits (client.audited_chain.AuditedChain)
    @property
    def request(self) -> SessionRequest:
        return self._request

    @property
    def planner(self) -> Planner:
        return self._planner

    @property
    def sketcher(self) -> Sketcher:
        """Raises UsageError for a chain that keeps no sketches."""
        if self._sketcher is None:
            raise UsageError("this session was not opened for audits")
        return self._sketcher

    def audited_hops(self) -> list[AuditedHop]:
        """In the order of their blocks; empty while the chain is not whole."""
        if self._hops.first_gap is not None:
            return []
        return [
            AuditedHop(
                link.peer_id,
                link.hop.first_block,
                link.hop.end_block,
                tuple(link.hop.addresses),
                link.opened.session_id,
                link.account,
            )
            for link in self._hops.links
        ]

    def ends_with_blocks(self, end_block: int) -> bool:
        return end_block == self._number_of_blocks

    def own_inputs(self, length: int) -> WireTensor | None:
        journal, trail = self._steps.journal, self._steps.trail
        if journal.is_gone or trail is None or trail.is_reordered:
            return None
        return journal.read(0, length)

    def results_before(self, length: int) -> tuple[NDArray[np.intp], Floats]:
        if self._steps.trail is None:
            raise UsageError("this session was not opened for audits")
        return self._steps.trail.before(length)

    async def collect_receipts(self, timeout_s: float) -> None:
        for link in tuple(self._hops.links):
            voucher = link.account.sign_all(again=True) if link.account is not None else None
            if voucher is not None:
                await self._send_voucher(link, voucher)
        accounts = [link.account for link in self._hops.links if link.account is not None]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not all(account.has_latest_receipt for account in accounts):
                    self._receipt_came.clear()
                    await self._receipt_came.wait()

    # --- the chain's task
    async def run(self) -> None:
        """Open the chain, keep it whole until :meth:`close`, then free it.

        Never raises for what a peer did: callers of ``opened`` and ``step`` get that.
        """
        try:
            async with asyncio.TaskGroup() as self._tasks:
                try:
                    await self._open()
                    async with asyncio.TaskGroup() as own:
                        watching = own.create_task(self._watch.run())
                        await self._keep_whole()
                        watching.cancel()
                        await self._finish()
                        await self._say_goodbye()
                finally:
                    for reader in self._readers:
                        reader.cancel()
                    for link in tuple(self._hops.links):
                        await link.connection.close()
        except* SwarmError as group:
            self._fail(_first(group))
        finally:
            self._report()
            self._fail(NetworkError("the chain is closed"))
            self._steps.close()
            self._released.set()

    async def _finish(self) -> None:
        """Let an audit look at the session while the hops still have it."""
        if self._on_finished is None or self._failure is not None:
            return
        self._released.set()
        try:
            await self._on_finished(self)
        except SwarmError as error:
            log.info("the session could not be audited: %s", error)

    async def _open(self) -> None:
        try:
            async with asyncio.timeout(self._timeouts.open_s) as deadline:
                await self._heal(Patience.to_open(self._clock, deadline))
        except TimeoutError:
            raise NetworkError(
                f"the chain could not be opened within {self._timeouts.open_s:.0f} s"
            ) from None
        self._whole.set_result(None)
        self._opened.set_result(None)

    async def _keep_whole(self) -> None:
        """Heal whenever something is wrong, until the chain is closed."""
        while True:
            await self._trouble.wait()
            self._trouble.clear()
            if self._closing.is_set():
                return
            if self._whole.done():
                self._whole = asyncio.get_running_loop().create_future()
            healing = asyncio.create_task(
                self._heal(
                    Patience(
                        self._clock,
                        self._timeouts.heal_s,
                        self._timeouts.offline_s,
                        HEAL_ATTEMPTS,
                    )
                )
            )
            closing = asyncio.create_task(self._closing.wait())
            try:
                await asyncio.wait({healing, closing}, return_when=asyncio.FIRST_COMPLETED)
                if not healing.done():
                    return
                await healing
            except SwarmError as error:
                await self._break_off(error)
            else:
                self._whole.set_result(None)
            finally:
                for task in (healing, closing):
                    task.cancel()
                await asyncio.gather(healing, closing, return_exceptions=True)

    async def _heal(self, patience: Patience) -> None:
        """Make the chain whole again. Raises NoRouteError that says what was tried."""
        opening = not self._opened.done()
        started_s = self._clock.monotonic_s()
        async with self._reshaping:
            await self._healer.heal(patience, opening=opening)
        sent_again = self._hops.take_replayed()
        if self._observer is not None and not opening:
            self._observer.healed(self._clock.monotonic_s() - started_s, *sent_again)

    async def _break_off(self, error: SwarmError) -> None:
        """Healing failed: callers are told, and the next step begins with fresh hops."""
        for link in tuple(self._hops.links):
            self._hops.lose(link, HopFailed(link.hop, error))
        self._steps.give_up(error)
        self._trouble.clear()
        self._whole.set_exception(error)
        self._whole.exception()  # nobody may be waiting

    async def _be_whole(self) -> None:
        """Wait while the chain heals; a chain that could not be healed tries again."""
        if self._whole.done() and self._whole.exception() is not None:
            self._whole = asyncio.get_running_loop().create_future()
            self._trouble.set()
        while not self._is_whole:
            await asyncio.shield(self._whole)
            self._require_usable()
            if not self._is_whole:
                await asyncio.sleep(0)

    @property
    def _is_whole(self) -> bool:
        return self._whole.done() and not self._trouble.is_set()

    def _count_failure(self, error: HopFailed) -> None:
        if error.is_counted:
            return
        error.is_counted = True
        cause = error.__cause__
        if len(error.suspects) > 1:
            self._planner.quarrelled(error.suspects)
        elif isinstance(cause, SwarmError):
            self._planner.failed(error.peer_id, failure_kind(cause))
        if self._observer is not None:
            self._observer.retried(
                (error.code.name if error.code is not None else "NETWORK").lower()
            )

    def _report(self) -> None:
        if self._observer is None:
            return
        self._observer.hops_through_client(self.hops_through_client)
        for index, link in enumerate(self._hops.links):
            self._observer.sent(index, link.connection.bytes_sent)
            self._observer.received(index, link.connection.bytes_received)

    async def _say_goodbye(self) -> None:
        """Ask all hops to free the session; the readers wait for their last words."""
        links = tuple(self._hops.links)
        try:
            async with asyncio.timeout(self._timeouts.close_s):
                for link in links:
                    voucher = link.account.sign_all() if link.account is not None else None
                    if voucher is not None:
                        await link.connection.send(voucher)
                    await link.connection.send(CloseSession())
                for _ in links:
                    await self._goodbyes.acquire()
        except (TimeoutError, NetworkError) as error:
            log.debug("a hop did not say goodbye: %s", error)

    # --- messages from hops
    def _start_reading(self, link: Link) -> None:
        if self._tasks is None:
            raise RuntimeError("the chain does not run")
        link.connection.maximum_payload_bytes = (
            self._largest_result_bytes if self._hops.ends_with(link) else 0
        )
        self._start(self._tasks, self._read(link))

    def _start(self, tasks: asyncio.TaskGroup, work: Coroutine[None, None, None]) -> None:
        """Run ``work`` until it ends or the chain is closed."""
        try:
            task = tasks.create_task(work)
        except RuntimeError:  # the group is already shutting down
            work.close()
            raise NetworkError("the chain is closed") from None
        self._readers.add(task)
        task.add_done_callback(self._readers.discard)

    def _start_moving(self, link: Link, wait_s: float) -> None:
        if self._tasks is None or link in self._leaving:
            return
        self._leaving.add(link)
        self._start(self._tasks, self._move_away(link, wait_s))

    async def _move_away(self, link: Link, wait_s: float) -> None:
        """Move the session off a hop that leaves; what fails there heals when the hop is gone."""
        try:
            await asyncio.shield(self._opened)
            if await self._moves.move_away(link, wait_s):
                self._relayed += self._relayed_by_client(link)
        except SwarmError as error:
            log.info("cannot move from %s: %s", link.peer_id, error)

    async def _read(self, link: Link) -> None:
        try:
            while True:
                message = await link.receive()
                if isinstance(message, SessionClosed):
                    if self._closing.is_set():
                        self._goodbyes.release()
                        return
                    raise NetworkError("closed the session")
                await self._handle(link, message)
        except SwarmError as error:
            if self._closing.is_set():
                self._goodbyes.release()
            else:
                self._hops.lose(link, HopFailed(link.hop, error))
        finally:
            await link.connection.close()

    def _lost(self, link: Link) -> None:
        """A hop was given up."""
        self._timed = None
        self._relayed += self._relayed_by_client(link)
        self._healer.forget(link)
        if link.failure is not None:
            log.info("lost a hop: %s", link.failure)
            self._count_failure(link.failure)
            if link.failure.suspects and self._tasks is not None:
                # It may well be alive, and keep what it holds for the session.
                with contextlib.suppress(NetworkError):
                    self._start(self._tasks, self._hops.close(link))
        self._trouble.set()

    async def _handle(self, link: Link, message: Message) -> None:
        match message:
            case StepResult() if self._hops.ends_with(link):
                # Of a hop that was given up it is made again: what it had may have been spoilt.
                if link.failure is None:
                    self._take_result(link, message)
            case Pong():
                if link.round_trip_s:
                    self._planner.measured_round_trip(link.peer_id, link.round_trip_s)
            case Ping():
                await link.connection.send(Pong(nonce=message.nonce))
            case SignedReceipt() if link.account is not None:
                link.take_receipt(message)
                self._receipt_came.set()
            case Error():
                if not self._closing.is_set():
                    self._complaints.take(link, message)
            case Draining():
                self._start_moving(link, message.wait_ms / 1000)
            case _:
                raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(message).__name__)

    def _mend(self, link: Link) -> None:
        """Give ``link`` a new stream from the hop before it, soon."""
        self._healer.break_joint(link)
        self._timed = None
        self._trouble.set()

    def _take_result(self, link: Link, result: StepResult) -> None:
        require_finite(result.activations)
        try:
            issued = self._steps.take(result)
        except ProtocolError as error:
            self._complaints.misfit(link, result, error)
            return
        if issued is None:
            return
        for link, queue_us, compute_us in zip(
            self._hops.links, result.hop_queue_us, result.hop_compute_us, strict=False
        ):
            link.times = HopTimes(queue_us, compute_us)
            link.speed.add(issued.tokens, (queue_us + compute_us) / 1e6)
            link.computed_step = max(link.computed_step, issued.step)
            link.mended = 0
        if self._timed is not None and self._timed[0] == issued.step:
            self._planner.passed(
                self._hops.plan.hops,
                [(link.times.queue_us + link.times.compute_us) / 1e6 for link in self._hops.links],
                self._clock.monotonic_s() - self._timed[1],
            )
        self._passes += 1

    # --- steps
    async def _send(
        self,
        activations: WireTensor,
        position: int,
        *,
        output_tokens: int,
        row_order: tuple[int, ...],
        deadline_s: float | None,
    ) -> asyncio.Future[StepResult]:
        rows, tokens, _ = activations.shape
        await self._fund(step_work(rows, tokens))
        while not (self._is_whole and self._session.may_issue):
            # While a gap is being filled no step is added: the hops keep the results of only so
            # many, and the replacement needs all of them.
            await self._be_whole()
            await self._steps.window()
            self._require_usable()
        step, future = self._steps.issue(
            activations,
            position,
            output_tokens=output_tokens,
            row_order=row_order,
            deadline_s=deadline_s,
        )
        if self._request.rows == activations.shape[1] == self._steps.in_flight == 1:
            self._timed = (step.step, self._clock.monotonic_s())
        self._watch.wake()
        first = self._hops.links[0]
        vouchers = self._vouchers_before(step)
        try:
            await first.connection.send(*vouchers, step)
        except NetworkError as error:
            self._hops.lose(first, HopFailed(first.hop, error))
        return future

    async def _fund(self, work: Work) -> None:
        """Have an allowance that pays for one more step; ask for the next one ahead of use."""
        hops = self._hops
        await hops.fund(work)
        if hops.purse.wants_to_ask(hops.open_accounts, work) and self._tasks is not None:
            self._start(self._tasks, hops.purse.ask_ahead())

    def _vouchers_before(self, step: Step) -> list[SignedVoucher]:
        """Vouch for what hops did so far; for the first one it goes with the step."""
        rows, tokens, _ = step.activations.shape
        with_step = []
        for index, link in enumerate(self._hops.links):
            account = link.account
            voucher = account.before_step(step_work(rows, tokens)) if account is not None else None
            if voucher is None:
                continue
            if index == 0:
                with_step.append(voucher)
            elif self._tasks is not None:
                self._start(self._tasks, self._send_voucher(link, voucher))
        return with_step

    async def _send_voucher(self, link: Link, voucher: SignedVoucher) -> None:
        try:
            await link.connection.send(voucher)
        except NetworkError as error:
            self._hops.lose(link, HopFailed(link.hop, error))

    @property
    def _largest_result_bytes(self) -> int:
        return self._session.terms.maximum_payload_bytes

    def _piece_tokens(self) -> int:
        """Most ``rows x tokens`` of one piece of a long prompt.

        Hops on different machines work on different pieces at the same time. On one machine they
        would only take each other's cores: there a prompt goes in as few pieces as nodes allow, one
        after the other.
        """
        links = self._hops.links
        most = min((link.opened.maximum_step_tokens for link in links), default=1)
        if len(links) == 1 or self._shares_cores:
            return most
        return min(most, PIPELINED_PIECE_TOKENS)

    @property
    def _shares_cores(self) -> bool:
        return len(self._hops.links) > 1 and is_one_machine(self._hops.plan)

    def _require_usable(self) -> None:
        if self._failure is not None:
            raise self._failure
        if not self._opened.done():
            raise RuntimeError("await opened() first")

    def _fail(self, error: SwarmError) -> None:
        """The end of the chain: everybody who waits gets the reason."""
        if self._failure is not None:
            return
        self._failure = error
        for future in (self._opened, self._whole):
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody may be waiting
        self._steps.give_up(error)
        self._closing.set()
        self._trouble.set()


def _first(group: BaseExceptionGroup[SwarmError]) -> SwarmError:
    """The error in a group, however deep."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
