"""Which waiting steps run together next. A pure choice: no clock, no torch, no await.

Rules:

- Steps of one session run in the order in which they came, one per batch.
- A batch holds steps of one range of blocks.
- The longest waiting step is always in the next batch: nothing starves.
- Short steps (decoding, verification of drafts) join first. Long steps (prefill) join only while
  the batch stays within the token budget, so that a short step waits for one chunk at most.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

SHORT_STEP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class WaitingStep:
    """One step in the queue, as far as the choice needs it."""

    session: Hashable
    blocks: tuple[int, int]
    tokens: int
    """Rows times new tokens per row."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    maximum_steps: int = 64
    maximum_tokens: int = 512


def choose_batch(waiting: Sequence[WaitingStep], limits: BatchLimits) -> list[int]:
    """Indices into ``waiting`` (oldest first) of the next batch, in ascending order."""
    if not waiting:
        return []
    blocks = waiting[0].blocks
    chosen = [0]
    sessions: set[Hashable] = {waiting[0].session}
    tokens = waiting[0].tokens
    later: list[int] = []
    for index, step in enumerate(waiting[1:], start=1):
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
