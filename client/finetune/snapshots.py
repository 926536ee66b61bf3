"""States of a training on the client's disk: one file each, whole or not there at all.

A snapshot holds what all hops and the client have after one step: adapter, optimizer, and the
losses so far. It names its tensors by the model's blocks, so that it fits any chain.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from swarm.protocol.errors import UsageError

FOLDER = "snapshots"
_NAME = re.compile(r"step-(\d{8})\.safetensors")
KEPT = 2


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state after ``step`` steps."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    """Flat float32, by the names of ``protocol.messages.StatePart``; the client's own likewise."""
    losses: tuple[float, ...]
    """Of each step so far."""
    identity: Mapping[str, Any]
    """Model, data and settings that it belongs to."""


class Snapshots:
    """The latest snapshots of one training, in a folder of its output."""

    def __init__(self, output: Path) -> None:
        self._folder = output / FOLDER

    def save(self, snapshot: Snapshot) -> Path:
        """Write it, and remove all but the latest ones. Raises UsageError when the disk is full."""
        path = self._folder / f"step-{snapshot.step:08d}.safetensors"
        unfinished = path.with_suffix(".unfinished")
        metadata = {
            "step": str(snapshot.step),
            "losses": json.dumps(list(snapshot.losses)),
            "identity": json.dumps(dict(snapshot.identity), sort_keys=True),
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(dict(snapshot.tensors), unfinished, metadata)
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            for old in self._paths()[:-KEPT]:
                old.unlink()
        except (OSError, SafetensorError) as error:
            raise UsageError(f"cannot write the snapshot {path}: {error}") from error
        return path

    def load_latest(self) -> Snapshot | None:
        """The newest one that is whole; None without any."""
        for path in reversed(self._paths()):
            snapshot = _load(path)
            if snapshot is not None:
                return snapshot
        return None

    def clear(self) -> None:
        """Remove all: a new training begins."""
        for path in self._paths():
            path.unlink()

    def _paths(self) -> list[Path]:
        """Oldest first."""
        if not self._folder.is_dir():
            return []
        return sorted(path for path in self._folder.iterdir() if _NAME.fullmatch(path.name))


def _load(path: Path) -> Snapshot | None:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Snapshot(
            step=int(metadata["step"]),
            tensors=tensors,
            losses=tuple(float(loss) for loss in json.loads(metadata["losses"])),
            identity=json.loads(metadata["identity"]),
        )
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
