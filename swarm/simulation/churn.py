"""How long volunteers stay, and how they go.

Measured swarms have heavy tails: most nodes that come go soon, most that are there stay. Lives are
Weibull distributed with shape 0.5 (volunteers) or 0.7 (labs), absences exponential; half of the
leaves are crashes that nobody announces.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

VOLUNTEER_SHAPE = 0.5
LAB_SHAPE = 0.7
LAB_FACTOR = 2.0
"""Labs stay so many times longer on average."""
CRASH_SHARE = 0.5
ABSENCE_SHARE = 0.35
"""Mean absence / mean life."""


@dataclass(frozen=True, slots=True)
class Churn:
    """How restless a swarm is."""

    name: str
    mean_life_s: float
    """Of a volunteer."""

    @property
    def mean_absence_s(self) -> float:
        return ABSENCE_SHARE * self.mean_life_s

    def presence(self, *, lab: bool) -> float:
        """Share of time that a volunteer is there."""
        life_s = self._mean_s(lab)
        return life_s / (life_s + self.mean_absence_s)

    def life_s(self, dice: random.Random, *, lab: bool) -> float:
        """How long a volunteer that comes now stays."""
        shape = _shape(lab)
        scale_s = self._mean_s(lab) / math.gamma(1 + 1 / shape)
        return dice.weibullvariate(scale_s, shape)

    def running_life_s(self, dice: random.Random, *, lab: bool) -> tuple[float, float]:
        """Of a volunteer that is there now: for how long it has been, and how long it stays.

        Long lives are met more often than they begin.
        """
        shape = _shape(lab)
        scale_s = self._mean_s(lab) / math.gamma(1 + 1 / shape)
        whole_s = scale_s * dice.gammavariate(1 + 1 / shape, 1.0) ** (1 / shape)
        age_s = dice.random() * whole_s
        return age_s, whole_s - age_s

    def absence_s(self, dice: random.Random) -> float:
        return dice.expovariate(1 / self.mean_absence_s)

    def is_crash(self, dice: random.Random) -> bool:
        return dice.random() < CRASH_SHARE

    def _mean_s(self, lab: bool) -> float:
        return self.mean_life_s * (LAB_FACTOR if lab else 1.0)


def _shape(lab: bool) -> float:
    return LAB_SHAPE if lab else VOLUNTEER_SHAPE


NORMAL = Churn("normal", 5.0 * 3600)
HEAVY = Churn("heavy", 1.7 * 3600)
CHURNS = {churn.name: churn for churn in (NORMAL, HEAVY)}
