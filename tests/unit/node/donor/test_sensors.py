"""The real sensors: whatever this computer tells must make sense, and nothing may raise."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from pathlib import Path

import pytest

from swarm.node.donor import sensors
from swarm.node.donor.sensors import SystemSensors


async def test_this_computer(tmp_path: Path) -> None:
    here = SystemSensors(tmp_path)
    first, second = await here.read(), await asyncio.create_task(here.read())
    for readings in (first, second):
        assert readings.memory_free_bytes is not None
        assert readings.memory_free_bytes > 0
        assert readings.disk_free_bytes is not None
        assert readings.temperature_c is None or 0 < readings.temperature_c < 150
        assert readings.power_w is None or readings.power_w >= 0
        assert readings.idle_s is None or readings.idle_s >= 0


def test_people_at_terminals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sensors, "TERMINALS", tmp_path / "pts")
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    assert sensors._People().idle_s() is None
    (tmp_path / "pts").mkdir()
    for name, touched_s in (("0", 400.0), ("1", 900.0)):
        (tmp_path / "pts" / name).touch()
        os.utime(tmp_path / "pts" / name, (touched_s, touched_s))
    assert sensors._People().idle_s() == 100


@pytest.mark.parametrize(
    ("hint", "idle_s"), [("IdleHint=no", 0.0), ("IdleHint=yes\nIdleSinceHint=700000000", 300.0)]
)
def test_people_at_a_desktop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hint: str, idle_s: float
) -> None:
    """A program in place of loginctl tells of a desktop and of a session over SSH."""
    program(
        tmp_path / "loginctl",
        'case "$1 $2" in\n'
        'list*) echo "7 1000 amina seat0"; echo "9 0 root";;\n'
        f'*7) echo "Type=wayland\nState=active\n{hint}";;\n'
        '*) echo "Type=tty\nIdleHint=no";;\nesac\n',
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sensors, "TERMINALS", tmp_path / "none")
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    assert sensors._People().idle_s() == pytest.approx(idle_s)


def program(path: Path, text: str) -> None:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


async def test_nvidia_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in place of nvidia-smi says what two cards are like."""
    program(
        tmp_path / "nvidia-smi",
        'case "$1" in\n'
        '*gpu=*) echo "61, 100.5, 80"; echo "70, [N/A], 0";;\n*) echo "1, 500";;\nesac\n',
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    readings = await SystemSensors(tmp_path).read()
    assert readings.temperature_c is not None
    assert readings.temperature_c >= 70
    assert readings.gpu_used_by_others == 0.8
    assert readings.power_w == 100.5
