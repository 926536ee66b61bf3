"""What one key may use: requests and tokens per minute, answers at a time; pure.

Each gateway counts for itself: behind one name, ``n`` gateways grant up to ``n`` times as much. In
exchange they need no shared state. What somebody may use in all is the ledger's matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Of one key."""

    requests_per_minute: int
    tokens_per_minute: int
    answers: int
    """In the making at a time."""


@dataclass(slots=True)
class Allowance:
    """A bucket that fills evenly within a minute, and may be overdrawn by one use."""

    per_minute: float
    level: float
    at_s: float

    def wait_s(self, now_s: float, needed: float = 1.0) -> float:
        """How long until ``needed`` is there; 0 when it is."""
        self._fill(now_s)
        missing = min(needed, self.per_minute) - self.level
        return max(0.0, missing / self.per_minute * 60)

    def take(self, now_s: float, amount: float) -> None:
        """Use ``amount``, or give it back when negative."""
        self._fill(now_s)
        self.level = min(self.per_minute, self.level - amount)

    def _fill(self, now_s: float) -> None:
        self.level = min(
            self.per_minute, self.level + max(0.0, now_s - self.at_s) * self.per_minute / 60
        )
        self.at_s = max(self.at_s, now_s)


@dataclass(slots=True)
class Usage:
    """What a key has used lately."""

    limits: KeyLimits
    requests: Allowance
    tokens: Allowance
    answers: int = 0


@dataclass(slots=True)
class Usages:
    """Of all keys seen lately; those whose allowances are full again are forgotten."""

    _usages: dict[str, Usage] = field(default_factory=dict)
    _swept_s: float = 0.0

    def of(self, key_id: str, limits: KeyLimits, now_s: float) -> Usage:
        if now_s - self._swept_s > 120:
            self._sweep(now_s)
        usage = self._usages.get(key_id)
        if usage is None or usage.limits != limits:
            answers = usage.answers if usage is not None else 0
            usage = self._usages[key_id] = Usage(
                limits,
                _full(limits.requests_per_minute, now_s),
                _full(limits.tokens_per_minute, now_s),
                answers,
            )
        return usage

    def _sweep(self, now_s: float) -> None:
        self._swept_s = now_s
        self._usages = {
            key_id: usage
            for key_id, usage in self._usages.items()
            if usage.answers or now_s - max(usage.requests.at_s, usage.tokens.at_s) < 60
        }


def _full(per_minute: float, now_s: float) -> Allowance:
    return Allowance(per_minute, per_minute, now_s)
