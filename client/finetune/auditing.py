"""Audits of trainings: what a hop did in a step is done again elsewhere and compared.

Of every step all hops have said, before they can know whether anybody looks: the hashes of what
they were given and sent on, the norm of their gradients, and the hash of their state after it. Then
a lot decides, by a hop's record (``swarm.ledger.reputation``). The hop shows tensors and states of
the step, which must have these hashes; another node does the same step from the same state
(``step_replay``), and the two are compared (``step_comparison``). A third one decides when they
disagree.

The training waits only for what the hop shows. The replay runs beside it, one at a time; while it
runs no other hop is looked at. No state is kept as a snapshot before it has ended, so that a
training goes back to before a step that was refuted.

What is found is this client's alone, as with audits of answers, and no evidence against anybody:
training sessions have no receipts.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from swarm.client.bans import FailureKind
from swarm.client.finetune.audited_training import AuditedTraining, AuditFailed, TakenStep
from swarm.client.finetune.chain import TrainingChain
from swarm.client.finetune.commitments import MicroBatchRecord
from swarm.client.finetune.link import TrainingLink
from swarm.client.finetune.step_comparison import (
    StepDifference,
    StepInputs,
    StepWork,
    difference,
)
from swarm.client.finetune.step_replay import replay_step
from swarm.client.ledger_store import ClientLedger
from swarm.client.link import HopFailed
from swarm.client.router import failure_kind
from swarm.ledger.reputation import Found, Reputations
from swarm.ports import Clock, Transport
from swarm.protocol.errors import SwarmError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import AskState
from swarm.training_parts import HandledMicroBatch, state_hash

log = logging.getLogger(__name__)

SHOW_S = 300.0
"""For each of the tensors and states of a step; as long as for a snapshot."""
REPLAY_ATTEMPTS = 3
FINDINGS_KEPT = 256
ALONE_S = 60.0
"""A hop whose blocks nobody else has now is not looked at for so long."""


@dataclass(frozen=True, slots=True)
class TrainingFinding:
    """What was found of one node."""

    peer_id: PeerId
    step: int
    found: Found
    difference: StepDifference | None = None


@dataclass(frozen=True, slots=True)
class ShownStep:
    """What one hop did in one step, as it has shown it."""

    training: AuditedTraining
    link: TrainingLink
    taken: TakenStep
    micro_batches: tuple[MicroBatchRecord, ...]
    given: StepInputs
    work: StepWork

    @property
    def change(self) -> tuple[float, float] | None:
        """Scale and learning rate, if all of the step was shown."""
        is_whole = len(self.micro_batches) == len(self.taken.micro_batches)
        return (self.taken.scale, self.taken.learning_rate) if is_whole else None


@dataclass(frozen=True, slots=True)
class Opinion:
    """What others made of the same."""

    peers: tuple[PeerId, ...]
    work: StepWork


class TrainingAuditor:
    """The audits of all trainings of one client; a ``StepAuditor``."""

    def __init__(
        self,
        transport: Transport,
        *,
        clock: Clock,
        dice: random.Random,
        own: Callable[[Coroutine[Any, Any, None]], None],
        reputations: Reputations | None = None,
        ledger: ClientLedger | None = None,
    ) -> None:
        """``own`` runs work beside the trainings: a hop that ends its session is judged as well."""
        self.reputations = reputations or Reputations()
        self.findings: deque[TrainingFinding] = deque(maxlen=FINDINGS_KEPT)
        """The latest ones."""
        self._transport = transport
        self._clock = clock
        self._dice = dice
        self._own = own
        self._ledger = ledger
        self._wrong: set[PeerId] = set()
        self._alone_until_s: dict[PeerId, float] = {}
        self._watched: WeakSet[AuditedTraining] = WeakSet()
        self._settled = asyncio.Event()
        self._settled.set()

    @property
    def wrong(self) -> Collection[PeerId]:
        return self._wrong

    def watch(self, training: AuditedTraining) -> None:
        self._watched.add(training)
        for peer in self._wrong.intersection(link.hop.peer_id for link in training.links):
            training.refuted(peer, AuditFailed("it was found wrong while the chain was opened"))

    async def settled(self) -> None:
        await self._settled.wait()

    async def contradicted(
        self, training: AuditedTraining, peers: Sequence[PeerId], step: int, reason: AuditFailed
    ) -> None:
        links = [link for link in training.links if link.hop.peer_id in peers]
        if len(links) == 1:
            peer, segment = links[0].hop.peer_id, _segment(links[0])
            await self._refute(training, peer, segment, step, reason)
            return
        training.planner.quarrelled(peers)
        for link in links:
            others = [peer for peer in peers if peer != link.hop.peer_id]
            await self._note(
                link.hop.peer_id, Found.DISPUTED, segment=_segment(link), step=step, other=others[0]
            )

    async def step_taken(self, training: AuditedTraining, taken: TakenStep) -> None:
        if not self._settled.is_set() or not taken.micro_batches:
            return
        now_s = self._clock.monotonic_s()
        drawn = [
            place
            for place, link in enumerate(training.links)
            if self._dice.random() < self.reputations.of(link.hop.peer_id).audit_probability()
            and now_s >= self._alone_until_s.get(link.hop.peer_id, now_s)
        ]
        if not drawn:
            return
        self._settled.clear()
        shown = None
        try:
            shown = await self._let_show(training, self._dice.choice(drawn), taken)
        finally:
            if shown is None:
                self._settled.set()
        if shown is not None:
            self._own(self._judge_shown(shown))

    # --- what a hop shows
    async def _let_show(
        self, training: AuditedTraining, place: int, taken: TakenStep
    ) -> ShownStep | None:
        """As :meth:`shown_by`; what follows if it shows nothing. Raises HopFailed."""
        link = training.links[place]
        try:
            shown = await self.shown_by(training, place, taken)
        except HopFailed as error:
            if error.peer_id == link.hop.peer_id:
                training.planner.failed(error.peer_id, FailureKind.REFUSED)
                await self._refused(link, taken.step)
            raise
        except AuditFailed as error:
            segment = _segment(link)
            await self._refute(training, link.hop.peer_id, segment, taken.step, error)
            raise HopFailed(link.hop, error) from error
        if shown is None:
            await self._refused(link, taken.step)
        return shown

    async def shown_by(
        self, training: AuditedTraining, place: int, taken: TakenStep
    ) -> ShownStep | None:
        """None if the hop refuses. Raises HopFailed, and AuditFailed for something else than the
        hop has said."""
        link, request = training.links[place], training.request
        if not link.audited_micro_batches:
            return None
        # What the hop keeps are the latest gradients; numbers grow in every session.
        latest = taken.micro_batches[-link.audited_micro_batches :]
        records = tuple(sorted(latest, key=lambda record: record.number))
        handled: list[HandledMicroBatch] = []
        for record in records:
            one = await link.show(
                record.number, record.tokens, request.hidden_size, request.wire_dtype, SHOW_S
            )
            if one is None:
                return None
            handled.append(one)
        before = await link.ask_state(AskState(step=taken.step - 1), SHOW_S)
        after = await link.ask_state(AskState(step=taken.step), SHOW_S)

        def is_bound() -> bool:
            said = (taken.hashes_before[place], taken.hashes_after[place])
            if said[0] not in (b"", state_hash(before)) or said[1] != state_hash(after):
                return False
            return all(
                one.done(record.number) == record.done[place]
                for one, record in zip(handled, records, strict=True)
            )

        if not await asyncio.to_thread(is_bound):
            raise AuditFailed("it shows something else than it said before")
        given = StepInputs(
            tuple(record.lengths for record in records),
            tuple(one.activations_in for one in handled),
            tuple(one.gradients_in for one in handled),
            before,
        )
        is_whole = len(records) == len(taken.micro_batches)
        work = StepWork(
            tuple(one.activations_out for one in handled),
            tuple(one.gradients_out for one in handled),
            (link.dtype_class,),
            taken.square_sums[place] if is_whole else None,
            after if is_whole else None,
        )
        return ShownStep(training, link, taken, records, given, work)

    # --- judging
    async def _judge_shown(self, shown: ShownStep) -> None:
        try:
            await self._judge(shown)
        finally:
            self._settled.set()

    async def _judge(self, shown: ShownStep) -> None:
        """Compare with a second opinion, and with a third one if they differ."""
        link, step = shown.link, shown.taken.step
        peer, segment = link.hop.peer_id, _segment(link)
        second = await self.opinion(shown, excluded=())
        if second is None:
            self._alone_until_s[peer] = self._clock.monotonic_s() + ALONE_S
            return
        found = await _compared(shown.given, shown.work, second.work)
        if found.is_empty:
            return
        if _passes(found, shown.work, second.work):
            await self._note(peer, Found.PASSED, segment=segment, step=step, difference=found)
            return
        log.info("step %d of %s is not that of %s: %s", step, peer, second.peers, found)
        third = await self.opinion(shown, excluded=second.peers)
        if third is not None:
            again = await _compared(shown.given, shown.work, third.work)
            if _passes(again, shown.work, third.work):
                await self._note(peer, Found.PASSED, segment=segment, step=step, difference=again)
                if len(second.peers) == 1:
                    reason = AuditFailed(f"in an audit of step {step} its work was wrong")
                    replica = _of_replica(segment)
                    await self._refute(
                        shown.training, second.peers[0], replica, step, reason, found
                    )
                return
            between = await _compared(shown.given, second.work, third.work)
            if _passes(between, second.work, third.work):
                reason = AuditFailed(f"an audit of step {step} found that its work is wrong")
                await self._refute(shown.training, peer, segment, step, reason, found)
                return
        shown.training.planner.quarrelled([peer, second.peers[0]])
        await self._note(
            peer,
            Found.DISPUTED,
            segment=segment,
            step=step,
            other=second.peers[0],
            difference=found,
        )

    async def opinion(self, shown: ShownStep, *, excluded: Sequence[PeerId]) -> Opinion | None:
        """The step done by others, several one after the other where no single node has all of the
        blocks; None when there is nobody."""
        hop, training = shown.link.hop, shown.training
        left_out = {hop.peer_id, *excluded}
        for _ in range(REPLAY_ATTEMPTS):
            chain = TrainingChain(
                self._transport,
                training.planner,
                training.request,
                clock=self._clock,
                blocks=range(hop.first_block, hop.end_block),
                excluded=left_out | self._wrong,
            )
            try:
                work = await replay_step(
                    chain,
                    shown.given,
                    shown.micro_batches,
                    step=shown.taken.step,
                    change=shown.change,
                )
            except HopFailed as error:
                log.info("a replica failed: %s", error)
                left_out.add(error.peer_id)
                if isinstance(error.__cause__, SwarmError):  # else the next audit waits for it too
                    training.planner.failed(error.peer_id, failure_kind(error.__cause__))
            except SwarmError as error:
                log.debug("nobody to do a step of %s again: %s", hop.peer_id, error)
                return None
            else:
                return Opinion(tuple(each.peer_id for each in chain.plan.hops), work)
        return None

    # --- what follows
    async def _refute(
        self,
        training: AuditedTraining,
        peer: PeerId,
        segment: str,
        step: int,
        reason: AuditFailed,
        found: StepDifference | None = None,
    ) -> None:
        """No chain uses the node any more, and those that do end."""
        self._wrong.add(peer)
        training.planner.failed(peer, FailureKind.WRONG)
        await self._note(peer, Found.FAILED, segment=segment, step=step, difference=found)
        for watched in tuple(self._watched):
            watched.refuted(peer, reason)

    async def _refused(self, link: TrainingLink, step: int) -> None:
        await self._note(link.hop.peer_id, Found.REFUSED, segment=_segment(link), step=step)

    async def _note(
        self,
        peer: PeerId,
        found: Found,
        *,
        segment: str,
        step: int,
        other: str = "",
        difference: StepDifference | None = None,
    ) -> None:
        reputation = self.reputations.found(
            peer, found, segment=segment, other=other, now_unix_s=self._clock.unix_s()
        )
        if found is not Found.PASSED:
            log.warning("audit of %s in a training: %s", peer, found.value)
        self.findings.append(TrainingFinding(peer, step, found, difference))
        if self._ledger is not None:
            await self._ledger.keep_reputation(peer, reputation.to_json())


def _segment(link: TrainingLink) -> str:
    return hashlib.sha256(link.session_id).hexdigest()


def _of_replica(segment: str) -> str:
    return hashlib.sha256(segment.encode()).hexdigest()


def _passes(found: StepDifference, one: StepWork, other: StepWork) -> bool:
    return found.passes((*one.dtype_classes, *other.dtype_classes))


async def _compared(given: StepInputs, work: StepWork, reference: StepWork) -> StepDifference:
    """Beside the event loop: numpy takes a moment for it."""
    return await asyncio.to_thread(difference, given, work, reference)
