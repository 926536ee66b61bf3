"""One session and one fault at one moment: a case, and how it is run and judged."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from scripts.faults.answers import Session, Task
from scripts.faults.arena import Arena, Fighter, until
from scripts.faults.moments import HEALED_AFTER_TOKENS, Case, Trigger
from scripts.faults.network import OFFLINE, OFFLINE_S
from scripts.faults.progress import Event
from scripts.faults.sessions import Watched
from swarm.protocol.identity import PeerId

CASE_TIMEOUT_S = 120.0
LEAK_TIMEOUT_S = 45.0
"""A node gives a stream up when it was silent for 30 s."""
COMPUTE_SECONDS = "swarm_node_step_compute_seconds_sum"


@dataclass(slots=True)
class Outcome:
    """What a case came to; it is good when ``problems`` is empty."""

    case: Case
    stall_s: float | None = None
    """Of the user; see ``Session.stall_s``."""
    longest_step_s: float = 0.0
    """Between two tokens, from the fault to the end of the answer."""
    median_step_s: float = 0.0
    """Between two tokens of this session."""
    duration_s: float = 0.0
    heals: int = 0
    hand_overs: int = 0
    """Hops that moved to another node without being computed again."""
    replayed_tokens: int = 0
    replayed_bytes: int = 0
    load_average: float = 0.0
    """Of the machine in the last minute: how much else it had to do."""
    problems: list[str] = field(default_factory=list)


class CaseRunner:
    """Runs cases. ``hear`` must get all events of ``watched``."""

    def __init__(self, arena: Arena, watched: Watched, plain: Task, speculative: Task) -> None:
        self._arena = arena
        self._watched = watched
        self._plain = plain
        self._speculative = speculative
        self._listeners: list[Callable[[Event], None]] = []
        self._serving: dict[int, PeerId] = {}
        self._handed_over: set[PeerId] = set()
        self._tasks_at_rest = 0

    def hear(self, event: Event) -> None:
        """Take an event of the client."""
        if (event.what, event.message) == ("received", "SessionOpened") and event.peer is not None:
            fighter = self._arena.fighters.get(event.peer)
            if fighter is not None:
                self._serving[fighter.stage] = fighter.peer_id
        if (event.what, event.message) == ("received", "HandedOver") and event.peer is not None:
            self._handed_over.add(event.peer)  # says it once for each round
        for listener in tuple(self._listeners):
            listener(event)

    async def warm_up(self) -> list[str]:
        """Both tasks once without a fault: what is wrong before anything was done."""
        problems = []
        for task in (self._plain, self._speculative):
            session = await self._watched.run(task)
            problems += _problems_of(session)
        problems += await self._arena.leaks(LEAK_TIMEOUT_S)
        await self._arena.note_rest()
        self._tasks_at_rest = len(asyncio.all_tasks())
        return problems

    async def leftovers(self) -> list[str]:
        """What is left when no session is open: on the nodes, and at the client."""
        await self._arena.mended()
        left = self._arena.problems + await self._arena.leaks(LEAK_TIMEOUT_S)
        with contextlib.suppress(TimeoutError):
            await until(
                lambda: len(asyncio.all_tasks()) <= self._tasks_at_rest, 5.0, "the client's tasks"
            )
            return left
        left.append(
            f"{len(asyncio.all_tasks())} tasks of the client, {self._tasks_at_rest} at rest"
        )
        return left

    async def run(self, case: Case, task: Task | None = None) -> Outcome:
        """One case on a whole swarm; afterwards its nodes are being mended."""
        outcome = Outcome(case)
        needed = 3 if case.moment.healing else 2
        for stage in case.stages:
            await self._arena.wait_for_live(stage, needed)
        self._serving.clear()
        self._handed_over.clear()
        heals = self._watched.heals
        recomputed = await self._arena.recomputed_tokens()
        started_s = time.monotonic()
        strike = _Strike(case, self._arena, self._serving)
        await strike.prepare()
        if task is None:
            task = self._speculative if case.moment.speculative else self._plain
        session = None
        with self._listening(strike.hear):
            try:
                async with asyncio.timeout(CASE_TIMEOUT_S):
                    session = await self._watched.run(task, strike.watch)
            except TimeoutError:
                outcome.problems.append(f"not finished within {CASE_TIMEOUT_S:.0f} s")
            finally:
                await strike.close()
        if strike.was_being_mended:
            for fighter in strike.hurt:
                self._arena.mend_soon(fighter)
            await self._arena.mended()
            return await self.run(case, task)
        session = strike.session or session
        outcome.duration_s = time.monotonic() - started_s
        outcome.load_average = os.getloadavg()[0]
        if strike.struck_s is None:
            outcome.problems.append("the moment did not come")
        if session is not None:
            outcome.problems += _problems_of(session)
            if strike.struck_s is not None:
                outcome.stall_s = session.stall_s(strike.struck_s)
                outcome.longest_step_s = session.longest_step_s(strike.struck_s)
            outcome.median_step_s = session.median_step_s
        for fighter in strike.hurt:
            if fighter.fault is not None and fighter.fault.ends_node:
                self._arena.mend_soon(fighter)
            else:
                await self._arena.mend(fighter)
        outcome.problems += await self._arena.leaks(LEAK_TIMEOUT_S)
        outcome.heals = self._watched.heals - heals
        outcome.hand_overs = len(self._handed_over)
        outcome.replayed_tokens = await self._arena.recomputed_tokens() - recomputed
        outcome.replayed_bytes = outcome.replayed_tokens * self._watched.token_bytes
        return outcome

    async def prefill_s(self, task: Task) -> dict[int, float]:
        """Compute time of the prompt of ``task`` in each stage, undisturbed: the median of 3."""
        measured: dict[int, list[float]] = {stage: [] for stage in range(self._arena.stages)}
        short = task.variant(1)
        for _ in range(3):
            before = await self._compute_seconds()
            await self._watched.run(short)
            after = await self._compute_seconds()
            for stage, values in measured.items():
                values.append(
                    sum(
                        after[peer] - before.get(peer, 0.0)
                        for peer, fighter in self._arena.fighters.items()
                        if fighter.stage == stage and peer in after
                    )
                )
        return {stage: statistics.median(values) for stage, values in measured.items()}

    async def _compute_seconds(self) -> dict[PeerId, float]:
        live = [one for one in self._arena.fighters.values() if one.fault is None]
        values = await asyncio.gather(*(one.metric_soon(COMPUTE_SECONDS) for one in live))
        return {one.peer_id: value for one, value in zip(live, values, strict=True)}

    @contextlib.contextmanager
    def _listening(self, listener: Callable[[Event], None]) -> Iterator[None]:
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)


class _Strike:
    """The fault of one case: waits for its moment, and strikes."""

    def __init__(self, case: Case, arena: Arena, serving: dict[int, PeerId]) -> None:
        self._case = case
        self._arena = arena
        self._serving = serving
        self._first_stage = case.stages[0]
        self._tokens = 0
        self._is_armed = not case.moment.healing
        self._trigger = Trigger(case.moment, self._is_of_stage, self._come)
        self._before: dict[PeerId, float] = {}
        self._waiting: asyncio.Task[None] | None = None
        self.session: Session | None = None
        self.hurt: list[Fighter] = []
        self.struck_s: float | None = None
        self.was_being_mended = False
        """A node that was to be hurt served again already, but was not yet known to."""

    async def prepare(self) -> None:
        """Note what metrics are now, so that their rise can be seen."""
        metric = self._case.moment.metric
        if metric:
            for fighter in self._arena.live(self._first_stage):
                self._before[fighter.peer_id] = await fighter.metric_soon(metric)

    def watch(self, session: Session) -> None:
        self.session = session

    def hear(self, event: Event) -> None:
        if not self._is_armed:
            self._tokens += event.what == "token"
            if self._tokens < HEALED_AFTER_TOKENS:
                return
            self._is_armed = True
            first = self._arena.fighters[self._serving[self._first_stage]]
            self._hurt(first, "kill")
            return
        self._trigger.hear(event)

    async def close(self) -> None:
        """Stop what waits for a metric or for the client's network."""
        if self._waiting is not None:
            self._waiting.cancel()
            await asyncio.gather(self._waiting, return_exceptions=True)

    def _is_of_stage(self, event: Event) -> bool:
        fighter = self._arena.fighters.get(event.peer) if event.peer is not None else None
        return fighter is not None and fighter.stage == self._first_stage

    def _come(self, event: Event) -> None:
        if self._case.moment.metric:
            self._waiting = asyncio.get_running_loop().create_task(self._poll())
        else:
            self._strike(event.peer if self._case.moment.of_stage else None)

    async def _poll(self) -> None:
        fighter = self._arena.fighters[self._serving[self._first_stage]]
        before = self._before[fighter.peer_id]
        # A node cannot tell us; asking takes a few milliseconds, which is pause enough.
        while await fighter.metric_soon(self._case.moment.metric) <= before:
            pass
        self._strike(None)

    def _strike(self, peer: PeerId | None) -> None:
        if self._case.kind == OFFLINE:
            self._waiting = asyncio.get_running_loop().create_task(self._lose_network())
            return
        for stage in self._case.stages:
            chosen = peer if peer is not None and stage == self._first_stage else None
            if chosen is None:
                chosen = self._serving.get(stage)
            if chosen is not None:
                self._hurt(self._arena.fighters[chosen], self._case.kind)

    async def _lose_network(self) -> None:
        self.struck_s = time.monotonic()
        self.struck_s = await self._arena.client_offline(OFFLINE_S)

    def _hurt(self, fighter: Fighter, kind: str) -> None:
        if fighter.fault is not None:
            self.was_being_mended |= fighter not in self.hurt
            return
        struck_s = self._arena.hurt(fighter, kind)
        self.hurt.append(fighter)
        self.struck_s = struck_s


def _problems_of(session: Session) -> list[str]:
    problems = []
    if session.error is not None:
        problems.append(f"{type(session.error).__name__}: {session.error}")
    if not session.is_right:
        problems.append(f"wrong tokens after {_right_tokens(session)}")
    return problems


def _right_tokens(session: Session) -> int:
    pairs = zip(session.tokens, session.task.answer, strict=False)
    return next(
        (index for index, (one, other) in enumerate(pairs) if one != other), len(session.tokens)
    )
