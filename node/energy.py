"""What energy the node's work takes: measured where the machine has counters, else as declared.

Counters of processors (RAPL, ``/sys/class/powercap``) and NVIDIA cards (NVML) count everything that
the device does. The node takes the share of the time in which it computed itself; what others do on
the same device at that time is counted too. Where nothing can be read, the owner's declared power
counts for the time in which the node computed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")
PACKAGE = re.compile(r"intel-rapl:\d+")
MEMORY_NAME = "dram"
LONGEST_PAUSE_S = 60.0
"""Of more, readings say nothing: the computer slept."""


class Counter(Protocol):
    """One device's energy since some beginning."""

    def read_j(self) -> float:
        """Raises OSError when it cannot be read any more."""

    @property
    def wraps_at_j(self) -> float:
        """Where it begins at 0 again; 0: never."""


@dataclass(frozen=True, slots=True)
class RaplCounter:
    """A zone of the processor."""

    file: Path
    wraps_at_j: float

    def read_j(self) -> float:
        return int(self.file.read_text()) / 1e6


class NvmlCounter:
    """An NVIDIA card."""

    wraps_at_j = 0.0

    def __init__(self, nvml: Any, index: int) -> None:
        """``nvml``: the module pynvml. Raises OSError for cards that do not count."""
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError as error:
            raise OSError(str(error)) from None
        self.read_j()

    def read_j(self) -> float:
        try:
            millijoules: int = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError as error:
            raise OSError(str(error)) from None
        return millijoules / 1000


def rapl_counters(powercap: Path = POWERCAP) -> list[Counter]:
    """Packages and their memory, where we may read them: often only root may."""
    counters: list[Counter] = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            if not PACKAGE.fullmatch(zone.name) and name != MEMORY_NAME:
                continue  # cores and graphics are parts of their package
            wraps_at_j = int((zone / "max_energy_range_uj").read_text()) / 1e6
            counter = RaplCounter(zone / "energy_uj", wraps_at_j)
            counter.read_j()
        except (OSError, ValueError) as error:
            log.info("cannot read the energy of %s: %s", zone.name, error)
        else:
            counters.append(counter)
    return counters


def nvml_counters(device: str) -> list[Counter]:
    """The card that ``device`` (``cuda`` or ``cuda:1``) means, if it counts."""
    try:
        import pynvml
    except ImportError:
        return []
    index = device.partition(":")[2]
    try:
        return [NvmlCounter(pynvml, int(index) if index.isdigit() else 0)]
    except OSError as error:
        log.info("cannot read the energy of the graphics card: %s", error)
        return []


def counters_of(device: str) -> list[Counter]:
    """What measures the device that computes."""
    return nvml_counters(device) if device.startswith("cuda") else rapl_counters()


class EnergyMeter:
    """Adds up the node's own energy; ask it every few seconds."""

    def __init__(self, counters: Sequence[Counter], declared_watts: float | None) -> None:
        self._counters = list(counters)
        self._declared_watts = declared_watts
        self._before: list[float] = []
        self._before_s = 0.0
        self._computed_s = 0.0
        self._total_j = 0.0

    @property
    def measured(self) -> bool:
        return bool(self._counters)

    @property
    def total_j(self) -> float:
        """Since the first update; 0 when nothing is known."""
        return self._total_j

    def update(self, now_s: float, computed_s: float) -> None:
        """Take note of the time (monotonic) and of the seconds computed since the start."""
        passed_s = now_s - self._before_s
        own_s = computed_s - self._computed_s
        first = not self._before_s
        self._before_s, self._computed_s = now_s, computed_s
        drawn_j = self._drawn_j()
        if first or not 0 < passed_s <= LONGEST_PAUSE_S:
            return
        if drawn_j is not None:
            self._total_j += drawn_j * min(1.0, own_s / passed_s)
        elif self._declared_watts is not None:
            self._total_j += self._declared_watts * min(own_s, passed_s)

    def _drawn_j(self) -> float | None:
        """By all counters since the last time; None without counters."""
        if not self._counters:
            return None
        try:
            now = [counter.read_j() for counter in self._counters]
        except (OSError, ValueError) as error:
            log.warning("energy cannot be measured any more: %s", error)
            self._counters = []
            return None
        before, self._before = self._before or now, now
        return sum(
            after - then if after >= then else after + counter.wraps_at_j - then
            for counter, then, after in zip(self._counters, before, now, strict=True)
        )
