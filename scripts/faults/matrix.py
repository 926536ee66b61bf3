"""Every kind of fault, on every hop, at every moment: one session at a time on one swarm.

After that, how long a user waits at 512 tokens of context, against limits that count the prefill of
the lost span as it was measured in the same run.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scripts.faults.answers import Task
from scripts.faults.arena import Arena
from scripts.faults.cases import CASE_TIMEOUT_S, CaseRunner, Outcome
from scripts.faults.last_replica import lose_all_replicas
from scripts.faults.moments import HALF_FILLED, Case, Moment, cases
from scripts.faults.network import Hosts
from scripts.faults.report import matrix_document, print_matrix, print_outcome
from scripts.faults.sessions import Watched, make_tasks
from swarm.client.background import BackgroundLoop

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
    singles: bool = True
    timing_rounds: int = 3
    last_replica: bool = True
    logs: Path | None = None
    json: Path | None = None
    hosts: Hosts | None = None
    """Hosts of the network lab, one for each node; the caller is on the client's."""


async def timed(
    runner: CaseRunner, kind: str, stage: int, task: Task, prefill_s: dict[int, float]
) -> tuple[Outcome, str]:
    """A fault in the middle of ``task``, and a line that says how it is to its limit."""
    outcome = await runner.run(Case(kind, TIMED_MOMENT, (stage,)), task)
    load = f", load average {outcome.load_average:.1f}"
    if kind == SLOW:
        replaced = outcome.heals + outcome.hand_overs
        outcome.problems += [] if replaced else ["the slow hop was not replaced"]
        return outcome, f"{outcome.case.label}: replaced {replaced} times{load}"
    if kind == DRAIN:
        outcome.problems += [] if outcome.hand_overs else ["nothing was handed over"]
        taken_s, limit_s = outcome.longest_step_s, DRAIN_FACTOR * outcome.median_step_s
    else:
        taken_s = outcome.stall_s if outcome.stall_s is not None else CASE_TIMEOUT_S
        limit_s = LIMITS_S[kind] + PREFILL_FACTOR * prefill_s[stage]
    if taken_s > limit_s:
        outcome.problems.append(f"{taken_s:.2f} s to the next token, limit {limit_s:.2f} s")
    return outcome, f"{outcome.case.label}: {taken_s:.2f} s, limit {limit_s:.2f} s{load}"


def run_matrix(plan: MatrixPlan, console: Console) -> bool:
    """Start a swarm, run everything, report; whether all went well."""
    todo = [
        case
        for case in cases(plan.kinds, plan.moments, plan.stages, pairs=plan.pairs)
        if plan.singles or len(case.stages) > 1
    ]
    background = BackgroundLoop("chaos")
    started: list[CaseRunner] = []
    with console.status("what the model says undisturbed"):
        (patient,) = make_tasks(plan.model, [PROMPT_TOKENS], PATIENT_TOKENS)
        (long,) = make_tasks(plan.model, [LONG_PROMPT_TOKENS], NEW_TOKENS)
        plain = patient.variant(NEW_TOKENS)
        looked_up = patient.variant(SPECULATED_TOKENS, speculative=True)
        watched = Watched(plan.model, background, lambda event: started[0].hear(event))
    outcomes: list[Outcome] = []
    problems: list[str] = []
    limits: list[str] = []

    def save() -> None:
        if plan.json is not None:
            document = matrix_document(outcomes, limits, problems)
            plan.json.write_text(json.dumps(document, indent=1))

    async def run() -> None:
        runner = CaseRunner(arena, watched, plain, looked_up)
        started.append(runner)
        await watched.connect(arena.swarm.peers, arena.client_ip)
        try:
            problems.extend(await runner.warm_up())
            with _progress(console) as progress:
                bar = progress.add_task("", total=len(todo))
                for case in todo:
                    progress.update(bar, description=case.label)
                    task = long if case.moment is HALF_FILLED else None
                    outcomes.append(await runner.run(case, task))
                    print_outcome(console, outcomes[-1])
                    save()
                    progress.advance(bar)
            if plan.timing_rounds:
                await arena.mended()
                prefill_s = await runner.prefill_s(long)
                limits.append(f"prefill of 512 tokens in each span: {_seconds(prefill_s)}")
                for kind in plan.kinds:
                    if kind not in (*LIMITS_S, DRAIN, SLOW):
                        continue
                    for stage in plan.stages * plan.timing_rounds:
                        await arena.mended()  # nobody else uses the cores
                        task = long
                        if kind == SLOW:
                            task = patient
                            await watched.forget()
                        outcome, line = await timed(runner, kind, stage, task, prefill_s)
                        outcomes.append(outcome)
                        print_outcome(console, outcome)
                        limits.append(line)
                        save()
            if plan.last_replica:
                for stage in plan.stages:
                    seen = await lose_all_replicas(arena, watched, plain, stage)
                    limits.append(f"last replica of hop {stage} killed: {seen.error}")
                    problems.extend(f"last replica of hop {stage}: {one}" for one in seen.problems)
            problems.extend(await runner.leftovers())
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
        save()
    return not problems and not any(outcome.problems for outcome in outcomes)


def _seconds(by_stage: dict[int, float]) -> str:
    return ", ".join(f"{seconds:.2f} s" for _, seconds in sorted(by_stage.items()))


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
