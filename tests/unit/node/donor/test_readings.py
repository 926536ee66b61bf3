"""Which readings speak against working, and when that is over."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from swarm.node.donor.limits import DonorLimits
from swarm.node.donor.readings import SUSTAINED_S, Readings, Reason, Standing, decide
from swarm.node.hours import parse_week

NOON = datetime.fromisoformat("2026-03-02T12:00")
GIB = 1 << 30


class Computer:
    """Decides again and again, by a clock that the test moves."""

    def __init__(self, **limits: Any) -> None:
        self.limits = DonorLimits(**limits)
        self.now_s = 0.0
        self.standing = Standing()

    def see(self, *, after_s: float = 0.0, **changes: Any) -> frozenset[Reason]:
        self.now_s += after_s
        state = {"local_time": NOON, "paused": False, "month_bytes": 0}
        for name in state:
            state[name] = changes.pop(name, state[name])
        readings = Readings(**changes)
        self.standing = decide(self.limits, readings, self.standing, now_s=self.now_s, **state)  # type: ignore[arg-type]
        return self.standing.reasons


def test_a_computer_that_tells_nothing_works() -> None:
    computer = Computer(
        only_when_idle=True,
        maximum_temperature_c=80,
        maximum_power_w=100,
        keep_memory_free_bytes=GIB,
        keep_disk_free_bytes=GIB,
        monthly_bytes=1,
    )
    assert computer.see() == set()


@pytest.mark.parametrize(
    ("limits", "seen", "reason"),
    [
        ({}, {"paused": True}, Reason.PAUSED),
        ({}, {"on_battery": True}, Reason.BATTERY),
        ({"hours": parse_week("20:00-08:00")}, {}, Reason.HOURS),
        ({"only_when_idle": True}, {"idle_s": 299}, Reason.IN_USE),
        ({"only_when_idle": True}, {"gpu_used_by_others": 0.5}, Reason.GPU_IN_USE),
        ({"monthly_bytes": 1000}, {"month_bytes": 1000}, Reason.VOLUME),
        ({"keep_disk_free_bytes": GIB}, {"disk_free_bytes": GIB - 1}, Reason.DISK),
    ],
)
def test_what_holds_at_once(limits: dict[str, Any], seen: dict[str, Any], reason: Reason) -> None:
    computer = Computer(**limits)
    assert computer.see(**seen) == {reason}
    seen_well = {"hours": {"local_time": NOON.replace(hour=21)}}.get(next(iter(limits), ""), {})
    assert computer.see(after_s=1, **seen_well) == set()


@pytest.mark.parametrize(
    ("limits", "seen"),
    [
        ({"works_on_battery": True}, {"on_battery": True}),
        ({}, {"on_battery": False}),
        ({}, {"idle_s": 0, "temperature_c": 99, "power_w": 1e4, "memory_free_bytes": 0}),
        ({"only_when_idle": True}, {"idle_s": 300, "gpu_used_by_others": 0.1}),
        ({"monthly_bytes": 1000}, {"month_bytes": 999}),
    ],
)
def test_what_is_allowed(limits: dict[str, Any], seen: dict[str, Any]) -> None:
    assert Computer(**limits).see(**seen) == set()


@pytest.mark.parametrize(
    ("limit", "name", "bad", "better", "good", "reason"),
    [
        ({"maximum_temperature_c": 80}, "temperature_c", 81, 75, 71, Reason.TEMPERATURE),
        ({"maximum_power_w": 100}, "power_w", 101, 90, 80, Reason.POWER),
        (
            {"keep_memory_free_bytes": 100},
            "memory_free_bytes",
            99,
            110,
            121,
            Reason.MEMORY,
        ),
    ],
)
def test_spikes_do_not_count_and_it_must_get_clearly_better(
    limit: dict[str, Any], name: str, bad: float, better: float, good: float, reason: Reason
) -> None:
    computer = Computer(**limit)
    assert computer.see(**{name: bad}) == set()
    assert computer.see(after_s=SUSTAINED_S - 1, **{name: bad}) == set()
    assert computer.see(after_s=0.5, **{name: better}) == set()
    assert computer.see(after_s=5, **{name: bad}) == set(), "the spike before does not count"
    assert computer.see(after_s=SUSTAINED_S, **{name: bad}) == {reason}
    assert computer.see(after_s=60, **{name: better}) == {reason}
    assert computer.see(after_s=5, **{name: good}) == set()
    assert computer.see(after_s=5, **{name: better}) == set()


def test_all_reasons_are_told() -> None:
    computer = Computer(hours=parse_week("20:00-08:00"))
    assert computer.see(paused=True, on_battery=True) == {
        Reason.PAUSED,
        Reason.BATTERY,
        Reason.HOURS,
    }
