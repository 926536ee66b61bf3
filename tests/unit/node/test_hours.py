from __future__ import annotations

from datetime import datetime, time

import pytest

from swarm.node.hours import Hours, parse_hours
from swarm.protocol.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("20:00-08:00", ["20:00", "23:59", "00:00", "07:59"], ["08:00", "12:00", "19:59"]),
        ("9:30 - 17:00", ["09:30", "16:59"], ["09:29", "17:00", "00:00"]),
    ],
)
def test_hours_of_the_day(text: str, inside: list[str], outside: list[str]) -> None:
    hours = parse_hours(text)
    assert all(hours.contains(time.fromisoformat(now)) for now in inside)
    assert not any(hours.contains(time.fromisoformat(now)) for now in outside)
    assert parse_hours(str(hours)) == hours


@pytest.mark.parametrize("text", ["", "20:00", "24:00-08:00", "8-20", "20:00-20:00", "a:b-c:d"])
def test_what_is_no_span_of_hours_is_said(text: str) -> None:
    with pytest.raises(ConfigError, match="hours"):
        parse_hours(text)


@pytest.mark.parametrize(
    ("now", "seconds"),
    [
        ("2026-03-01T19:59:30", 30),
        ("2026-03-01T20:00:00", 12 * 3600),
        ("2026-03-01T23:00:00", 9 * 3600),
        ("2026-03-01T07:59:59", 1),
    ],
)
def test_the_next_change(now: str, seconds: float) -> None:
    hours = Hours(time(20), time(8))
    assert hours.seconds_to_change(datetime.fromisoformat(now)) == seconds
