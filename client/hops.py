"""The hops of one session: opened, joined to each other, replaced one by one.

Opening a chain and healing it are the same thing: a *gap* of blocks without a hop is filled with
fresh hops. The hop before the gap replays its journal into them; hops outside of the gap keep their
caches. When the hop before has lost its journal, the next one upstream that has one replays, and
those between pass it on; at worst all is rebuilt from the client's own journal.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from swarm.client.adapter_push import AdapterSource, bring_adapter
from swarm.client.blame import Blame
from swarm.client.link import HopFailed, Link
from swarm.client.planner import Planner
from swarm.client.purse import NO_WORK, Purse
from swarm.client.vouchers import Grant, HopAccount
from swarm.journal import Journal
from swarm.ledger.audit_rule import UNCALIBRATED, SpanLimits
from swarm.pieces import pieces
from swarm.ports import Clock, Transport
from swarm.protocol.errors import (
    ErrorCode,
    NetworkError,
    RemoteError,
    SwarmError,
)
from swarm.protocol.identity import PeerId
from swarm.protocol.ledger_objects import Work
from swarm.protocol.messages import (
    MAX_TOKENS,
    CloseSession,
    OpenSession,
    Replay,
    RouteReady,
    SetPrevious,
    SetRoute,
)
from swarm.protocol.policy import Policy
from swarm.protocol.session import ClientSession
from swarm.protocol.tensors import DType, Encoding
from swarm.routing import ChainPlan
from swarm.routing import Hop as PlannedHop

log = logging.getLogger(__name__)

T = TypeVar("T")

JOINT_GRACE_S = 0.2
"""A stream between two hops that breaks mostly means that one of them is gone: its own stream to
the client then breaks too, a moment later."""
REPLAY_TOKENS = 256
REPLAYS_IN_FLIGHT = 4
"""Pieces that a client sends ahead of what the hop reports; its pings must not wait behind them."""


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
    audit_limits: SpanLimits = UNCALIBRATED
    """What nodes are held to when their answers are audited."""
    policy: Policy | None = None
    """Which peers may see anything of it; None: all."""
    adapter: AdapterSource | None = None
    """What every hop adds to the model; brought to hops that lack it."""

    @property
    def adapter_id(self) -> bytes:
        return b"" if self.adapter is None else self.adapter.index.adapter_id


@dataclass(frozen=True, slots=True)
class HopTimeouts:
    """How long a client waits for one hop."""

    open_s: float = 3.0
    answer_s: float = 6.0
    """For answers to what a hop needs to dial its neighbour for."""
    replay_stall_s: float = 60.0
    """A hop that catches up may take long, but must get on."""


@dataclass(frozen=True, slots=True)
class Resumption:
    """Where a hop that takes another's place begins.

    Taken once for all that is done about a gap: a result that still arrives meanwhile, from a hop
    behind the gap, must not move it.
    """

    step: int
    """The oldest step without a result, or the one that comes next."""
    position: int
    """Positions cached before that step."""
    rows_as_of_step: int
    """The client's own journal has its rows in the order that the steps up to this one set."""
    length: int = 0
    """Positions cached once all steps are computed: the most that any hop computes again."""

    @classmethod
    def of(cls, session: ClientSession) -> Resumption:
        return cls(
            session.resume_step,
            session.resume_position,
            session.last_issued_step,
            session.length,
        )


class NothingToReplay(SwarmError):
    """No hop, and not the client either, has kept what a replacement would need."""


class Hops:
    """The hops that a session has now, ordered by blocks; there may be gaps between them."""

    def __init__(
        self,
        transport: Transport,
        planner: Planner,
        request: SessionRequest,
        number_of_blocks: int,
        *,
        clock: Clock,
        timeouts: HopTimeouts,
        on_open: Callable[[Link], None],
        on_loss: Callable[[Link], None],
        work_since: Callable[[int], Work],
        purse: Purse,
    ) -> None:
        """``on_open`` starts the reader of a link; ``on_loss`` hears of each link given up.

        ``work_since``: of the steps from this number on that were issued already.
        """
        self.links: list[Link] = []
        self._replayed_tokens = 0
        self._replayed_bytes = 0
        self._transport = transport
        self._planner = planner
        self._request = request
        self._number_of_blocks = number_of_blocks
        self._clock = clock
        self._timeouts = timeouts
        self._on_open = on_open
        self._on_loss = on_loss
        self._work_since = work_since
        self.purse = purse
        self._funding = asyncio.Lock()
        self._fresh: list[Link] = []
        self._work_on_hops: asyncio.Future[None] | None = None
        self._last_version = 0
        self.blame = Blame(self.lose)

    @property
    def plan(self) -> ChainPlan:
        """The chain as it is now."""
        return ChainPlan(tuple(link.hop for link in self.links), 0.0)

    @property
    def first_gap(self) -> tuple[int, int] | None:
        """The first blocks ``[first, end)`` without a hop; None when the chain is whole."""
        covered = 0
        for link in self.links:
            if link.hop.first_block > covered:
                return covered, link.hop.first_block
            covered = link.hop.end_block
        return (covered, self._number_of_blocks) if covered < self._number_of_blocks else None

    def take_replayed(self) -> tuple[int, int]:
        """Tokens and bytes that the client itself replayed since this was asked last.

        What hops replay to each other they count themselves.
        """
        replayed = self._replayed_tokens, self._replayed_bytes
        self._replayed_tokens = self._replayed_bytes = 0
        return replayed

    @property
    def all_links(self) -> list[Link]:
        """The hops of the chain, and those that are being filled to join it."""
        return [*self.links, *self._fresh]

    @property
    def is_changing(self) -> bool:
        """Whether hops are being filled or joined anew at the moment."""
        return self._work_on_hops is not None

    def ends_with(self, link: Link) -> bool:
        """Whether results come from ``link``."""
        return link.hop.end_block == self._number_of_blocks

    def previous_of(self, link: Link) -> Link | None:
        """The hop that sends to ``link``; None for the client, or for nobody while it is lost."""
        index = self.links.index(link) if link in self.links else 0
        before = self.links[index - 1] if index else None
        joined = before is not None and before.hop.end_block == link.hop.first_block
        return before if joined else None

    def source_of(self, link: Link) -> Link | None:
        """The hop that sends to ``link``, also while it is being filled; None as above."""
        return next(
            (each for each in self.all_links if each.hop.end_block == link.hop.first_block), None
        )

    def following(self, link: Link) -> Link | None:
        """The hop that ``link`` sends to; None for the client, or for nobody while it is lost."""
        return next((each for each in self.links if self.previous_of(each) is link), None)

    def neighbours_of(self, link: Link) -> list[Link]:
        """The hops on both sides of ``link``, as far as there are any."""
        return [
            other
            for other in self.links
            if other.hop.end_block == link.hop.first_block
            or other.hop.first_block == link.hop.end_block
        ]

    def peers_around(self, link: Link) -> tuple[PeerId | None, PeerId | None]:
        """The peers on both sides; None is the client."""
        before = after = None
        for other in self.neighbours_of(link):
            if other.hop.end_block == link.hop.first_block:
                before = other.peer_id
            else:
                after = other.peer_id
        return before, after

    def give_up(self, error: HopFailed) -> None:
        """Give up the hop that an error names, if it is part of the chain."""
        for link in self.all_links:
            if link.hop is error.hop:
                self.lose(link, error)
                return

    def lose(self, link: Link, error: HopFailed) -> None:
        """Give a hop up. What is being filled at the moment is begun anew."""
        if link.failure is not None:
            return
        link.fail(error)
        was_part = link in self.links or link in self._fresh
        if link in self.links:
            self.links.remove(link)
        if self._work_on_hops is not None and not self._work_on_hops.done():
            self._work_on_hops.set_exception(error)
            self._work_on_hops.exception()  # nobody may be waiting any more
        if was_part:
            self._on_loss(link)

    async def close(self, link: Link) -> None:
        """Free the session on a hop that is no longer needed, if it still listens."""
        voucher = link.account.sign_all() if link.account is not None else None
        try:
            async with asyncio.timeout(1.0):
                if voucher is not None:
                    await link.connection.send(voucher)
                await link.connection.send(CloseSession())
        except (TimeoutError, NetworkError):
            log.debug("%s did not take a goodbye", link.peer_id)
        await link.connection.close()

    # --- filling a gap
    async def fill(
        self,
        first_block: int,
        end_block: int,
        resume: Resumption,
        journal: Journal,
        excluded: Sequence[PeerId],
    ) -> list[Link]:
        """Put hops into a gap and bring them to where the session is; returns them.

        Raises HopFailed for the hop that made it impossible, NoRouteError when there is none to be
        had, and NothingToReplay. The chain is then as before, without the hops that were lost.
        """
        try:
            return await self._unless_lost(
                self._fill(first_block, end_block, resume, journal, tuple(excluded))
            )
        finally:
            left, self._fresh = self._fresh, []
            await asyncio.gather(*(self.close(link) for link in left))

    async def _unless_lost(self, work: Coroutine[None, None, T]) -> T:
        """The outcome of ``work``, or HopFailed as soon as any hop is lost meanwhile."""
        lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._work_on_hops = lost
        task = asyncio.create_task(work)
        try:
            both: set[asyncio.Future[Any]] = {task, lost}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                lost.result()
            return await task
        finally:
            self._work_on_hops = None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _fill(
        self,
        first_block: int,
        end_block: int,
        resume: Resumption,
        journal: Journal,
        excluded: tuple[PeerId, ...],
    ) -> list[Link]:
        before = [link for link in self.links if link.hop.end_block <= first_block]
        after = next((link for link in self.links if link.hop.first_block == end_block), None)
        again = Work(prefill_tokens=self._request.rows * resume.position)
        again += self._work_since(resume.step)
        await self.fund(NO_WORK, replayed=again, blocks=end_block - first_block)
        own = self._transport.peer_id
        previous = before[-1].peer_id if before else None
        following = after.peer_id if after is not None else None
        plan = await self._planner.plan(
            first_block,
            end_block,
            excluded=excluded,
            previous=previous,
            following=following,
        )
        self.blame.check(plan, previous, following)
        sources = [previous or own, *(hop.peer_id for hop in plan.hops)]
        fresh = await _all(
            self._open_fresh(hop, source, resume.step)
            for hop, source in zip(plan.hops, sources, strict=False)
        )
        if after is not None:
            await self.ask_previous(after, fresh[-1])
        targets = [*fresh[1:], after]
        await _all(
            self._set_route(
                link, target, forward_replays=target is not None and target is not after
            )
            for link, target in zip(fresh, targets, strict=True)
        )
        await self._vouch_for(fresh, again)
        await self._replay(before, fresh, resume, journal)
        for link in fresh:
            self._fresh.remove(link)
        self.links = sorted([*self.links, *fresh], key=lambda link: link.hop.first_block)
        return fresh

    async def _open_fresh(self, hop: PlannedHop, previous: PeerId, first_step: int) -> Link:
        link = await self._open(hop, previous, first_step)
        self._fresh.append(link)
        self._on_open(link)
        return link

    async def _open(
        self, hop: PlannedHop, previous: PeerId, first_step: int, state_from: str = ""
    ) -> Link:
        request, grant = self._request, self.purse.grant
        message = OpenSession(
            model_revision=request.model_revision,
            first_block=hop.first_block,
            end_block=hop.end_block,
            rows=request.rows,
            maximum_tokens=request.maximum_tokens,
            wire_dtype=int(request.wire_dtype),
            wire_encoding=int(request.wire_encoding),
            previous_peer=previous,
            left_padding=request.left_padding,
            first_step=first_step,
            state_from=state_from,
            adapter_id=request.adapter_id,
            policy=b"" if request.policy is None else request.policy.to_bytes(),
            **_allowance(grant),
        )
        try:
            return await self._open_link(hop, message, grant)
        except HopFailed as error:
            if error.code is not ErrorCode.ADAPTER_MISSING or request.adapter is None:
                raise
        await bring_adapter(
            self._transport,
            hop,
            request.adapter,
            model_revision=request.model_revision,
            only_for=None if request.policy is None else request.policy.check,
        )
        return await self._open_link(hop, message, grant)

    async def _open_link(self, hop: PlannedHop, message: OpenSession, grant: Grant | None) -> Link:
        link = await Link.open(
            self._transport,
            hop,
            message,
            clock=self._clock,
            timeout_s=self._timeouts.open_s,
            only_for=None if self._request.policy is None else self._request.policy.check,
            grant=grant,
        )
        if link.account is not None:
            self.purse.accounts.append(link.account)
        return link

    # --- who pays
    async def fund(self, work: Work, *, replayed: Work = NO_WORK, blocks: int = 0) -> None:
        """Have an allowance that pays for ``work`` on each hop, and for what is ``replayed`` on
        fresh hops with so many ``blocks``. Raises AllowanceRefused.

        Hops that cannot go on with another one are given up without blame, to be opened anew.
        """
        purse = self.purse
        async with self._funding:
            if purse.is_over(self.open_accounts, work, replayed, blocks):
                await purse.change()
            grant = purse.grant
            for link in tuple(self.links):
                if grant is None or link.account is None or link.account.grant is grant:
                    continue
                if not link.opened.takes_renewals or not purse.suits(link.account):
                    self.blame.without(link, NetworkError("takes no fresh allowance"))
                    continue
                try:
                    purse.accounts.append(await link.renew(link.account, grant))
                except HopFailed as error:
                    self.lose(link, error)

    @property
    def open_accounts(self) -> list[HopAccount]:
        """Of the hops that the chain has now and that keep books."""
        return [link.account for link in self.links if link.account is not None]

    async def _vouch_for(self, links: Iterable[Link], work: Work) -> None:
        """Vouch ahead for what hops have to compute again, since it may exceed two windows."""
        for link in links:
            if link.account is None:
                continue
            link.account.issued += work
            voucher = link.account.sign_all()
            if voucher is not None:
                try:
                    await link.connection.send(voucher)
                except NetworkError as error:
                    raise HopFailed(link.hop, error) from error

    async def ask_previous(self, link: Link, previous: Link) -> None:
        message = SetPrevious(route_version=self._version(), previous_peer=previous.peer_id)
        try:
            await link.set_previous(message, self._timeouts.answer_s)
        except RemoteError as error:
            raise self._fault(link, error) from error

    async def _set_route(
        self,
        link: Link,
        target: Link | None,
        *,
        resume_step: int = 0,
        replay_end: int = 0,
        forward_replays: bool = False,
    ) -> None:
        """Raises HopFailed for the hop to blame; RemoteError only for a journal that is gone."""
        message = SetRoute(
            route_version=self._version(),
            next_peer=target.peer_id if target is not None else "",
            next_session_id=target.opened.session_id if target is not None else b"",
            resume_step=resume_step,
            replay_end=replay_end,
            forward_replays=int(forward_replays),
        )
        try:
            await link.set_route(message, self._timeouts.answer_s)
        except RemoteError as error:
            if error.code is ErrorCode.JOURNAL_GONE:
                raise
            if target is None:
                raise self._fault(link, error) from error
            # What the next hop refused, or that it cannot be reached, is rarely this hop's fault.
            # If the next one is gone, its stream to us breaks too, and nobody else is asked.
            await self._clock.sleep(JOINT_GRACE_S)
            raise self.blame.joint(link, target, error) from error

    def _fault(self, link: Link, error: RemoteError) -> HopFailed:
        failure = HopFailed(link.hop, error)
        self.lose(link, failure)
        return failure

    async def _replay(
        self,
        before: Sequence[Link],
        fresh: Sequence[Link],
        resume: Resumption,
        journal: Journal,
    ) -> None:
        """Fill the fresh hops' caches up to where the interrupted step begins, and resume."""
        chain = [*before, fresh[0]]
        passing = [*before, *fresh]
        for index in range(len(before) - 1, -1, -1):
            source_is_nearest = index == len(before) - 1
            try:
                await self._set_route(
                    chain[index],
                    chain[index + 1],
                    resume_step=resume.step,
                    # Hops that compute again must reach where they were.
                    replay_end=resume.position if source_is_nearest else MAX_TOKENS,
                )
                passing = passing[index:]
                break
            except RemoteError:
                log.info("%s has no journal any more", chain[index].peer_id)
                again = Work(prefill_tokens=self._request.rows * resume.length)
                await self._vouch_for([chain[index]], again)
                await self._set_route(chain[index], chain[index + 1], forward_replays=True)
        else:
            end = journal.length if before else resume.position
            if end and (journal.is_gone or journal.length < end):
                raise NothingToReplay("what this session sent before is no longer kept")
            await self._replay_own(passing, journal, end, resume.rows_as_of_step)
        if resume.position:
            await self._replayed(fresh[-1], resume.position, passing)

    async def _replayed(self, last: Link, length: int, passing: Sequence[Link]) -> None:
        """Wait until ``last`` has so many positions, which come through the ``passing`` hops."""
        try:
            await last.replayed_to(length, self._timeouts.replay_stall_s)
        except HopFailed as error:
            if last.failure is not None or len(passing) < 2:
                raise
            # Whoever replays, passes on or computes it may be the one that does not get on.
            raise self.blame.all_of(passing, NetworkError("does not get on")) from error

    async def _replay_own(
        self, passing: Sequence[Link], journal: Journal, end: int, rows_as_of_step: int
    ) -> None:
        """Replay the client's journal into the first hop; the last one reports how far it is."""
        first, last = passing[0], passing[-1]
        per_piece = max(1, REPLAY_TOKENS // self._request.rows)
        kept = journal.read(0, end)
        for position, piece in pieces(kept, per_piece):
            unacknowledged = position - REPLAYS_IN_FLIGHT * per_piece
            if unacknowledged > 0:
                await self._replayed(last, unacknowledged, passing)
            try:
                await first.connection.send(
                    Replay(
                        position=position,
                        activations=replace(piece, encoding=self._request.wire_encoding),
                        rows_as_of_step=rows_as_of_step,
                    )
                )
            except NetworkError as error:
                raise HopFailed(first.hop, error) from error
            self._replayed_tokens += piece.shape[0] * piece.shape[1]
            self._replayed_bytes += len(piece.data)

    # --- moving off a hop that leaves
    async def open_in_place_of(self, leaving: Link, hop: PlannedHop, before: Link | None) -> Link:
        """A hop that will take the state of ``leaving`` over; not yet part of the chain."""
        previous = before.peer_id if before is not None else self._transport.peer_id
        link = await self._open(hop, previous, 1, state_from=leaving.peer_id)
        self._on_open(link)
        return link

    async def route(self, link: Link, target: Link) -> None:
        """Let a hop that is not yet part of the chain send to one that is. Raises HopFailed."""
        try:
            await self._set_route(link, target)
        except RemoteError as error:
            raise HopFailed(link.hop, error) from error

    async def prepare(self, before: Link, fresh: Link) -> int:
        """Attach ``before`` to a hop that it will send to; returns the version of that route."""
        version = self._version()
        message = _route_to(fresh, version, prepare=1)
        try:
            await before.ask(message, RouteReady, version, self._timeouts.answer_s)
        except RemoteError as error:
            raise HopFailed(fresh.hop, error) from error
        return version

    async def switch(self, before: Link, fresh: Link, version: int) -> None:
        """Put a prepared route into force. If it is not known whether it is, ``before`` is lost."""
        try:
            await before.set_route(_route_to(fresh, version), self._timeouts.answer_s)
        except RemoteError as error:
            raise HopFailed(fresh.hop, error) from error
        except HopFailed as error:
            self.lose(before, error)
            raise

    def swap(self, leaving: Link, fresh: Link) -> None:
        """Put ``fresh`` in the place of ``leaving``, whose state it has; it may be gone by now."""
        others = [link for link in self.links if link is not leaving]
        self.links = sorted([*others, fresh], key=lambda link: link.hop.first_block)

    # --- joints
    async def join_again(self, before: Link, link: Link, resume_step: int) -> None:
        """Give two hops a new stream between them; what was lost on the old one is sent again.

        Raises HopFailed for ``link`` when ``before`` cannot reach it.
        """
        await self._unless_lost(self._set_route(before, link, resume_step=resume_step))

    def _version(self) -> int:
        self._last_version += 1
        return self._last_version


def _allowance(grant: Grant | None) -> dict[str, Any]:
    if grant is None:
        return {}
    signed = grant.signed
    return {
        "allowance": signed.payload,
        "allowance_signature": signed.signature,
        "allowance_issuer": signed.public_key,
    }


def _route_to(link: Link, version: int, prepare: int = 0) -> SetRoute:
    return SetRoute(
        route_version=version,
        next_peer=link.peer_id,
        next_session_id=link.opened.session_id,
        prepare=prepare,
    )


async def _all(work: Iterable[Coroutine[None, None, T]]) -> list[T]:
    """All results, or the first error; either way nothing goes on running."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return [task.result() for task in tasks]
