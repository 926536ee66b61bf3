"""What the computer did for others on each day: kept in a small file for the owner alone.

The month's traffic is counted here too, so that a restart does not forget it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

from swarm.node.donor.limits import write_private_file
from swarm.protocol.errors import ConfigError

log = logging.getLogger(__name__)

KEPT_DAYS = 400
MAXIMUM_FILE_BYTES = 4 * 1024 * 1024
LONGEST_GAP_S = 300.0
"""Between two entries; what is longer was a computer asleep."""


@dataclass(frozen=True, slots=True)
class Day:
    """Sums of one day."""

    online_s: float = 0.0
    resting_s: float = 0.0
    sessions: int = 0
    tokens: int = 0
    """Tokens that went through this node's blocks."""
    sent_bytes: int = 0
    received_bytes: int = 0
    energy_wh: float = 0.0
    """Of this node's work, where the computer tells or the owner declares it."""
    rested_for: dict[str, float] = field(default_factory=dict)
    """Seconds by reason."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums since the start of the process."""

    sessions: int = 0
    tokens: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    energy_j: float = 0.0


class Diary:
    """Adds what happened since the last entry to the day."""

    def __init__(
        self, path: Path | None, local_now: Callable[[], datetime], totals: Callable[[], Totals]
    ) -> None:
        """``path`` None keeps nothing on disk."""
        self._path = path
        self._local_now = local_now
        self._totals = totals
        self._last = totals()
        self._noted_s: float | None = None
        self.days: dict[date, Day] = {}

    def load(self) -> None:
        """What is on disk; a damaged file is left behind, and told in the log."""
        if self._path is None:
            return
        try:
            with self._path.open("rb") as file:
                rows = json.loads(file.read(MAXIMUM_FILE_BYTES))
            self.days = {date.fromisoformat(day): _day(row) for day, row in rows.items()}
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("the diary in %s cannot be read: %s", self._path, error)

    def note(self, now_s: float, *, online: bool, reasons: tuple[str, ...]) -> None:
        """Add the time since the last note; ``now_s`` is a clock that never goes back."""
        gap_s = 0.0 if self._noted_s is None else now_s - self._noted_s
        gap_s = gap_s if gap_s <= LONGEST_GAP_S else 0.0
        self._noted_s = now_s
        totals = self._totals()
        before, self._last = self._last, totals
        today = self.today
        rested_for = dict(today.rested_for)
        for reason in reasons:
            rested_for[reason] = rested_for.get(reason, 0.0) + gap_s
        self.days[self._local_now().date()] = replace(
            today,
            online_s=today.online_s + (gap_s if online else 0.0),
            resting_s=today.resting_s + (gap_s if reasons else 0.0),
            sessions=today.sessions + totals.sessions - before.sessions,
            tokens=today.tokens + totals.tokens - before.tokens,
            sent_bytes=today.sent_bytes + totals.sent_bytes - before.sent_bytes,
            received_bytes=today.received_bytes + totals.received_bytes - before.received_bytes,
            energy_wh=today.energy_wh + (totals.energy_j - before.energy_j) / 3600,
            rested_for=rested_for,
        )

    @property
    def today(self) -> Day:
        return self.days.get(self._local_now().date(), Day())

    @property
    def month_bytes(self) -> int:
        """Both ways, in this calendar month."""
        today = self._local_now().date()
        return sum(
            day.sent_bytes + day.received_bytes
            for when, day in self.days.items()
            if (when.year, when.month) == (today.year, today.month)
        )

    def save(self) -> None:
        """Keep the latest days; a disk that refuses is told in the log. Blocks for milliseconds."""
        if self._path is None:
            return
        oldest = self._local_now().date() - timedelta(days=KEPT_DAYS)
        self.days = {when: day for when, day in self.days.items() if when >= oldest}
        rows = {when.isoformat(): asdict(day) for when, day in sorted(self.days.items())}
        try:
            write_private_file(self._path, json.dumps(rows) + "\n")
        except ConfigError as error:
            log.warning("the diary is not kept: %s", error)


def _day(row: dict[str, Any]) -> Day:
    known = {item.name for item in fields(Day)}
    return Day(**{name: value for name, value in row.items() if name in known})
