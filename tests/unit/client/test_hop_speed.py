"""How long a hop's steps take, compared with its best and with what was promised."""

from __future__ import annotations

import pytest

from swarm.client.hop_speed import BEST_STEPS, RECENT_STEPS, HopSpeed


def speed_of(
    *singles_s: float, promised_s: float = 0.0, trips_s: tuple[float, ...] = ()
) -> HopSpeed:
    speed = HopSpeed(promised_s)
    for trip_s in trips_s:
        speed.add_round_trip(trip_s)
    for duration_s in singles_s:
        speed.add(1, duration_s)
    return speed


def test_nothing_is_said_of_few_steps() -> None:
    speed = speed_of(*[0.1] * (RECENT_STEPS - 2), 9.0, promised_s=0.01)
    assert speed.recent_s == 0.0
    assert speed.slowdown == speed.overrun == 1.0
    assert speed_of().expected_s(1) is None


def test_it_is_compared_with_its_best_steps_long_after_it_became_slow() -> None:
    speed = speed_of(*[0.1] * BEST_STEPS, *[0.5] * 200)
    assert speed.slowdown == pytest.approx(5.0)


def test_what_takes_longer_bit_by_bit_did_not_become_slow() -> None:
    """As attention does over a long answer."""
    speed = speed_of(*(0.1 + step / 5000 for step in range(4000)))
    assert speed.recent_s == pytest.approx(0.9, rel=0.01)
    assert speed.slowdown < 1.1


def test_one_step_says_little() -> None:
    lucky = speed_of(*[0.1] * 4, 0.001, *[0.1] * 20)
    assert lucky.slowdown == pytest.approx(1.0)
    unlucky = speed_of(*[0.1] * 20, 9.0)
    assert unlucky.slowdown == pytest.approx(1.0)


def test_it_is_compared_with_what_was_promised() -> None:
    assert speed_of(*[0.5] * 8, promised_s=0.1).overrun == pytest.approx(5.0)
    assert speed_of(*[0.05] * 8, promised_s=0.1).overrun == pytest.approx(0.5)
    became_slow = speed_of(*[0.2] * 8, *[0.8] * 8, promised_s=0.1)
    assert became_slow.overrun == pytest.approx(8.0)
    assert became_slow.overrun_at_best == pytest.approx(2.0)
    assert speed_of(*[0.5] * 8).overrun == speed_of(*[0.5] * 8).overrun_at_best == 1.0


def test_round_trips_are_added_to_both_sides() -> None:
    speed = speed_of(*[0.1] * 8, promised_s=0.1, trips_s=(0.1, 0.1, 0.1))
    assert speed.slowdown == speed.overrun == pytest.approx(1.0)
    for _ in range(2):
        speed.add_round_trip(0.9)
        assert speed.slowdown == pytest.approx(1.0), "one that had to wait somewhere"
    speed.add_round_trip(0.9)
    assert speed.recent_s == pytest.approx(1.0)
    assert speed.slowdown == speed.overrun == pytest.approx(5.0)


def test_steps_of_several_tokens_are_expected_to_take_as_long_by_token() -> None:
    speed = speed_of(0.1, 0.1, 0.3)
    assert speed.expected_s(1) == pytest.approx(0.1)
    assert speed.expected_s(10) == pytest.approx(1.0)
    speed.add(10, 0.2)
    assert speed.expected_s(10) == pytest.approx(0.2)
    assert speed.expected_s(1) == pytest.approx(0.1)


def test_steps_that_take_no_time_at_all() -> None:
    assert speed_of(*[0.0] * 8, trips_s=(0.0,)).slowdown == 1.0
