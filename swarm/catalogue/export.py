"""Copies a fetched revision to a folder that other software reads."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from swarm.catalogue.checkpoint import MANIFEST_FILE
from swarm.catalogue.description import ADAPTER_WEIGHTS
from swarm.catalogue.safetensors_file import header_for
from swarm.catalogue.store import INDEX_FILE, SIGNATURES_FILE, StoredRevision
from swarm.protocol.errors import CheckpointError
from swarm.protocol.manifest import Part


def export_revision(stored: StoredRevision, parts: Iterable[Part], folder: Path) -> None:
    """Copy parts, manifest and signatures. Raises CheckpointError when the disk refuses.

    Of a model the folder becomes a checkpoint directory, of an adapter one that PEFT loads.
    """
    wanted = tuple(parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if stored.manifest.kind == "adapter":
            for part in stored.manifest.files():
                shutil.copyfile(stored.folder / part.name, folder / part.name)
            write_adapter_weights(stored, folder / ADAPTER_WEIGHTS)
            return
        names = [part.name for part in wanted]
        if len(wanted) == len(stored.manifest.parts):
            names.append(INDEX_FILE)
        for name in (*names, SIGNATURES_FILE, MANIFEST_FILE):
            shutil.copyfile(stored.folder / name, folder / name)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}") from error


def write_adapter_weights(stored: StoredRevision, file: Path) -> None:
    """All tensors of an adapter in one safetensors file, as PEFT wants it."""
    parts = [part for part in stored.manifest.parts if part.tensors]
    temporary = file.with_name(f".{file.name}")
    with temporary.open("wb") as stream:
        stream.write(header_for(tuple(tensor for part in parts for tensor in part.tensors)))
        for part in parts:
            for chunk in sorted(stored.manifest.chunks_of([part])):
                stream.write(stored.read_chunk(chunk))
    temporary.replace(file)
