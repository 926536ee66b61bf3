"""Finds the adapter that a user asks for, and checks that it is for the model."""

from __future__ import annotations

from pathlib import Path

from swarm.catalogue.adapter import AdapterFiles, check_fits
from swarm.catalogue.checkpoint import Checkpoint
from swarm.protocol.errors import AdapterError


def open_adapter(name_or_path: str | Path, checkpoint: Checkpoint) -> AdapterFiles:
    """An adapter in a directory, read whole and checked. Raises AdapterError that says why not."""
    directory = Path(name_or_path).expanduser()
    if not directory.is_dir():
        raise AdapterError(f"{name_or_path} is no folder with an adapter")
    files = AdapterFiles.open(directory)
    check_fits(files.index, checkpoint)
    return files
