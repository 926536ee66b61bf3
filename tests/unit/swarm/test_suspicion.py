"""The phi accrual detector against the definition."""

from __future__ import annotations

from math import erfc, log10, sqrt
from random import Random
from statistics import fmean, pstdev

import pytest

from swarm.suspicion import LARGEST_PHI, WINDOW, PhiAccrual


def test_phi_is_the_normal_tail_of_the_silence() -> None:
    random = Random(1)
    intervals_s = [random.gauss(0.5, 0.2) for _ in range(WINDOW)]
    detector = PhiAccrual(0.5, 0.0, least_deviation_s=0.01)
    now_s = 0.0
    for interval_s in intervals_s:
        now_s += interval_s
        detector.answered(now_s)
    for silence_s in (0.1, 0.5, 0.9, 1.3):
        tail = 0.5 * erfc((silence_s - fmean(intervals_s)) / (pstdev(intervals_s) * sqrt(2)))
        assert detector.phi(now_s + silence_s) == pytest.approx(-log10(tail))


def test_a_peer_is_suspected_within_a_few_periods_and_only_when_it_is_silent() -> None:
    detector = PhiAccrual(0.4, 0.0, least_deviation_s=0.1)
    now_s = 0.0
    for _ in range(100):
        now_s += 0.4
        assert detector.phi(now_s) < 1
        detector.answered(now_s)
    assert detector.phi(now_s + 0.7) < 5 < detector.phi(now_s + 1.0)
    detector.heard(now_s + 0.9)
    assert detector.phi(now_s + 1.0) < 1, "anything it sends is a sign of life"
    assert detector.phi(now_s + 1e6) == LARGEST_PHI


def test_an_irregular_peer_gets_more_time() -> None:
    regular, irregular = (PhiAccrual(0.5, 0.0, least_deviation_s=0.01) for _ in range(2))
    random = Random(2)
    regular_s = irregular_s = 0.0
    for _ in range(50):
        regular_s += 0.5
        irregular_s += random.choice((0.1, 0.9))
        regular.answered(regular_s)
        irregular.answered(irregular_s)
    assert regular.phi(regular_s + 1.2) > 5 > irregular.phi(irregular_s + 1.2)
