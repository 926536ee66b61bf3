"""How long one hop's steps take: by its own word, and by the round trips of our pings. Pure."""

from __future__ import annotations

from collections import deque
from math import inf
from statistics import median

HISTORY_STEPS = 256
RECENT_STEPS = 8
BEST_STEPS = 4
"""So many in a row make the best time: one alone may have been luck. Of the history only, since a
step takes the longer the more positions are before it."""
RECENT_ROUND_TRIPS = 3
"""A longer round trip counts when so many in a row are longer: one alone may have had to wait."""


class HopSpeed:
    """What one hop's steps took, queueing included: by step for single tokens, else by token.

    What single tokens take of late, and what that is compared with, have the hop's round trip
    added: what reaches it late, or leaves it late, is slow as well.
    """

    def __init__(self, promised_s: float = 0.0) -> None:
        """``promised_s``: for one token, by what the hop was chosen for; 0 where that is unknown.

        Without the round trip.
        """
        self._promised_s = promised_s
        self._single_s: deque[float] = deque(maxlen=HISTORY_STEPS)
        self._per_token_s: deque[float] = deque(maxlen=HISTORY_STEPS)
        self._runs_s: deque[float] = deque(maxlen=HISTORY_STEPS)
        self._round_trips_s: deque[float] = deque(maxlen=RECENT_ROUND_TRIPS)
        self._shortest_trip_s = inf

    def add(self, tokens: int, duration_s: float) -> None:
        if tokens > 1:
            self._per_token_s.append(duration_s / tokens)
            return
        self._single_s.append(duration_s)
        if len(self._single_s) >= BEST_STEPS:
            self._runs_s.append(median(list(self._single_s)[-BEST_STEPS:]))

    def add_round_trip(self, round_trip_s: float) -> None:
        self._shortest_trip_s = min(self._shortest_trip_s, round_trip_s)
        self._round_trips_s.append(round_trip_s)

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
    def recent_s(self) -> float:
        """What a single token takes of late; 0 while there were too few."""
        if len(self._single_s) < RECENT_STEPS:
            return 0.0
        trip_s = min(self._round_trips_s, default=0.0)
        return median(list(self._single_s)[-RECENT_STEPS:]) + trip_s

    @property
    def slowdown(self) -> float:
        """How much longer single tokens take of late than at their best; 1 while unknown."""
        return _ratio(self.recent_s, self._best_s)

    @property
    def overrun(self) -> float:
        """How much longer they take of late than was promised; 1 while unknown."""
        return _ratio(self.recent_s, self._promised_with_trip_s)

    @property
    def overrun_at_best(self) -> float:
        """How much longer they took at their best than was promised; 1 while unknown."""
        return _ratio(self._best_s, self._promised_with_trip_s)

    @property
    def _best_s(self) -> float:
        return min(self._runs_s) + self._usual_trip_s if self._runs_s else 0.0

    @property
    def _promised_with_trip_s(self) -> float:
        return self._promised_s + self._usual_trip_s if self._promised_s else 0.0

    @property
    def _usual_trip_s(self) -> float:
        return self._shortest_trip_s if self._round_trips_s else 0.0


def _ratio(one_s: float, other_s: float) -> float:
    return one_s / other_s if one_s and other_s else 1.0
