"""The hours of the week at which a node works; pure.

A volunteer's computer may be free at night only, or all of Sunday. Outside of its hours the node
holds no blocks and no connections; it goes on by itself when they begin again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, time, timedelta

from swarm.protocol.errors import ConfigError

EXAMPLE_HOURS = "20:00-08:00"
EXAMPLE_WEEK = "mon-fri 20:00-08:00, sat-sun 00:00-24:00"
WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY = timedelta(days=1)
MAXIMUM_SPANS = 64


@dataclass(frozen=True, slots=True)
class Hours:
    """From ``begin`` to ``end``, local time, on days that begin it (0 is Monday).

    Over midnight when ``end`` is not the later; midnight to midnight is the whole day.
    """

    begin: time
    end: time
    weekdays: frozenset[int] = frozenset(range(7))

    def __str__(self) -> str:
        end = "24:00" if self.end == time(0) else f"{self.end:%H:%M}"
        return f"{_days_text(self.weekdays)}{self.begin:%H:%M}-{end}"

    def spans_near(self, now: datetime) -> list[tuple[datetime, datetime]]:
        """Begin and end of each time from yesterday to in eight days."""
        spans = []
        for offset in range(-1, 9):
            day = now.date() + offset * DAY
            if day.weekday() in self.weekdays:
                begin = datetime.combine(day, self.begin)
                end = datetime.combine(day, self.end)
                spans.append((begin, end if end > begin else end + DAY))
        return spans


@dataclass(frozen=True, slots=True)
class Week:
    """Some hours of the week; they may overlap."""

    hours: tuple[Hours, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.hours))

    def contains(self, now: datetime) -> bool:
        """Whether the node works at ``now`` (local, without a zone)."""
        return any(begin <= now < end for begin, end in self._spans(now))

    def next_begin(self, now: datetime) -> datetime:
        """When the hours begin again after a ``now`` that is outside of them."""
        return min(begin for begin, _ in self._spans(now) if begin > now)

    def _spans(self, now: datetime) -> list[tuple[datetime, datetime]]:
        return [span for hours in self.hours for span in hours.spans_near(now)]


def parse_week(text: str) -> Week:
    """Read ``20:00-08:00`` or ``mon-fri 20:00-08:00, sat-sun 00:00-24:00``. Raises ConfigError."""
    parts = text.split(",")
    if len(parts) > MAXIMUM_SPANS:
        raise ConfigError(f"hours: at most {MAXIMUM_SPANS} of them")
    return Week(tuple(_parse_hours(part) for part in parts))


def _parse_hours(text: str) -> Hours:
    pattern = r"\s*(?:([a-z]{3})(?:\s*-\s*([a-z]{3}))?\s+)?(\d\d?):(\d\d)\s*-\s*(\d\d?):(\d\d)\s*"
    match = re.fullmatch(pattern, text.lower())
    try:
        if match is None:
            raise ValueError
        first, last, *numbers = match.groups()
        begin_hour, begin_minute, end_hour, end_minute = map(int, numbers)
        if (end_hour, end_minute) == (24, 0):
            end_hour = 0
        begin, end = time(begin_hour, begin_minute), time(end_hour, end_minute)
        weekdays = _weekdays(first, last)
    except ValueError:
        raise ConfigError(
            f"hours {text.strip()!r}: write for example {EXAMPLE_HOURS}, or {EXAMPLE_WEEK}"
        ) from None
    if begin == end != time(0):
        raise ConfigError(f"hours {text!r}: leave the hours out for a node that always works")
    return Hours(begin, end, weekdays)


def _weekdays(first: str | None, last: str | None) -> frozenset[int]:
    if first is None:
        return frozenset(range(7))
    begin = WEEKDAYS.index(first)
    end = begin if last is None else WEEKDAYS.index(last)
    return frozenset((begin + offset) % 7 for offset in range((end - begin) % 7 + 1))


def _days_text(weekdays: frozenset[int]) -> str:
    """As it is read: ``mon-fri `` or nothing for all days."""
    if len(weekdays) == 7:
        return ""
    (first,) = [day for day in weekdays if (day - 1) % 7 not in weekdays]
    last = (first + len(weekdays) - 1) % 7
    return WEEKDAYS[first] + (f"-{WEEKDAYS[last]}" if last != first else "") + " "
