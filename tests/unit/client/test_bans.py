from __future__ import annotations

import pytest

from swarm.client import bans
from swarm.client.bans import LONGEST_S, SHORTEST_S, Bans, FailureKind
from swarm.protocol.identity import PeerId

ONE, OTHER = PeerId("one"), PeerId("other")


def ban_lengths(failures: Bans, kind: FailureKind, count: int) -> list[float]:
    """Each failure comes right after the ban before."""
    now_s, lengths = 0.0, []
    for _ in range(count):
        failures.failed(ONE, kind, now_s)
        length_s = 0.0
        while failures.reason(ONE, now_s + length_s) is not None:
            length_s += SHORTEST_S
        lengths.append(length_s)
        now_s += length_s
    return lengths


def test_bans_double_up_to_a_limit() -> None:
    assert ban_lengths(Bans(), FailureKind.BROKEN, 9) == [5, 10, 20, 40, 80, 160, 320, 600, 600]


def test_repetitions_while_a_ban_lasts_are_one_failure() -> None:
    failures = Bans()
    for _ in range(100):
        failures.failed(ONE, FailureKind.SILENT, 0.0)
    assert failures.reason(ONE, SHORTEST_S - 0.1) is FailureKind.SILENT
    assert failures.reason(ONE, SHORTEST_S) is None


def test_kinds_and_peers_are_counted_apart() -> None:
    failures = Bans()
    failures.failed(ONE, FailureKind.SILENT, 0.0)
    failures.failed(ONE, FailureKind.SILENT, 5.0)
    failures.failed(ONE, FailureKind.BROKEN, 14.0)
    assert failures.reason(ONE, 14.5) is FailureKind.BROKEN  # it lasts to 19, the other one to 15
    assert failures.reason(ONE, 18.9) is FailureKind.BROKEN
    assert failures.reason(ONE, 19.0) is None
    assert failures.reason(OTHER, 0.0) is None


def test_one_success_clears_all() -> None:
    failures = Bans()
    assert ban_lengths(failures, FailureKind.BROKEN, 3)[-1] == 4 * SHORTEST_S
    failures.failed(ONE, FailureKind.SLOW, 100.0)
    failures.succeeded(ONE)
    assert failures.reason(ONE, 100.0) is None
    failures.failed(ONE, FailureKind.BROKEN, 100.0)
    assert failures.reason(ONE, 100.0 + SHORTEST_S) is None


def test_an_answer_clears_silence_only() -> None:
    failures = Bans()
    for kind in (FailureKind.SILENT, FailureKind.UNREACHABLE):
        failures.failed(ONE, kind, 0.0)
    failures.answered(ONE)
    assert failures.reason(ONE, 0.0) is None
    failures.failed(ONE, FailureKind.SILENT, 1.0)
    failures.failed(ONE, FailureKind.BROKEN, 1.0)
    failures.answered(ONE)
    assert failures.reason(ONE, 1.0) is FailureKind.BROKEN


def test_old_failures_are_forgotten() -> None:
    failures = Bans()
    ban_lengths(failures, FailureKind.BROKEN, 4)  # the last ban ends after 75 s
    failures.failed(ONE, FailureKind.BROKEN, 75.0 + LONGEST_S)
    assert failures.reason(ONE, 75.0 + LONGEST_S + SHORTEST_S) is None


def test_the_number_of_peers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bans, "MOST_PEERS", 10)
    failures = Bans()
    for number in range(100):
        failures.failed(PeerId(str(number)), FailureKind.UNREACHABLE, number / 100)
    banned = [number for number in range(100) if failures.reason(PeerId(str(number)), 1.0)]
    assert 5 <= len(banned) <= 10
    assert 99 in banned
