"""Reads this computer: charger, people at it, heat, power, memory, disk, GPUs.

The boundary to the machine: tests put others in its place. Everything that a computer does not
tell is None, and limits on it then have no effect. Reading takes milliseconds, with NVIDIA GPUs
some tens of them: not on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Protocol

import psutil

from swarm.node.donor.readings import Readings
from swarm.node.energy import rapl_counters

PROGRAM_TIMEOUT_S = 5.0
GPU_PERIOD_S = 10.0
TERMINALS = Path("/dev/pts")
DESKTOP_PERIOD_S = 10.0
DESKTOP_PROPERTIES = ("-p", "Type", "-p", "State", "-p", "IdleHint", "-p", "IdleSinceHint")


class Sensors(Protocol):
    """What tells how the computer is."""

    async def read(self) -> Readings: ...


class SystemSensors:
    """The real ones."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._counters = rapl_counters()
        self._counted: tuple[float, list[float]] | None = None
        self._gpus = _NvidiaGpus()
        self._people = _People()

    async def read(self) -> Readings:
        return await asyncio.to_thread(self._read)

    def _read(self) -> Readings:
        gpu = self._gpus.read()
        power_w = [value for value in (self._processor_power_w(), gpu.power_w) if value is not None]
        heat_c = [value for value in (_processor_heat_c(), gpu.temperature_c) if value is not None]
        return Readings(
            on_battery=_on_battery(),
            idle_s=self._people.idle_s(),
            gpu_used_by_others=gpu.used_by_others,
            temperature_c=max(heat_c, default=None),
            power_w=sum(power_w) if power_w else None,
            memory_free_bytes=int(psutil.virtual_memory().available),
            disk_free_bytes=_disk_free_bytes(self._data_dir),
        )

    def _processor_power_w(self) -> float | None:
        """On average since the last reading, by the processor's energy counters."""
        now_s = time.monotonic()
        try:
            counted_j = [counter.read_j() for counter in self._counters]
        except (OSError, ValueError):
            return None
        before, self._counted = self._counted, (now_s, counted_j)
        if before is None or not counted_j or now_s <= before[0]:
            return None
        # A counter that has begun anew counts as nothing this time.
        pairs = zip(before[1], counted_j, strict=True)
        return sum(max(0.0, now - then) for then, now in pairs) / (now_s - before[0])


def _on_battery() -> bool | None:
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is None or battery.power_plugged is None:
        return None
    return not battery.power_plugged


class _People:
    """Whether somebody is at the computer: by its terminals, and by what desktops tell logind."""

    def __init__(self) -> None:
        self._program = shutil.which("loginctl")
        self._asked_s = -DESKTOP_PERIOD_S
        self._desktop_used_unix_s: float | None = None

    def idle_s(self) -> float | None:
        """Since they did something; None when nothing tells."""
        now_unix_s = time.time()
        now_s = time.monotonic()
        if self._program is not None and now_s - self._asked_s >= DESKTOP_PERIOD_S:
            self._asked_s = now_s
            self._desktop_used_unix_s = self._desktop_used(now_unix_s)
        used = [*_terminals_used(), *filter(None, [self._desktop_used_unix_s])]
        return max(0.0, now_unix_s - max(used)) if used else None

    def _desktop_used(self, now_unix_s: float) -> float | None:
        """When a graphical session was used last: now, unless it says that it is idle."""
        used = []
        for session in self._ask("list-sessions", "--no-legend"):
            words = session.split()
            if not words:
                continue
            answer = self._ask("show-session", words[0], *DESKTOP_PROPERTIES)
            said = dict(line.partition("=")[::2] for line in answer)
            if said.get("Type") not in ("x11", "wayland", "mir") or said.get("State") == "closing":
                continue
            since = said.get("IdleSinceHint", "")
            idle = said.get("IdleHint") == "yes" and since.isdigit()
            used.append(int(since) / 1e6 if idle else now_unix_s)
        return max(used, default=None)

    def _ask(self, *arguments: str) -> list[str]:
        return _output([str(self._program), *arguments])


def _terminals_used() -> list[float]:
    """When each terminal was typed into or written to last, in Unix seconds."""
    used = []
    with contextlib.suppress(OSError):
        for terminal in TERMINALS.iterdir():
            if terminal.name != "ptmx":
                status = terminal.stat()
                used.append(max(status.st_atime, status.st_mtime))
    return used


def _processor_heat_c() -> float | None:
    if not hasattr(psutil, "sensors_temperatures"):
        return None
    sensors = psutil.sensors_temperatures()
    values = [
        entry.current
        for name in ("coretemp", "k10temp", "zenpower", "cpu_thermal", "acpitz")
        for entry in sensors.get(name, ())
        if 0 < entry.current < 150
    ]
    return max(values, default=None)


def _disk_free_bytes(path: Path) -> int | None:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(path).free
    return None


class _GpuReadings:
    """Of all GPUs together."""

    def __init__(
        self,
        temperature_c: float | None = None,
        power_w: float | None = None,
        used_by_others: float | None = None,
    ) -> None:
        self.temperature_c = temperature_c
        self.power_w = power_w
        self.used_by_others = used_by_others


class _NvidiaGpus:
    """By ``nvidia-smi``, at most once in some seconds; nothing where there is none."""

    def __init__(self) -> None:
        self._program = shutil.which("nvidia-smi")
        self._read_s = -GPU_PERIOD_S
        self._last = _GpuReadings()

    def read(self) -> _GpuReadings:
        now_s = time.monotonic()
        if self._program is None or now_s - self._read_s < GPU_PERIOD_S:
            return self._last
        self._read_s = now_s
        gpus = self._ask("--query-gpu=temperature.gpu,power.draw,utilization.gpu")
        programs = self._ask("--query-compute-apps=pid,used_memory")
        own = _own_processes()
        others = [row for row in programs if row and row[0] is not None and int(row[0]) not in own]
        heat = [row[0] for row in gpus if row and row[0] is not None]
        power = [row[1] for row in gpus if len(row) > 1 and row[1] is not None]
        load = [row[2] for row in gpus if len(row) > 2 and row[2] is not None]
        self._last = _GpuReadings(
            max(heat, default=None),
            sum(power) if power else None,
            (max(load, default=0.0) / 100 if others else 0.0) if gpus else None,
        )
        return self._last

    def _ask(self, query: str) -> list[list[float | None]]:
        lines = _output([str(self._program), query, "--format=csv,noheader,nounits"])
        return [[_number(cell) for cell in line.split(",")] for line in lines]


def _output(command: list[str]) -> list[str]:
    """The lines that a program of the system prints; none when it fails."""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return []
    return answer.stdout.splitlines()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _own_processes() -> set[int]:
    own = {os.getpid()}
    with contextlib.suppress(psutil.Error):
        own |= {child.pid for child in psutil.Process().children(recursive=True)}
    return own
