"""Nodes of which one did wrong, and a client cannot tell which; whom to avoid for it. Pure.

A hop says that the one before sent it rubbish: that one did, or it lies itself. Frames carry no
signatures, so nothing proves which. Rules, by which who did it is found all the same:

1. A quarrel makes all who may be to blame suspect: a few seconds, longer each time the same ones
   quarrel again, never long.
2. Who is the only one in common of several quarrels explains them, and is avoided for long; the
   others are suspects no more. Who lies meets new opponents, who is lied about meets few.
3. Whoever explains most is looked at first, so that one who met two culprits is not taken for one.

It belongs to one client and is never shared with others, like bans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

from swarm.protocol.identity import PeerId

SHORTEST_S = 5.0
LONGEST_SUSPICION_S = 60.0
AVOIDED_S = 600.0
"""So long after the latest quarrel that it explains."""
MEMORY_S = 3600.0
MOST_QUARRELS = 256
"""Of more, those that are longest ago are forgotten."""
QUARRELS_TO_EXPLAIN = 2
MOST_APART = 16
"""Of quarrels among more no pairs are kept."""

Suspects = frozenset[PeerId]
Key = TypeVar("Key")


@dataclass(slots=True)
class _Quarrel:
    times: int
    latest_s: float

    @property
    def suspicious_until_s(self) -> float:
        length_s: float = SHORTEST_S * 2.0 ** min(self.times - 1, 16)
        return self.latest_s + min(length_s, LONGEST_SUSPICION_S)


class Quarrels:
    """The quarrels that one client saw."""

    def __init__(self) -> None:
        self._quarrels: dict[Suspects, _Quarrel] = {}
        self._avoided_until_s: dict[PeerId, float] = {}
        self._suspect_until_s: dict[PeerId, float] = {}
        self._apart_until_s: dict[Suspects, float] = {}

    def add(self, peers: Iterable[PeerId], now_s: float) -> None:
        """One of ``peers``, two at least, did wrong."""
        suspects = frozenset(peers)
        if len(suspects) < 2:
            raise ValueError("one alone has nobody to quarrel with")
        before = self._quarrels.pop(suspects, None)
        times = 1 if before is None else before.times
        if before is not None and now_s >= before.suspicious_until_s:
            times += 1  # more while it lasts have the same cause
        self._quarrels[suspects] = _Quarrel(times, now_s)  # the latest one at the end
        for old in list(self._quarrels)[:-MOST_QUARRELS]:
            del self._quarrels[old]
        self._judge(now_s)

    def is_avoided(self, peer: PeerId, now_s: float) -> bool:
        """Whether to look elsewhere first."""
        until_s = max(self._avoided_until_s.get(peer, 0.0), self._suspect_until_s.get(peer, 0.0))
        return now_s < until_s

    def explains_quarrels(self, peer: PeerId, now_s: float) -> bool:
        """Whether it is avoided for what it did, and not as one who may have done it."""
        return now_s < self._avoided_until_s.get(peer, 0.0)

    def apart(self, now_s: float) -> set[Suspects]:
        """Pairs that had better not be neighbours again: with others it shows who it was."""
        return {pair for pair, until_s in self._apart_until_s.items() if now_s < until_s}

    def _remembered(self, now_s: float) -> Iterator[Suspects]:
        for suspects, quarrel in self._quarrels.items():
            if now_s < quarrel.latest_s + MEMORY_S:
                yield suspects

    def _judge(self, now_s: float) -> None:
        """Who explains what, as few peers as do; those left over are suspects."""
        open_quarrels = set(self._remembered(now_s))
        self._avoided_until_s, self._suspect_until_s, self._apart_until_s = {}, {}, {}
        while True:
            explained = _best_explanation(open_quarrels)
            if explained is None:
                break
            peer, quarrels = explained
            latest_s = max(self._quarrels[suspects].latest_s for suspects in quarrels)
            self._avoided_until_s[peer] = latest_s + AVOIDED_S
            open_quarrels -= quarrels
        for suspects in open_quarrels:
            quarrel = self._quarrels[suspects]
            for peer in suspects:
                _extend(self._suspect_until_s, peer, quarrel.suspicious_until_s)
            if len(suspects) <= MOST_APART:
                for pair in combinations(sorted(suspects), 2):
                    _extend(self._apart_until_s, frozenset(pair), quarrel.latest_s + MEMORY_S)


def _extend(until_s: dict[Key, float], key: Key, moment_s: float) -> None:
    until_s[key] = max(until_s.get(key, 0.0), moment_s)


def _best_explanation(quarrels: set[Suspects]) -> tuple[PeerId, set[Suspects]] | None:
    """The peer in most of the quarrels that is the only one in all of these, and they."""
    counts = Counter(peer for suspects in quarrels for peer in suspects)
    for peer in sorted(counts, key=lambda peer: (-counts[peer], peer)):
        if counts[peer] < QUARRELS_TO_EXPLAIN:
            return None
        involved = {suspects for suspects in quarrels if peer in suspects}
        if frozenset.intersection(*involved) == {peer}:
            return peer, involved
    return None
