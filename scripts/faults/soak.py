"""Random faults under concurrent sessions, by a seed, for as long as one likes.

Faults come at random times and hit random nodes, but a block always keeps a live replica. Nodes
that ended are started again; the others are mended after a while. Each answer is compared with the
undisturbed model's; when the time is over nothing may be left on any node.

One node, the *survivor*, is never ended, only frozen, slowed down and cut off like the others: its
memory is what shows whether a node keeps something of what it lives through.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from scripts.faults.answers import Session, Task
from scripts.faults.arena import Arena, Fighter
from scripts.faults.network import OFFLINE, OFFLINE_S, Hosts
from scripts.faults.processes import ENDING_FAULTS
from scripts.faults.progress import Event
from scripts.faults.report import levels_off_after_s, seconds_of
from scripts.faults.sessions import Watched, make_tasks
from swarm.client.background import BackgroundLoop

PROMPT_LENGTHS = (5, 24, 64, 128, 200, 300, 420, 512)
NEW_TOKENS = 48
LENGTH_OF_FAULT_S = (4.0, 15.0)
"""How long a node stays as it is before it is mended, at least and at most."""
MEMORY_PERIOD_S = 5.0
SETTLED_AFTER_S = 1200.0
"""A node's memory counts from this age on. Until it has computed batches of most numbers of rows
it grows in small steps, some of them late (docs/decisions/0009)."""
WATCHED_FOR_S = 480.0
FLAT_MB_PER_HOUR = 120.0
MINUTES_APART = 3
LEAK_TIMEOUT_S = 45.0
FINISH_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class SoakPlan:
    """What to run."""

    model: Path
    kinds: tuple[str, ...]
    minutes: float
    sessions: int = 4
    seed: int = 0
    fault_every_s: float = 20.0
    stages: int = 3
    replicas: int = 2
    logs: Path | None = None
    json: Path | None = None
    hosts: Hosts | None = None
    """Hosts of the network lab, one for each node; the caller is on the client's."""


@dataclass(slots=True)
class Happened:
    """One fault and the sessions that ran through the node when it came."""

    kind: str
    node: str
    at_s: float
    struck_s: float
    sessions: list[Session]

    @property
    def stalls_s(self) -> list[float]:
        """Of the sessions that had a token to come; see ``Session.stall_s``."""
        stalls = [session.stall_s(self.struck_s) for session in self.sessions]
        return [stall for stall in stalls if stall is not None]


class Soak:
    """Sessions and faults side by side."""

    def __init__(
        self,
        plan: SoakPlan,
        arena: Arena,
        watched: Watched,
        tasks: Sequence[Task],
        console: Console,
    ) -> None:
        self._plan = plan
        self._console = console
        self._arena = arena
        self._watched = watched
        self._tasks = tasks
        self._dice = random.Random(plan.seed)
        self._running: set[Session] = set()
        self._ending = asyncio.Event()
        self.happened: list[Happened] = []
        self.finished = 0
        self.recomputed = 0
        self.tokens = 0
        self.undisturbed_step_s: list[float] = []
        self.problems: list[str] = []
        self.memory: dict[str, list[tuple[float, int]]] = {}
        """Resident bytes of each node by its age in seconds."""
        self.started_s = time.monotonic()
        self.loads: list[float] = []
        """Load averages of the machine, in the last minute each."""
        self.survivor = self._dice.choice(sorted(arena.live_ones(), key=lambda one: one.name))

    async def warm_up(self) -> None:
        """Each task once without faults; what is wrong then was wrong before."""
        for task in self._tasks:
            session = await self._watched.run(task)
            self._judge(session)
            times = session.times_s
            self.undisturbed_step_s += [later - one for one, later in itertools.pairwise(times)]
        self.problems += await self._arena.leaks(LEAK_TIMEOUT_S)
        await self._arena.note_rest()

    async def run(self) -> None:
        """Run for the planned time, then let sessions finish and look for what is left."""
        tasks_at_rest = len(asyncio.all_tasks())
        self.started_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(self._plan.sessions):
                group.create_task(self._converse(random.Random(f"{self._plan.seed}/{number}")))
            faults = group.create_task(self._break())
            memory = group.create_task(self._weigh())
            await asyncio.sleep(self._plan.minutes * 60)
            self._ending.set()
            for task in (faults, memory):
                task.cancel()
        await self._arena.mended()
        leaks = await self._arena.leaks(LEAK_TIMEOUT_S)
        self.problems += [f"left behind: {leak}" for leak in leaks] + self._arena.problems
        left = len(asyncio.all_tasks())
        if left > tasks_at_rest:
            self.problems.append(f"{left} tasks of the client, {tasks_at_rest} at rest")
        for name, growth in self.growth_mb_per_hour().items():
            if growth > FLAT_MB_PER_HOUR:
                self.problems.append(f"the memory of {name} grows by {growth:.0f} MB an hour")

    async def _converse(self, dice: random.Random) -> None:
        while not self._ending.is_set():
            session = None
            try:
                async with asyncio.timeout(FINISH_TIMEOUT_S):
                    session = await self._watched.run(dice.choice(self._tasks), self._running.add)
            except TimeoutError:
                self._is_wrong(f"a session did not end within {FINISH_TIMEOUT_S:.0f} s")
            for ended in [one for one in self._running if one.ended]:
                self._running.discard(ended)
            if session is not None:
                self._judge(session)

    async def _break(self) -> None:
        while True:
            await asyncio.sleep(self._dice.expovariate(1 / self._plan.fault_every_s))
            kind = self._dice.choice(self._plan.kinds)
            if kind == OFFLINE:
                await self._lose_network()
                continue
            may = sorted(
                (one for one in self._arena.fighters.values() if self._may(kind, one)),
                key=lambda one: one.name,
            )
            if not may:
                continue
            fighter = self._dice.choice(may)
            duration_s = self._dice.uniform(*LENGTH_OF_FAULT_S)
            affected = [one for one in self._running if fighter.peer_id in one.peers]
            struck_s = self._arena.hurt(fighter, kind)
            since_s = struck_s - self.started_s
            self.happened.append(Happened(kind, fighter.name, since_s, struck_s, affected))
            self._say(f"{since_s:6.0f} s  {kind} {fighter.name}, {len(affected)} sessions")
            self._arena.mend_soon(fighter, duration_s)

    def _may(self, kind: str, fighter: Fighter) -> bool:
        ends_survivor = kind in ENDING_FAULTS and fighter is self.survivor
        return self._arena.may_hurt(fighter) and not ends_survivor

    async def _lose_network(self) -> None:
        sessions = list(self._running)
        since_s = time.monotonic() - self.started_s
        back_s = await self._arena.client_offline(OFFLINE_S)
        # What a user waits after the network is back is what we can be blamed for.
        self.happened.append(Happened(OFFLINE, "client", since_s, back_s, sessions))
        self._say(f"{since_s:6.0f} s  {OFFLINE}, {len(sessions)} sessions")

    async def _weigh(self) -> None:
        while True:
            now_s = time.monotonic()
            for fighter in self._arena.fighters.values():
                resident = fighter.processes.resident_bytes()
                if resident:
                    ages = self.memory.setdefault(fighter.name, [])
                    ages.append((now_s - fighter.started_s, resident))
            self.loads.append(os.getloadavg()[0])
            self.recomputed = await self._arena.recomputed_tokens()
            await asyncio.sleep(MEMORY_PERIOD_S)

    def _judge(self, session: Session) -> None:
        self.finished += 1
        self.tokens += len(session.tokens)
        length = len(session.task.prompt)
        if session.error is not None:
            error = session.error
            self._is_wrong(
                f"session with {length} tokens of prompt failed after {len(session.tokens)} "
                f"tokens: {type(error).__name__}: {error}"
            )
        if not session.is_right:
            self._is_wrong(f"session with {length} tokens of prompt: wrong tokens")

    def _is_wrong(self, problem: str) -> None:
        since_s = time.monotonic() - self.started_s
        self.problems.append(f"{since_s:.0f} s: {problem}")
        self._say(f"{since_s:6.0f} s  {problem}", style="red")

    def _say(self, text: str, style: str = "dim") -> None:
        self._console.print(f"  {escape(text)}", style=style, soft_wrap=True)

    def growth_mb_per_hour(self) -> dict[str, float]:
        """Of each node that was watched for long enough after it had settled: a fitted line."""
        found = {}
        for name, points in self.memory.items():
            settled = [(age, size) for age, size in points if age > SETTLED_AFTER_S]
            if len(settled) > 2 and settled[-1][0] - settled[0][0] > WATCHED_FOR_S:
                ages, sizes = zip(*settled, strict=True)
                slope = statistics.linear_regression(ages, sizes).slope
                found[name] = slope * 3600 / 1e6
        return found

    def summary(self) -> Table:
        """A row for each kind of fault."""
        table = Table("fault", "times", "sessions hit", "next token p50", "p95", "max")
        kinds = sorted({happened.kind for happened in self.happened})
        for kind in kinds:
            members = [happened for happened in self.happened if happened.kind == kind]
            stalls = [stall for happened in members for stall in happened.stalls_s]
            hit = sum(len(happened.sessions) for happened in members)
            table.add_row(kind, str(len(members)), str(hit), *seconds_of(stalls))
        return table

    def report(self, console: Console) -> None:
        """Print everything that a person wants to know."""
        document = self.document()
        console.print(self.summary())
        console.print(
            f"  {self.finished} sessions, {self.tokens} tokens, {document['heals']} heals, "
            f"{self.recomputed} tokens ({document['replayed_bytes'] / 1e6:.1f} MB) replayed, "
            f"undisturbed step {document['median_step_s'] * 1000:.0f} ms"
        )
        for name, growth in document["growth_mb_per_hour"].items():
            console.print(f"  memory of {name}: {growth:+.0f} MB an hour")
        console.print(f"  {self.life_of_survivor()}", soft_wrap=True)
        for problem in self.problems:
            console.print(f"  {escape(problem)}", style="red", soft_wrap=True)

    def life_of_survivor(self) -> str:
        """The memory of the node that was never ended, every few minutes."""
        points = self.memory.get(self.survivor.name, [])
        by_minute = {int(age_s / 60): size for age_s, size in points}
        sizes = ", ".join(
            f"{size / 1e6:.0f} MB after {minute} min"
            for minute, size in by_minute.items()
            if minute % MINUTES_APART == 0
        )
        level_s = levels_off_after_s(points)
        levels = "still changes" if level_s is None else f"is level from {level_s / 60:.1f} min on"
        return f"{self.survivor.name} lived through everything: {sizes}; {levels}"

    def document(self) -> dict[str, Any]:
        """The same and more for programs."""
        return {
            "seed": self._plan.seed,
            "minutes": self._plan.minutes,
            "sessions_finished": self.finished,
            "tokens": self.tokens,
            "median_step_s": statistics.median(self.undisturbed_step_s or [0.0]),
            "heals": self._watched.heals,
            "replayed_tokens": self.recomputed,
            "replayed_bytes": self.recomputed * self._watched.token_bytes,
            "faults": [
                {
                    "kind": happened.kind,
                    "node": happened.node,
                    "at_s": happened.at_s,
                    "sessions": len(happened.sessions),
                    "stalls_s": happened.stalls_s,
                }
                for happened in self.happened
            ],
            "load_average": statistics.fmean(self.loads or [0.0]),
            "survivor": self.survivor.name,
            "growth_mb_per_hour": self.growth_mb_per_hour(),
            "memory": self.memory,
            "problems": self.problems,
        }


def run_soak(plan: SoakPlan, console: Console) -> bool:
    """Start a swarm, break it for the planned time, report; whether all went well."""
    background = BackgroundLoop("chaos")
    with console.status("what the model says undisturbed"):
        tasks = make_tasks(plan.model, PROMPT_LENGTHS, NEW_TOKENS)
        tasks += [task.variant(NEW_TOKENS, speculative=True) for task in tasks[2:4]]
        watched = Watched(plan.model, background, _nobody)
    soaks: list[Soak] = []

    async def run() -> None:
        soak = Soak(plan, arena, watched, tasks, console)
        soaks.append(soak)
        await watched.connect(arena.swarm.peers, arena.client_ip)
        try:
            with console.status("each prompt once, undisturbed"):
                await soak.warm_up()
            with Live(console=console, refresh_per_second=1, transient=True) as live:
                showing = asyncio.create_task(_show(live, soak, plan))
                await soak.run()
                showing.cancel()
        finally:
            await watched.close()

    try:
        with contextlib.ExitStack() as running:
            running.callback(background.close)
            with console.status("starting the swarm"):
                arena = running.enter_context(
                    Arena(
                        plan.model,
                        stages=plan.stages,
                        replicas=plan.replicas,
                        logs=plan.logs,
                        hosts=plan.hosts,
                    )
                )
            background.run(run())
    finally:  # a run that is interrupted says how far it came
        for soak in soaks:
            soak.report(console)
            if plan.json is not None:
                plan.json.write_text(json.dumps(soak.document(), indent=1))
    return not soaks[0].problems


async def _show(live: Live, soak: Soak, plan: SoakPlan) -> None:
    while True:
        minutes = (time.monotonic() - soak.started_s) / 60
        live.update(
            f"  {minutes:.1f} of {plan.minutes:g} min, {soak.finished} sessions, "
            f"{len(soak.happened)} faults, {len(soak.problems)} problems"
        )
        await asyncio.sleep(1.0)


def _nobody(event: Event) -> None:
    """Random faults listen to nothing."""
