from __future__ import annotations

import pytest

from swarm.client import quarrels
from swarm.client.quarrels import (
    AVOIDED_S,
    LONGEST_SUSPICION_S,
    MEMORY_S,
    SHORTEST_S,
    Quarrels,
)
from swarm.protocol.identity import PeerId

A, B, C, D, E, F = (PeerId(name) for name in "abcdef")


def avoided(seen: Quarrels, now_s: float) -> set[PeerId]:
    return {peer for peer in (A, B, C, D, E, F) if seen.is_avoided(peer, now_s)}


def guilty(seen: Quarrels, now_s: float) -> set[PeerId]:
    return {peer for peer in (A, B, C, D, E, F) if seen.explains_quarrels(peer, now_s)}


def test_both_of_a_pair_are_suspects_for_a_moment() -> None:
    seen = Quarrels()
    seen.add([A, B], 100.0)
    assert avoided(seen, 100.0 + SHORTEST_S - 0.1) == {A, B}
    assert avoided(seen, 100.0 + SHORTEST_S) == set()
    assert guilty(seen, 100.0) == set()
    assert seen.apart(100.0 + MEMORY_S - 1) == {frozenset((A, B))}
    assert seen.apart(100.0 + MEMORY_S) == set()


def test_who_meets_another_opponent_explains_both_and_clears_them() -> None:
    seen = Quarrels()
    seen.add([A, B], 0.0)
    seen.add([C, A], 1.0)
    assert avoided(seen, 1.0) == guilty(seen, 1.0) == {A}
    assert guilty(seen, AVOIDED_S) == {A}
    assert avoided(seen, 1.0 + AVOIDED_S) == set()


def test_the_first_quarrel_after_the_time_is_served_is_enough() -> None:
    seen = Quarrels()
    seen.add([A, B], 0.0)
    seen.add([A, C], 1.0)
    seen.add([A, B], 700.0)
    assert guilty(seen, 700.0 + AVOIDED_S - 1) == {A}


def test_the_same_two_over_and_over_are_suspects_for_longer_but_not_for_long() -> None:
    seen, now_s = Quarrels(), 0.0
    for _ in range(12):
        seen.add([A, B], now_s)
        begun_s = now_s
        while seen.is_avoided(A, now_s):
            now_s += SHORTEST_S
        assert now_s - begun_s <= LONGEST_SUSPICION_S
    assert now_s - begun_s == LONGEST_SUSPICION_S
    assert guilty(seen, begun_s) == set()


def test_one_that_met_two_culprits_is_cleared_by_their_next_deeds() -> None:
    seen = Quarrels()
    seen.add([A, B], 0.0)
    seen.add([C, B], 1.0)
    assert guilty(seen, 1.0) == {B}  # the simplest explanation so far
    seen.add([A, D], 2.0)
    seen.add([A, E], 3.0)
    seen.add([C, F], 4.0)
    assert guilty(seen, 4.0) == {A, C}
    assert avoided(seen, 4.0) == {A, C}


def test_whole_chains_are_told_apart_by_what_they_have_in_common() -> None:
    seen = Quarrels()
    seen.add([A, B, C], 0.0)
    assert seen.apart(0.0) == {frozenset(pair) for pair in ((A, B), (A, C), (B, C))}
    seen.add([A, B, D], 1.0)
    assert guilty(seen, 1.0) == set()  # it may be either of two
    seen.add([A, E, F], 2.0)
    assert guilty(seen, 2.0) == {A}


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarrels, "MOST_QUARRELS", 10)
    seen = Quarrels()
    for number in range(100):
        seen.add([PeerId(f"one {number}"), PeerId(f"other {number}")], number / 100)
    assert len(seen.apart(1.0)) == 10
    assert seen.is_avoided(PeerId("one 99"), 1.0)


def test_nobody_quarrels_alone() -> None:
    with pytest.raises(ValueError, match="nobody to quarrel with"):
        Quarrels().add([A, A], 0.0)
