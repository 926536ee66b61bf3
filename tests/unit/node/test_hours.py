from __future__ import annotations

from datetime import datetime

import pytest

from swarm.node.hours import parse_week
from swarm.protocol.errors import ConfigError

# 2026-03-02 is a Monday.
WEEK = "mon-fri 20:00-08:00, sat-sun 00:00-24:00"


def at(text: str) -> datetime:
    day, clock = text.split()
    number = ("mon", "tue", "wed", "thu", "fri", "sat", "sun").index(day)
    return datetime.fromisoformat(f"2026-03-{2 + number:02d}T{clock}")


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("20:00-08:00", ["mon 20:00", "tue 23:59", "wed 00:00", "sun 07:59"], ["mon 08:00"]),
        ("9:30 - 17:00", ["mon 09:30", "sun 16:59"], ["mon 09:29", "tue 17:00", "wed 00:00"]),
        (
            WEEK,
            ["mon 20:00", "tue 07:59", "sat 00:00", "sat 07:00", "sat 12:00", "sun 23:59"],
            ["mon 08:00", "mon 19:59", "fri 12:00", "mon 07:00"],
        ),
        ("fri-mon 10:00-11:00", ["fri 10:30", "sun 10:30", "mon 10:59"], ["thu 10:30"]),
        ("sun 22:00-06:00", ["sun 23:00", "mon 05:00"], ["sat 23:00", "sun 05:00"]),
        ("Wed 00:00-24:00", ["wed 00:00", "wed 23:59"], ["tue 23:59", "thu 00:00"]),
    ],
)
def test_hours_of_the_week(text: str, inside: list[str], outside: list[str]) -> None:
    week = parse_week(text)
    assert all(week.contains(at(now)) for now in inside)
    assert not any(week.contains(at(now)) for now in outside)
    assert parse_week(str(week)) == week


@pytest.mark.parametrize(
    "text",
    ["", "20:00", "25:00-08:00", "8-20", "20:00-20:00", "a:b-c:d", "xyz 1:00-2:00", "mon", ","],
)
def test_what_is_no_span_of_hours_is_said(text: str) -> None:
    with pytest.raises(ConfigError, match="hours"):
        parse_week(text)


@pytest.mark.parametrize(
    ("now", "begin"),
    [("mon 12:00", "mon 20:00"), ("fri 19:59", "fri 20:00"), ("tue 08:00", "tue 20:00")],
)
def test_the_next_begin(now: str, begin: str) -> None:
    assert parse_week(WEEK).next_begin(at(now)) == at(begin)


def test_the_next_begin_may_be_a_week_away() -> None:
    week = parse_week("mon 10:00-11:00")
    assert week.next_begin(at("mon 11:00")) == datetime.fromisoformat("2026-03-09T10:00")
