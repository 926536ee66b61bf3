"""One swarm of real processes for all tests here: three spans of the demo model, two nodes each."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from scripts.faults.answers import Task
from scripts.faults.arena import Arena
from scripts.faults.cases import CaseRunner, Outcome
from scripts.faults.moments import Case
from scripts.faults.progress import Event
from scripts.faults.sessions import Watched, make_tasks
from swarm.client.background import BackgroundLoop

PROMPT_TOKENS = 64
NEW_TOKENS = 16
SPECULATED_TOKENS = 32
PATIENT_TOKENS = 64

T = TypeVar("T")


@dataclass
class Chaos:
    """The swarm, a client that tells what it does, and the loop on which both live."""

    arena: Arena
    watched: Watched
    cases: CaseRunner
    plain: Task
    patient: Task
    """The same with a longer answer."""
    background: BackgroundLoop

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the client's loop and wait."""
        return self.background.run(work)

    def strike(self, case: Case, task: Task | None = None) -> Outcome:
        """One session with one fault; all is as it should be, or the test fails."""
        outcome = self.run(self.cases.run(case, task))
        assert outcome.problems == [], case.label
        return outcome


@pytest.fixture(scope="module")
def chaos(smollm2_path: Path) -> Iterator[Chaos]:
    (patient,) = make_tasks(smollm2_path, [PROMPT_TOKENS], PATIENT_TOKENS)
    plain = patient.variant(NEW_TOKENS)
    looked_up = patient.variant(SPECULATED_TOKENS, speculative=True)
    background = BackgroundLoop("chaos")
    hearing: list[CaseRunner] = []

    def hear(event: Event) -> None:
        for cases in hearing:
            cases.hear(event)

    watched = Watched(smollm2_path, background, hear)
    try:
        with Arena(smollm2_path) as arena:
            cases = CaseRunner(arena, watched, plain, looked_up)
            hearing.append(cases)
            background.run(watched.connect(arena.swarm.peers))
            try:
                assert background.run(cases.warm_up()) == []
                yield Chaos(arena, watched, cases, plain, patient, background)
                assert background.run(cases.leftovers()) == []
            finally:
                background.run(_quietly_mended(arena))
                background.run(watched.close())
    finally:
        background.close()


async def _quietly_mended(arena: Arena) -> None:
    await asyncio.gather(arena.mended(), return_exceptions=True)
