"""Which waiting steps run together next. A pure choice: no clock, no torch, no await.

Rules:

- Steps of one session run in the order in which they came, one per batch.
- A batch holds steps of one range of blocks.
- The first of the queue is always in the next batch: of the best priority, and among equals
  payers take turns, those first who were served least. With one payer that is the order of arrival.
- Every eighth batch begins with the step that waits longest: nothing starves.
- Short steps (decoding, verification of drafts) join first. Long steps (prefill) join only while
  the batch stays within the token budget, so that a short step waits for one chunk at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

SHORT_STEP_TOKENS = 16
MOST_PAYERS = 1024
OLDEST_FIRST_EVERY = 8


@dataclass(frozen=True, slots=True)
class WaitingStep:
    """One step in the queue, as far as the choice needs it."""

    session: Hashable
    blocks: tuple[int, int]
    tokens: int
    """Rows times new tokens per row."""
    payer: str = ""
    priority: int = 0
    """0 first."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    maximum_steps: int = 64
    maximum_tokens: int = 512


def service_order(
    waiting: Sequence[WaitingStep], served: Mapping[str, float] | None = None
) -> list[int]:
    """Indices into ``waiting`` (oldest first) in the order in which they are to be served.

    ``served``: tokens by payer so far.
    """
    if len({(step.payer, step.priority) for step in waiting}) <= 1:
        return list(range(len(waiting)))
    turns: Counter[str] = Counter()
    keys = []
    for step in waiting:
        keys.append((step.priority, turns[step.payer], (served or {}).get(step.payer, 0.0)))
        turns[step.payer] += 1
    return sorted(range(len(waiting)), key=lambda index: (keys[index], index))


def choose_batch(
    waiting: Sequence[WaitingStep],
    limits: BatchLimits,
    served: Mapping[str, float] | None = None,
    *,
    oldest_first: bool = False,
) -> list[int]:
    """Indices into ``waiting`` (oldest first) of the next batch, in ascending order."""
    if not waiting:
        return []
    order = service_order(waiting, served)
    if oldest_first:
        order.remove(0)
        order.insert(0, 0)
    first = order[0]
    blocks = waiting[first].blocks
    chosen = [first]
    sessions: set[Hashable] = {waiting[first].session}
    tokens = waiting[first].tokens
    later: list[int] = []
    for index in order[1:]:
        step = waiting[index]
        if step.session in sessions:
            continue
        # Also when it does not join: a later step of the same session must not overtake it.
        sessions.add(step.session)
        if step.blocks != blocks:
            continue
        if step.tokens > SHORT_STEP_TOKENS:
            later.append(index)
        elif len(chosen) < limits.maximum_steps:
            chosen.append(index)
            tokens += step.tokens
    for index in later:
        step = waiting[index]
        if len(chosen) < limits.maximum_steps and tokens + step.tokens <= limits.maximum_tokens:
            chosen.append(index)
            tokens += step.tokens
    return sorted(chosen)


class Turns:
    """Tokens served by payer, as far as it matters for who is next."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._batches = 0

    @property
    def is_for_the_oldest(self) -> bool:
        """Whether the next batch begins with the step that waits longest."""
        return self._batches % OLDEST_FIRST_EVERY == OLDEST_FIRST_EVERY - 1

    def served(self, waiting: Sequence[WaitingStep]) -> Mapping[str, float]:
        """Of those who wait; who comes anew begins with the least of them, not with nothing."""
        payers = {step.payer for step in waiting}
        if len(payers) < 2:
            return {}
        known = [self._served[payer] for payer in payers if payer in self._served]
        least = min(known, default=0.0)
        for payer in payers:
            self._served.setdefault(payer, least)
        if len(self._served) > MOST_PAYERS:
            self._served = {payer: self._served[payer] for payer in payers}
        return self._served

    def serve(self, steps: Sequence[WaitingStep]) -> None:
        """These go now."""
        self._batches += 1
        for step in steps:
            if step.payer in self._served:
                self._served[step.payer] += step.tokens
