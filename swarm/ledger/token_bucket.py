"""Token buckets for many users, bounded in number. Pure: time is passed in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

MOST_BUCKETS = 4096


class TokenBuckets:
    """Each key may take ``burst`` at once and ``per_s`` in the long run.

    When there are too many keys the one that came longest ago is forgotten: it had the time to
    fill up again, or its place is taken by so many others that nobody gets much.
    """

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def take(self, key: Hashable, amount: float, now_s: float) -> bool:
        """Whether ``amount`` was there; if not, nothing is taken.

        An amount beyond ``burst`` is taken from a full bucket, which then owes it.
        """
        left, seen_s = self._buckets.pop(key, (self._burst, now_s))
        left = min(self._burst, left + (now_s - seen_s) * self._per_s)
        taken = left >= min(amount, self._burst)
        self._buckets[key] = (left - amount if taken else left, now_s)
        while len(self._buckets) > MOST_BUCKETS:
            self._buckets.popitem(last=False)
        return taken
