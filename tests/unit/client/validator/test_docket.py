"""Whom a validator looks at next, and what it says of what it found."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from swarm.client.validator.docket import (
    MISSES,
    REST_S,
    RIGHT_FOR_RECHECK,
    RIGHT_FOR_SUSPECT,
    Case,
    Docket,
    Known,
    Target,
)
from swarm.ledger.reputation import Found
from swarm.protocol.identity import PeerId

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
NOW = 1_800_000_000.0


def found(docket: Docket, node: PeerId, *findings: Found) -> list[str | None]:
    return [docket.found(node, each, NOW, is_measured=True) for each in findings]


def target(docket: Docket, *announced: PeerId, now: float = NOW) -> Target | None:
    return docket.next_target(announced, now, random.Random(1))


def test_nodes_are_drawn_the_more_likely_the_longer_they_were_not_met() -> None:
    docket = Docket({A: Known(NOW - 60), B: Known(NOW - 600)})
    dice = random.Random(7)
    drawn = Counter(docket.next_target((A, B, C), NOW, dice) for _ in range(4000))
    of = {each.node: count for each, count in drawn.items() if each is not None}
    assert of[C] > 20 * of[B]  # never met: as if for a day
    assert of[B] > 3 * of[A] > 0  # and the one just met is not safe
    assert docket.next_target((), NOW, dice) is None


def test_one_failed_segment_makes_a_suspect_and_two_are_enough() -> None:
    docket = Docket()
    assert found(docket, A, Found.FAILED) == ["failed"]
    assert target(docket, A, B, C) == Target(A, Case.SUSPECT)
    assert docket.open_cases((A, B, C), NOW) == [A]
    assert found(docket, A, Found.PASSED, Found.FAILED) == ["passed", "failed"]
    assert docket.of(A).case == Case.ACCUSED.value
    assert docket.open_cases((A, B, C), NOW) == []
    drawn = {docket.next_target((A, B), NOW, random.Random(seed)) for seed in range(50)}
    assert drawn == {Target(B)}  # nothing more is asked of it
    assert docket.told == [A]
    docket.decided(A)
    assert docket.told == []
    assert docket.of(A).case == ""


def test_a_suspect_that_is_right_often_enough_is_one_like_others() -> None:
    docket = Docket()
    found(docket, A, Found.FAILED, *[Found.PASSED] * (RIGHT_FOR_SUSPECT - 1))
    assert docket.open_cases((A, B, C), NOW) == [A]
    assert found(docket, A, Found.PASSED) == ["passed"]
    assert docket.open_cases((A, B, C), NOW) == []
    # What it failed then does not count with what it fails now.
    assert found(docket, A, Found.FAILED) == ["failed"]
    assert docket.of(A).case == Case.SUSPECT.value


@pytest.mark.parametrize("doubt", [Found.DISPUTED, Found.FAILED])
def test_what_was_not_measured_is_no_verdict_but_a_reason_to_look_again(doubt: Found) -> None:
    docket = Docket()
    assert docket.found(A, doubt, NOW, is_measured=False) is None
    assert target(docket, A, B) == Target(A, Case.SUSPECT)
    assert docket.of(A).failed == 0
    assert found(docket, A, Found.FAILED) == ["failed"]
    assert docket.of(A).case == Case.SUSPECT.value  # the first that can be shown to others
    assert docket.found(B, Found.REFUSED, NOW, is_measured=False) is None
    assert docket.found(B, Found.PASSED, NOW, is_measured=False) is None
    assert docket.of(B).case == ""


def test_what_others_accuse_is_confirmed_by_two_segments_of_our_own() -> None:
    docket = Docket()
    assert docket.rechecks([A]) == [A]
    assert docket.rechecks([A]) == []
    assert target(docket, A, B) == Target(A, Case.RECHECK)
    assert found(docket, A, Found.PASSED, Found.FAILED, Found.FAILED) == [
        "passed",
        "failed",
        "failed",
    ]
    assert docket.of(A).case == Case.ACCUSED.value
    assert docket.rechecks([A]) == []  # it has our word
    assert docket.of(A).case == Case.ACCUSED.value


def test_what_is_right_ten_times_was_not_reproduced() -> None:
    docket = Docket()
    docket.rechecks([A])
    said = found(docket, A, *[Found.PASSED] * RIGHT_FOR_RECHECK)
    assert said == ["passed"] * (RIGHT_FOR_RECHECK - 1) + ["not_reproduced"]
    # It takes another organisation too: until it is free nothing more is asked of it.
    assert docket.of(A).case == Case.CLEARED.value
    assert docket.rechecks([A]) == []
    assert target(docket, A, B) == Target(B)
    assert docket.told == [A]
    # What it fails meanwhile is told like anybody's.
    assert found(docket, A, Found.PASSED, Found.FAILED, Found.FAILED) == [
        "passed",
        "failed",
        "failed",
    ]
    assert docket.of(A).case == Case.ACCUSED.value
    docket.decided(A)
    assert docket.of(A).case == ""
    assert docket.rechecks([A]) == [A]  # kept out once more: looked at once more
    # One that failed once is neither cleared nor confirmed by us.
    docket.rechecks([B])
    said = found(docket, B, Found.FAILED, *[Found.PASSED] * RIGHT_FOR_RECHECK)
    assert said == ["failed"] + ["passed"] * RIGHT_FOR_RECHECK
    assert docket.open_cases((A, B, C), NOW) == []
    assert docket.rechecks([B]) == []


def test_our_own_failed_segment_counts_when_others_accuse_too() -> None:
    docket = Docket()
    found(docket, A, Found.FAILED)
    assert docket.rechecks([A]) == [A]
    assert found(docket, A, Found.FAILED) == ["failed"]
    assert docket.of(A).case == Case.ACCUSED.value


def test_a_recheck_ends_when_the_operator_has_decided() -> None:
    docket = Docket()
    docket.rechecks([A, B])
    assert docket.rechecks([B]) == [A]
    assert docket.open_cases((A, B, C), NOW) == [B]


def test_only_cases_are_looked_at_if_that_is_wanted() -> None:
    docket = Docket()
    assert docket.next_target((A, B), NOW, random.Random(1), only_cases=True) is None
    docket.rechecks([B])
    chosen = docket.next_target((A, B), NOW, random.Random(1), only_cases=True)
    assert chosen == Target(B, Case.RECHECK)
    assert docket.next_target((A,), NOW, random.Random(1), only_cases=True) is None  # not there


def test_a_case_that_cannot_be_met_does_not_hold_up_everything() -> None:
    docket = Docket()
    docket.rechecks([A])
    for _ in range(MISSES):
        assert target(docket, A, B) == Target(A, Case.RECHECK)
        docket.missed(A, NOW)
    assert target(docket, A, B) == Target(B)
    assert docket.open_cases((A, B), NOW) == []
    assert docket.open_cases((A, B), NOW + REST_S) == [A]
    assert docket.open_cases((B,), NOW + REST_S) == []  # it is not there: nothing hurries
    assert target(docket, A, B, now=NOW + REST_S) == Target(A, Case.RECHECK)


def test_it_is_kept_as_text() -> None:
    docket = Docket()
    found(docket, A, Found.FAILED)
    again = Docket({A: Known.from_json(docket.of(A).to_json())})
    assert found(again, A, Found.FAILED) == ["failed"]
    assert again.of(A).case == Case.ACCUSED.value
    with pytest.raises(ValueError, match="no state"):
        Known.from_json('{"anything": 1}')
