"""The hours of the day at which a node works; pure.

A volunteer's computer may be free at night only. Outside of its hours the node holds no blocks and
no connections; it goes on by itself when they begin again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, time, timedelta

from swarm.protocol.errors import ConfigError

EXAMPLE_HOURS = "20:00-08:00"


@dataclass(frozen=True, slots=True)
class Hours:
    """Daily from ``begin`` to ``end``, local time; over midnight when ``end`` is the earlier."""

    begin: time
    end: time

    def __str__(self) -> str:
        return f"{self.begin:%H:%M}-{self.end:%H:%M}"

    def contains(self, now: time) -> bool:
        """Whether the node works at ``now``."""
        if self.begin < self.end:
            return self.begin <= now < self.end
        return now >= self.begin or now < self.end

    def seconds_to_change(self, now: datetime) -> float:
        """From ``now`` (local, without a zone) to the next begin or end, whichever comes first.

        A clock that is put forward or back meanwhile makes this wrong by as much: ask again from
        time to time.
        """
        changes = (datetime.combine(now.date(), at) for at in (self.begin, self.end))
        day = timedelta(days=1)
        return min((at - now if at > now else at + day - now).total_seconds() for at in changes)


def parse_hours(text: str) -> Hours:
    """Read ``20:00-08:00``. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})\s*", text)
    try:
        if match is None:
            raise ValueError
        begin, end = time(int(match[1]), int(match[2])), time(int(match[3]), int(match[4]))
    except ValueError:
        raise ConfigError(f"hours {text!r}: write for example {EXAMPLE_HOURS}") from None
    if begin == end:
        raise ConfigError(f"hours {text!r}: leave the hours out for a node that always works")
    return Hours(begin, end)
