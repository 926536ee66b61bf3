"""How long one hop's steps take, as it reports them. Pure."""

from __future__ import annotations

from collections import deque
from statistics import fmean, median

HISTORY_STEPS = 256
RECENT_STEPS = 8


class HopSpeed:
    """What one hop's steps took, queueing included: by step for single tokens, else by token."""

    def __init__(self) -> None:
        self._single_s: deque[float] = deque(maxlen=HISTORY_STEPS)
        self._per_token_s: deque[float] = deque(maxlen=HISTORY_STEPS)

    def add(self, tokens: int, duration_s: float) -> None:
        if tokens == 1:
            self._single_s.append(duration_s)
        else:
            self._per_token_s.append(duration_s / tokens)

    def expected_s(self, tokens: int) -> float | None:
        """For a step of so many tokens; None while there is nothing to compare with."""
        if tokens == 1 and self._single_s:
            return median(self._single_s)
        if self._per_token_s:
            return median(self._per_token_s) * tokens
        if self._single_s:
            return median(self._single_s) * tokens
        return None

    @property
    def slowdown(self) -> float:
        """The latest single-token steps relative to all of them; 1 while there are too few."""
        if len(self._single_s) < 4 * RECENT_STEPS:
            return 1.0
        return self.recent_s / median(self._single_s)

    @property
    def recent_s(self) -> float:
        """Mean of the latest single-token steps."""
        return fmean(list(self._single_s)[-RECENT_STEPS:])
