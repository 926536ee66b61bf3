"""The steps of one session: numbered, sent, remembered until hops cannot ask for them any more."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace

from swarm.client.hops import SessionRequest
from swarm.client.result_trail import ResultTrail
from swarm.journal import Journal, JournalBudget
from swarm.ledger.sketch import Sketcher
from swarm.protocol.errors import SwarmError
from swarm.protocol.ledger_objects import Work
from swarm.protocol.messages import MAX_DEADLINE_MS, Step, StepResult
from swarm.protocol.prices import step_work
from swarm.protocol.session import ClientSession, IssuedStep, SessionTerms, accepted_step_tokens
from swarm.protocol.tensors import WireTensor

STEPS_IN_FLIGHT = 4


class Steps:
    """What the client itself must remember of a session, so that any hop can be replaced."""

    def __init__(
        self, request: SessionRequest, budget: JournalBudget, sketcher: Sketcher | None = None
    ) -> None:
        """``sketcher``: sketches of results are kept for audits."""
        self.trail = ResultTrail(sketcher, request.rows) if sketcher is not None else None
        self.session = ClientSession(
            SessionTerms(
                rows=request.rows,
                maximum_tokens=request.maximum_tokens,
                hidden_size=request.hidden_size,
                wire_dtype=request.wire_dtype,
                wire_encoding=request.wire_encoding,
                maximum_step_tokens=accepted_step_tokens(request.hidden_size, request.wire_dtype),
                maximum_steps_in_flight=STEPS_IN_FLIGHT,
            )
        )
        self.journal = Journal(
            rows=request.rows,
            hidden_size=request.hidden_size,
            dtype=request.wire_dtype,
            budget=budget,
        )
        self._sent: deque[Step] = deque(maxlen=STEPS_IN_FLIGHT)
        self._results: dict[int, asyncio.Future[StepResult]] = {}
        self._may_issue = asyncio.Event()
        self._may_issue.set()

    @property
    def in_flight(self) -> int:
        """Steps without a result."""
        return len(self._results)

    async def window(self) -> None:
        """Wait until one more step may be issued."""
        await self._may_issue.wait()

    def issue(
        self,
        activations: WireTensor,
        position: int,
        *,
        output_tokens: int,
        row_order: tuple[int, ...],
        deadline_s: float | None,
    ) -> tuple[Step, asyncio.Future[StepResult]]:
        """Number a new step and remember it; ``deadline_s`` is on the loop's clock."""
        issued = self.session.issue(position, activations.shape[1], output_tokens)
        if not self.session.may_issue:
            self._may_issue.clear()
        self.journal.append(position, activations, row_order)
        if self.trail is not None:
            self.trail.cut(position)
            self.trail.is_reordered |= bool(row_order)
        loop = asyncio.get_running_loop()
        left_ms = MAX_DEADLINE_MS
        if deadline_s is not None:
            left_ms = min(max(1, round((deadline_s - loop.time()) * 1000)), MAX_DEADLINE_MS)
        step = Step(
            step=issued.step,
            position=issued.position,
            output_tokens=issued.output_tokens,
            activations=replace(activations, encoding=self.session.terms.wire_encoding),
            row_order=row_order,
            deadline_ms=left_ms,
        )
        self._sent.append(step)
        future = self._results[issued.step] = loop.create_future()
        return step, future

    def sent_since(self, step: int) -> list[Step]:
        """Steps from this number on, for a first hop that has not seen them."""
        return [sent for sent in self._sent if sent.step >= step]

    def work_since(self, step: int) -> Work:
        """The work of the steps from this number on, on each hop that sees them."""
        work = Work()
        for sent in self.sent_since(step):
            rows, tokens, _ = sent.activations.shape
            work += step_work(rows, tokens)
        return work

    def take(self, result: StepResult) -> IssuedStep | None:
        """Match a result to its step; None for a repetition. Raises ProtocolError."""
        issued = self.session.accept(result)
        if issued is None:
            return None
        if self.trail is not None:
            self.trail.add(issued.position + issued.tokens, result.activations)
        future = self._results.pop(issued.step)
        if not future.done():
            future.set_result(result)
        self._may_issue.set()
        return issued

    def give_up(self, error: SwarmError) -> None:
        """Nothing of the steps in flight counts; who waits for them gets ``error``."""
        self.session.give_up()
        self.journal.cut(self.session.length)
        self._sent.clear()
        for future in self._results.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # its waiter may have been cancelled
        self._results.clear()
        self._may_issue.set()

    def close(self) -> None:
        """Give the memory back."""
        self.journal.drop()
