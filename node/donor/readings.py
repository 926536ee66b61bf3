"""May the node work now? Pure: what sensors read, what the owner allows, and what was so before.

A reason that appears must be easier to get than to lose, or the node would come and go: what is
too hot must cool down by some degrees, and spikes that last less than ``SUSTAINED_S`` do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from swarm.node.donor.limits import DonorLimits

SUSTAINED_S = 20.0
"""For heat, power and memory, which have spikes."""
COOLER_C = 8.0
LESS_POWER = 0.85
MORE_FREE = 1.2
BUSY_GPU_FRACTION = 0.2
"""A GPU that others use more than this is in use."""


class Reason(StrEnum):
    """Why a node rests."""

    PAUSED = "paused"
    HOURS = "outside of its hours"
    IN_USE = "somebody uses the computer"
    GPU_IN_USE = "another program uses the GPU"
    BATTERY = "on battery"
    TEMPERATURE = "too hot"
    POWER = "too much power"
    MEMORY = "other programs need the memory"
    DISK = "the disk is full"
    VOLUME = "the month's traffic is used up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """What the computer tells. None: it does not."""

    on_battery: bool | None = None
    idle_s: float | None = None
    """Since somebody touched keyboard, mouse or a terminal."""
    gpu_used_by_others: float | None = None
    """Fraction of time in which other programs kept a GPU busy."""
    temperature_c: float | None = None
    power_w: float | None = None
    memory_free_bytes: int | None = None
    disk_free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """What held when it was decided last."""

    reasons: frozenset[Reason] = frozenset()
    since_s: Mapping[Reason, float] = field(default_factory=dict)
    """Of what is not sustained for long enough yet: when it began."""


def decide(
    limits: DonorLimits,
    readings: Readings,
    before: Standing,
    *,
    local_time: datetime,
    now_s: float,
    paused: bool,
    month_bytes: int,
) -> Standing:
    """What speaks against working now. ``now_s`` is a clock that never goes back."""
    at_once = {
        Reason.PAUSED: paused,
        Reason.HOURS: limits.hours is not None and not limits.hours.contains(local_time),
        Reason.BATTERY: bool(readings.on_battery) and not limits.works_on_battery,
        Reason.IN_USE: limits.only_when_idle
        and readings.idle_s is not None
        and readings.idle_s < limits.idle_after_s,
        Reason.GPU_IN_USE: limits.only_when_idle
        and readings.gpu_used_by_others is not None
        and readings.gpu_used_by_others > BUSY_GPU_FRACTION,
        Reason.VOLUME: limits.monthly_bytes is not None and month_bytes >= limits.monthly_bytes,
        Reason.DISK: _too_little(
            readings.disk_free_bytes, limits.keep_disk_free_bytes, Reason.DISK in before.reasons
        ),
    }
    sustained = {
        Reason.TEMPERATURE: _too_much(
            readings.temperature_c,
            limits.maximum_temperature_c,
            lambda limit: limit - COOLER_C,
            Reason.TEMPERATURE in before.reasons,
        ),
        Reason.POWER: _too_much(
            readings.power_w,
            limits.maximum_power_w,
            lambda limit: limit * LESS_POWER,
            Reason.POWER in before.reasons,
        ),
        Reason.MEMORY: _too_little(
            readings.memory_free_bytes,
            limits.keep_memory_free_bytes,
            Reason.MEMORY in before.reasons,
        ),
    }
    known = dict(before.since_s)
    since_s = {reason: known.get(reason, now_s) for reason, holds in sustained.items() if holds}
    reasons = {reason for reason, holds in at_once.items() if holds}
    reasons |= {
        reason
        for reason, began_s in since_s.items()
        if reason in before.reasons or now_s - began_s >= SUSTAINED_S
    }
    return Standing(frozenset(reasons), since_s)


def _too_much(
    value: float | None, limit: float | None, enough: Callable[[float], float], was: bool
) -> bool:
    if value is None or limit is None:
        return False
    return value > (enough(limit) if was else limit)


def _too_little(value: int | None, limit: int | None, was: bool) -> bool:
    if value is None or limit is None:
        return False
    return value < (limit * MORE_FREE if was else limit)
