"""Every kind of fault, on every hop, at every moment: one session at a time on one swarm.

After that, how long a user waits at 512 tokens of context, against limits that count the prefill of
the lost span as it was measured in the same run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scripts.faults.arena import Arena, Fighter, until
from scripts.faults.last_replica import lose_all_replicas
from scripts.faults.moments import HEALED_AFTER_TOKENS, Moment, Trigger
from scripts.faults.network import OFFLINE, OFFLINE_S, Hosts
from scripts.faults.processes import Kill
from scripts.faults.progress import Event
from scripts.faults.report import matrix_document, print_matrix, print_outcome
from scripts.faults.sessions import Session, Task, Watched, make_tasks
from swarm.client.background import BackgroundLoop
from swarm.protocol.identity import PeerId

CASE_TIMEOUT_S = 60.0
LEAK_TIMEOUT_S = 15.0
COMPUTE_SECONDS = "swarm_node_step_compute_seconds_sum"

PROMPT_TOKENS = 96
NEW_TOKENS = 20
SPECULATED_TOKENS = 40
LONG_PROMPT_TOKENS = 512
PATIENT_TOKENS = 160
"""Of an answer that is long enough to find out that a hop has become slow."""
SLOW = "slow"
DRAIN = "drain"
DRAIN_FACTOR = 3.0
"""When a node leaves by plan, no token comes later than so many median steps."""
LIMITS_S = {"kill": 1.0, "freeze": 3.0, "partition": 3.0}
"""How long a fault may keep a user waiting, beside the prefill of the lost span."""
PREFILL_FACTOR = 1.2
TIMED_MOMENT = Moment("token 5 of a long context", "timing", "token", count=5)


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """What to run."""

    model: Path
    kinds: tuple[str, ...]
    moments: tuple[Moment, ...]
    stages: tuple[int, ...] = (0, 1, 2)
    replicas: int = 3
    pairs: bool = True
    timing_rounds: int = 3
    last_replica: bool = True
    logs: Path | None = None
    json: Path | None = None
    hosts: Hosts | None = None
    """Hosts of the network lab, one for each node; the caller is on the client's."""


@dataclass(frozen=True, slots=True)
class Case:
    """``kind`` strikes the nodes of ``stages`` at ``moment``."""

    kind: str
    moment: Moment
    stages: tuple[int, ...]

    @property
    def label(self) -> str:
        stages = "+".join(str(stage) for stage in self.stages)
        return f"{self.kind} hop {stages}, {self.moment.name}"


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
    replayed_tokens: int = 0
    replayed_bytes: int = 0
    problems: list[str] = field(default_factory=list)


class Matrix:
    """Runs cases. ``hear`` must get all events of ``watched``."""

    def __init__(self, arena: Arena, watched: Watched, plain: Task, speculative: Task) -> None:
        self._arena = arena
        self._watched = watched
        self._plain = plain
        self._speculative = speculative
        self._listeners: list[Callable[[Event], None]] = []
        self._serving: dict[int, PeerId] = {}
        self._tasks_at_rest = 0

    def hear(self, event: Event) -> None:
        """Take an event of the client."""
        if (event.what, event.message) == ("received", "SessionOpened") and event.peer is not None:
            fighter = self._arena.fighters.get(event.peer)
            if fighter is not None:
                self._serving[fighter.stage] = fighter.peer_id
        for listener in tuple(self._listeners):
            listener(event)

    async def warm_up(self) -> list[str]:
        """Both tasks once without a fault: what is wrong before anything was done."""
        problems = []
        for task in (self._plain, self._speculative):
            session = await self._watched.run(task)
            problems += _problems_of(session)
        problems += await self._arena.leaks(LEAK_TIMEOUT_S)
        self._tasks_at_rest = len(asyncio.all_tasks())
        return problems

    async def leftovers(self) -> list[str]:
        """What the client still does although no session is open."""
        await self._arena.mended()
        with contextlib.suppress(TimeoutError):
            await until(
                lambda: len(asyncio.all_tasks()) <= self._tasks_at_rest, 5.0, "the client's tasks"
            )
            return []
        return [f"{len(asyncio.all_tasks())} tasks of the client, {self._tasks_at_rest} at rest"]

    async def run(self, case: Case, task: Task | None = None) -> Outcome:
        """One case on a whole swarm; afterwards its nodes are being mended."""
        outcome = Outcome(case)
        needed = 3 if case.moment.healing else 2
        for stage in case.stages:
            await self._arena.wait_for_live(stage, needed)
        self._serving.clear()
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
        session = strike.session or session
        outcome.duration_s = time.monotonic() - started_s
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

    async def timed(
        self, kind: str, stage: int, task: Task, prefill_s: dict[int, float]
    ) -> tuple[Outcome, str]:
        """A fault in the middle of ``task``, and a line that says how it is to its limit."""
        await self._arena.mended()  # nobody else uses the cores
        outcome = await self.run(Case(kind, TIMED_MOMENT, (stage,)), task)
        if kind == SLOW:
            outcome.problems += [] if outcome.heals else ["the slow hop was not replaced"]
            return outcome, f"{outcome.case.label}: replaced {outcome.heals} times"
        if kind == DRAIN:
            taken_s, limit_s = outcome.longest_step_s, DRAIN_FACTOR * outcome.median_step_s
        else:
            taken_s = outcome.stall_s if outcome.stall_s is not None else CASE_TIMEOUT_S
            limit_s = LIMITS_S[kind] + PREFILL_FACTOR * prefill_s[stage]
        if taken_s > limit_s:
            outcome.problems.append(f"{taken_s:.2f} s to the next token, limit {limit_s:.2f} s")
        return outcome, f"{outcome.case.label}: {taken_s:.2f} s, limit {limit_s:.2f} s"

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
            return
        struck_s = self._arena.hurt(fighter, kind)
        self.hurt.append(fighter)
        self.struck_s = struck_s


def cases(
    kinds: Sequence[str], moments: Sequence[Moment], stages: Sequence[int], *, pairs: bool
) -> list[Case]:
    """All combinations, ordered so that killed nodes have time to come back before their next turn.

    With ``pairs`` also two adjacent hops at once, killed while a prompt and while tokens pass.
    """
    found = [
        Case(kind, moment, (stage,))
        for kind in kinds
        for moment in moments
        for stage in (stages if kind != OFFLINE else stages[:1])
    ]
    if pairs:
        chosen = [moment for moment in moments if moment.name in ("prompt sent", "token 8")]
        found += [
            Case(Kill.kind, moment, (stage, stage + 1))
            for moment in chosen
            for stage in stages
            if stage + 1 in stages
        ]
    return found


def run_matrix(plan: MatrixPlan, console: Console) -> bool:
    """Start a swarm, run everything, report; whether all went well."""
    todo = cases(plan.kinds, plan.moments, plan.stages, pairs=plan.pairs)
    background = BackgroundLoop("chaos")
    started: list[Matrix] = []
    with console.status("what the model says undisturbed"):
        (patient,) = make_tasks(plan.model, [PROMPT_TOKENS], PATIENT_TOKENS)
        (long,) = make_tasks(plan.model, [LONG_PROMPT_TOKENS], NEW_TOKENS)
        plain = patient.variant(NEW_TOKENS)
        looked_up = patient.variant(SPECULATED_TOKENS, speculative=True)
        watched = Watched(plan.model, background, lambda event: started[0].hear(event))
    outcomes: list[Outcome] = []
    problems: list[str] = []
    limits: list[str] = []

    async def run() -> None:
        matrix = Matrix(arena, watched, plain, looked_up)
        started.append(matrix)
        await watched.connect(arena.swarm.peers, arena.client_ip)
        try:
            problems.extend(await matrix.warm_up())
            with _progress(console) as progress:
                bar = progress.add_task("", total=len(todo))
                for case in todo:
                    progress.update(bar, description=case.label)
                    outcomes.append(await matrix.run(case))
                    print_outcome(console, outcomes[-1])
                    progress.advance(bar)
            if plan.timing_rounds:
                await arena.mended()
                prefill_s = await matrix.prefill_s(long)
                limits.append(f"prefill of 512 tokens in each span: {_seconds(prefill_s)}")
                for kind in plan.kinds:
                    if kind not in (*LIMITS_S, DRAIN, SLOW):
                        continue
                    for stage in plan.stages * plan.timing_rounds:
                        task = patient if kind == SLOW else long
                        outcome, line = await matrix.timed(kind, stage, task, prefill_s)
                        outcomes.append(outcome)
                        print_outcome(console, outcome)
                        limits.append(line)
            if plan.last_replica:
                for stage in plan.stages:
                    seen = await lose_all_replicas(arena, watched, plain, stage)
                    limits.append(f"last replica of hop {stage} killed: {seen.error}")
                    problems.extend(f"last replica of hop {stage}: {one}" for one in seen.problems)
            problems.extend(await matrix.leftovers())
        finally:
            await watched.close()

    try:
        with contextlib.ExitStack() as running:
            running.callback(background.close)
            with console.status("starting the swarm"):
                arena = running.enter_context(
                    Arena(plan.model, replicas=plan.replicas, logs=plan.logs, hosts=plan.hosts)
                )
            background.run(run())
    finally:  # a run that is interrupted says how far it came
        print_matrix(console, outcomes, limits, problems)
        if plan.json is not None:
            plan.json.write_text(json.dumps(matrix_document(outcomes, problems), indent=1))
    return not problems and not any(outcome.problems for outcome in outcomes)


def _seconds(by_stage: dict[int, float]) -> str:
    return ", ".join(f"{seconds:.2f} s" for _, seconds in sorted(by_stage.items()))


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)


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
