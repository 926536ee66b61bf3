"""How unlikely a silence is: the phi accrual failure detector. Pure.

After Hayashibara and others, "The phi accrual failure detector" (SRDS 2004): from the intervals
between signs of life follows how probable it is that the next one is merely late. Phi 1 means one
late sign in ten, phi 5 one in a hundred thousand. It is a suspicion, cheap and early; a verdict
needs a second opinion, since on a lossy link every lost packet looks like this.
"""

from __future__ import annotations

from collections import deque
from math import erfc, log10, sqrt
from statistics import fmean, pstdev

WINDOW = 32
LARGEST_PHI = 300.0


class PhiAccrual:
    """Signs of life of one peer that is asked for one about every ``interval_s``."""

    def __init__(self, interval_s: float, now_s: float, *, least_deviation_s: float) -> None:
        """``least_deviation_s`` keeps a very regular peer from being suspected for a hiccup."""
        self._least_deviation_s = least_deviation_s
        # As if there had been some already: one measurement says nothing.
        self._intervals_s = deque([interval_s, 1.5 * interval_s], maxlen=WINDOW)
        self._last_answer_s = self._last_heard_s = now_s

    def answered(self, now_s: float) -> None:
        """The sign of life that was asked for arrived."""
        self._intervals_s.append(now_s - self._last_answer_s)
        self._last_answer_s = self._last_heard_s = now_s

    def heard(self, now_s: float) -> None:
        """Anything else arrived: the peer is alive, but says nothing about when answers come."""
        self._last_heard_s = now_s

    def phi(self, now_s: float) -> float:
        """Minus the logarithm of the probability that the next sign is just late."""
        mean_s = fmean(self._intervals_s)
        deviation_s = max(pstdev(self._intervals_s), self._least_deviation_s)
        later = 0.5 * erfc((now_s - self._last_heard_s - mean_s) / (deviation_s * sqrt(2)))
        return -log10(later) if later > 10**-LARGEST_PHI else LARGEST_PHI
