from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from swarm.node.donor.limits import DonorLimits, LimitsFile
from swarm.node.hours import parse_week
from swarm.protocol.errors import ConfigError

SETTINGS = DonorLimits(upload_bytes_per_s=10**6, hours=parse_week("20:00-08:00"))


def test_changes_win_over_settings_and_last(tmp_path: Path) -> None:
    file = LimitsFile(tmp_path / "limits.json", SETTINGS)
    assert file.load() == SETTINGS
    changed = file.change({"upload_bytes_per_s": None, "only_when_idle": True})
    assert (changed.upload_bytes_per_s, changed.only_when_idle) == (None, True)
    assert changed.hours == SETTINGS.hours
    again = LimitsFile(tmp_path / "limits.json", SETTINGS)
    assert again.load() == changed
    assert stat.S_IMODE((tmp_path / "limits.json").stat().st_mode) == 0o600
    other = again.change({"hours": "sat 00:00-24:00"})
    assert other.hours == parse_week("sat 00:00-24:00")
    assert other.only_when_idle


@pytest.mark.parametrize(
    "changes",
    [
        {"uploads": 1},
        {"upload_bytes_per_s": 1000},
        {"upload_bytes_per_s": "fast"},
        {"upload_bytes_per_s": True},
        {"upload_bytes_per_s": float("nan")},
        {"only_when_idle": 1},
        {"only_when_idle": None},
        {"hours": 20},
        {"hours": "late"},
        {"idle_after_s": None},
        {"idle_after_s": 1},
        {"maximum_temperature_c": 10},
        {"monthly_bytes": -1},
    ],
)
def test_what_makes_no_sense_changes_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    file = LimitsFile(tmp_path / "limits.json", SETTINGS)
    with pytest.raises(ConfigError):
        file.change(changes)
    assert file.load() == SETTINGS
    assert list(tmp_path.iterdir()) == []


def test_limits_survive_json() -> None:
    assert DonorLimits().changed(json.loads(json.dumps(SETTINGS.to_json()))) == SETTINGS


@pytest.mark.parametrize("content", ["{", "[]", '{"hours": 5}', '{"unknown": 1}'])
def test_a_damaged_file_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "limits.json").write_text(content)
    with pytest.raises(ConfigError, match="mend or remove"):
        LimitsFile(tmp_path / "limits.json", SETTINGS).load()
