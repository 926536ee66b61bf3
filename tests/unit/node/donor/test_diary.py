from __future__ import annotations

from datetime import date, datetime, timedelta
from pathlib import Path

import pytest

from swarm.node.donor.diary import KEPT_DAYS, Diary, Totals


class Life:
    """A clock and sums that the test moves."""

    def __init__(self, path: Path | None) -> None:
        self.now = datetime.fromisoformat("2026-03-31T23:00")
        self.totals = Totals()
        self.diary = Diary(path, lambda: self.now, lambda: self.totals)
        self.diary.load()
        self.monotonic_s = 100.0

    def go(self, seconds: float, *, online: bool = True, reasons: tuple[str, ...] = ()) -> None:
        self.now += timedelta(seconds=seconds)
        self.monotonic_s += seconds
        self.diary.note(self.monotonic_s, online=online, reasons=reasons)


def test_a_day_is_what_happened_on_it(tmp_path: Path) -> None:
    life = Life(tmp_path / "diary.json")
    life.go(0)
    life.totals = Totals(sessions=2, tokens=50, sent_bytes=1000, received_bytes=500, energy_j=3600)
    life.go(100)
    life.go(50, online=False, reasons=("paused",))
    today = life.diary.today
    assert (today.sessions, today.tokens) == (2, 50)
    assert (today.online_s, today.resting_s) == (100, 50)
    assert today.rested_for == {"paused": 50}
    assert today.energy_wh == pytest.approx(1)
    assert life.diary.month_bytes == 1500
    life.diary.save()

    # A new process, in the next month.
    again = Life(tmp_path / "diary.json")
    assert again.diary.today == today
    again.now = datetime.fromisoformat("2026-04-01T00:10")
    again.totals = Totals(sent_bytes=7)
    again.go(0)
    assert again.diary.month_bytes == 7
    assert again.diary.days[date(2026, 3, 31)] == today


def test_time_in_which_the_computer_slept_is_nobody_s() -> None:
    life = Life(None)
    life.go(0)
    life.go(5000)
    assert life.diary.today.online_s == 0


def test_old_days_and_damaged_files_go(tmp_path: Path) -> None:
    path = tmp_path / "diary.json"
    path.write_text("{")
    life = Life(path)
    life.go(0)
    life.now += timedelta(days=KEPT_DAYS + 1)
    life.go(0)
    life.diary.save()
    assert len(Life(path).diary.days) == 1
