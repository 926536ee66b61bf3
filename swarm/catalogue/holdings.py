"""Chunks that this peer can send: of a fetched revision in the store, or of a plain directory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from swarm.catalogue.hashed_parts import PartBytes, read_range
from swarm.catalogue.safetensors_file import TensorInfo
from swarm.protocol.errors import CheckpointError
from swarm.protocol.manifest import Manifest, ManifestSignature

ChunkMask = NDArray[np.bool_]
"""One item for each chunk of a manifest, ``[chunks]``."""


class Holding(Protocol):
    """One manifest and those of its chunks that are here."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def signatures(self) -> tuple[ManifestSignature, ...]: ...

    @property
    def held(self) -> ChunkMask:
        """Which chunks can be read now; not to be changed by others."""

    @property
    def coming(self) -> ChunkMask:
        """Which chunks are being fetched now; not to be changed by others."""

    def read_chunk(self, chunk: int) -> bytes:
        """Read from disk. Raises CheckpointError when the files are not what they were."""


class PlainDirectory:
    """A checkpoint directory as its owner put it there, and the manifest made of it."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        signatures: tuple[ManifestSignature, ...],
        tensors: Callable[[str], TensorInfo],
    ) -> None:
        """``tensors`` finds a tensor by its full name."""
        self.directory = directory
        self.manifest = manifest
        self.signatures = signatures
        self.held: ChunkMask = np.ones(manifest.number_of_chunks, dtype=np.bool_)
        self.coming: ChunkMask = np.zeros(manifest.number_of_chunks, dtype=np.bool_)
        self._parts = [
            None if part.is_file else PartBytes([tensors(item.name) for item in part.tensors])
            for part in manifest.parts
        ]

    def read_chunk(self, chunk: int) -> bytes:
        part, offset, size_bytes = self.manifest.locate(chunk)
        reader = self._parts[part]
        if reader is None:
            return read_range(self.directory / self.manifest.parts[part].name, offset, size_bytes)
        return reader.read(offset, size_bytes)

    def check_files(self) -> None:
        """Hold of the plain files only the chunks that are as the manifest says. Blocks."""
        for first, part in zip(self.manifest.first_chunks, self.manifest.parts, strict=True):
            for number, digest in enumerate(part.chunks if part.is_file else ()):
                try:
                    content = self.read_chunk(first + number)
                    self.held[first + number] = hashlib.sha256(content).digest() == digest
                except CheckpointError:
                    self.held[first + number] = False
