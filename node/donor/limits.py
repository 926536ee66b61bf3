"""What the owner allows, and where changes of it are kept.

Settings say how a node starts out. What the owner changes later, by command or on the page, is
kept in a file beside the key and wins from then on, until the owner takes it back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from swarm.node.hours import Week, parse_week
from swarm.protocol.errors import ConfigError

LEAST_BYTES_PER_S = 100_000
"""Peers give up on senders below 64 KiB/s."""
MAXIMUM_FILE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DonorLimits:
    """When the node may work, and how much it may use. None: without limit."""

    hours: Week | None = None
    """Hours of the week, as ``mon-fri 20:00-08:00, sat-sun 00:00-24:00``, local time."""

    only_when_idle: bool = False
    """Only while nobody uses the computer, nor another program its GPU."""

    idle_after_s: float = 300.0
    """How long nobody must have touched it for that."""

    works_on_battery: bool = False
    """Whether a laptop goes on without its charger."""

    upload_bytes_per_s: int | None = None
    """Most that is sent to peers, on average over a few seconds."""

    download_bytes_per_s: int | None = None
    """Most that is taken from peers."""

    monthly_bytes: int | None = None
    """Both ways together, in a calendar month; then the node rests until the next."""

    keep_memory_free_bytes: int | None = None
    """The node leaves when other programs need so much that less than this is left."""

    keep_disk_free_bytes: int | None = None
    """The same for the disk that holds the node's data."""

    maximum_temperature_c: float | None = None
    """Of the hottest sensor of processor and GPU."""

    maximum_power_w: float | None = None
    """Of processor and GPU together, where they tell."""

    def __post_init__(self) -> None:
        for name in ("upload_bytes_per_s", "download_bytes_per_s"):
            value = getattr(self, name)
            if value is not None and value < LEAST_BYTES_PER_S:
                raise ConfigError(
                    f"{name}: at least {LEAST_BYTES_PER_S // 1000} kB/s; slower nodes are given "
                    "up by their peers"
                )
        for name in ("monthly_bytes", "keep_memory_free_bytes", "keep_disk_free_bytes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be greater than 0")
        if not 10 <= self.idle_after_s <= 24 * 3600:
            raise ConfigError("idle_after_s must be between 10 seconds and a day")
        if self.maximum_temperature_c is not None and not 30 <= self.maximum_temperature_c <= 110:
            raise ConfigError("maximum_temperature_c must be between 30 and 110")
        if self.maximum_power_w is not None and not 1 <= self.maximum_power_w <= 100_000:
            raise ConfigError("maximum_power_w must be between 1 and 100,000")

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["hours"] = None if self.hours is None else str(self.hours)
        return values

    def changed(self, changes: Mapping[str, Any]) -> DonorLimits:
        """With some values replaced, as JSON has them. Raises ConfigError."""
        return replace(self, **{name: _value(name, value) for name, value in changes.items()})


LIMIT_NAMES = tuple(item.name for item in fields(DonorLimits))
_WHOLE = tuple(name for name in LIMIT_NAMES if "bytes" in name)
_FLAGS = ("only_when_idle", "works_on_battery")


def _value(name: str, value: Any) -> Any:
    if name not in LIMIT_NAMES:
        raise ConfigError(f"no limit is called {name!r}; there are {', '.join(LIMIT_NAMES)}")
    if name in _FLAGS:
        if not isinstance(value, bool):
            raise ConfigError(f"{name}: true or false is needed")
        return value
    if value is None and name != "idle_after_s":
        return None
    if name == "hours":
        if not isinstance(value, str):
            raise ConfigError("hours: a text is needed")
        return parse_week(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e18 < value < 1e18:
        raise ConfigError(f"{name}: a number is needed")
    return int(value) if name in _WHOLE else float(value)


class LimitsFile:
    """The owner's changes."""

    def __init__(self, path: Path, settings: DonorLimits) -> None:
        self._path = path
        self._settings = settings
        self._changes: dict[str, Any] = {}

    def load(self) -> DonorLimits:
        """The limits in force. Raises ConfigError for a damaged file."""
        try:
            with self._path.open("rb") as file:
                changes = json.loads(file.read(MAXIMUM_FILE_BYTES))
            if not isinstance(changes, dict):
                raise ValueError
            limits = self._settings.changed(changes)
        except FileNotFoundError:
            return self._settings
        except (OSError, ValueError, ConfigError) as error:
            raise ConfigError(
                f"cannot use the limits in {self._path} ({error}); mend or remove the file"
            ) from None
        self._changes = changes
        return limits

    def change(self, changes: Mapping[str, Any]) -> DonorLimits:
        """Keep changes, and give the limits in force. Raises ConfigError; then nothing changes."""
        merged = {**self._changes, **changes}
        limits = self._settings.changed(merged)
        _write(self._path, json.dumps(merged, indent=1) + "\n")
        self._changes = merged
        return limits


def _write(path: Path, text: str) -> None:
    """Replace a file whole, for its owner alone. Raises ConfigError."""
    fresh = path.with_name(path.name + ".new")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        fresh.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


write_private_file = _write
