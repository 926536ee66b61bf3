"""Revisions on disk, fetched part by part: where chunks are put, checked, found and evicted.

A revision has a folder named by its manifest's digest. In it lie the manifest, its signatures and
a file for each part that is complete; the parts with tensors are safetensors files, so that the
folder is a checkpoint directory. A part that is being fetched lies beside as ``NAME.partial``, and
what it has is found out by hashing it again: a crash at any moment loses no more than the chunks on
their way. Nothing is believed because it lies on the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from swarm.catalogue.checkpoint import MANIFEST_FILE
from swarm.catalogue.hashed_parts import read_range
from swarm.catalogue.holdings import ChunkMask
from swarm.catalogue.safetensors_file import header_for
from swarm.protocol.errors import CapacityError, CheckpointError, ProtocolError
from swarm.protocol.identity import PeerId
from swarm.protocol.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    ManifestError,
    ManifestSignature,
    Part,
    parse_manifest,
)

SIGNATURES_FILE = "signatures.json"
INDEX_FILE = "model.safetensors.index.json"
LOCK_FILE = ".lock"
PARTIAL = ".partial"
SPARE_BYTES = 256 * 1024 * 1024
"""Of the disk, which fetching never fills completely."""


class StoredRevision:
    """A ``holdings.Holding`` that grows while chunks are fetched.

    Reading and writing block: call them in threads. ``put_chunk`` may run in several at once.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, signatures: tuple[ManifestSignature, ...]
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.signatures = signatures
        self.held: ChunkMask = np.zeros(manifest.number_of_chunks, dtype=np.bool_)
        self.coming: ChunkMask = np.zeros(manifest.number_of_chunks, dtype=np.bool_)
        self._header_bytes = [
            len(header_for(part.tensors)) if part.tensors else 0 for part in manifest.parts
        ]
        for index, part in enumerate(manifest.parts):
            if self._is_complete(index, part):
                self.held[self._chunks(index)] = True

    def has(self, parts: Iterable[Part]) -> bool:
        """Whether these parts are complete on disk (``check`` says whether they are right)."""
        names = {part.name for part in parts}
        return all(
            self._is_complete(index, part)
            for index, part in enumerate(self.manifest.parts)
            if part.name in names
        )

    def recover(self, parts: Iterable[Part], progress: Callable[[int], None] | None = None) -> int:
        """Hash what lies on the disk of these parts, and keep what is right.

        Returns how many chunks are held. ``progress`` is told the bytes hashed, and may raise.
        """
        names = {part.name for part in parts}
        kept = 0
        for index, part in enumerate(self.manifest.parts):
            if part.name not in names:
                continue
            first = self.manifest.first_chunks[index]
            damaged = not self._is_complete(index, part)
            for number, digest in enumerate(part.chunks):
                is_right = self._is_right(first + number, digest)
                self.held[first + number] = is_right
                kept += is_right
                damaged = damaged or not is_right
                if progress is not None:
                    progress(self.manifest.locate(first + number)[2])
            if damaged:
                self._reopen(index, part)
        return kept

    def read_chunk(self, chunk: int) -> bytes:
        index, offset, size_bytes = self.manifest.locate(chunk)
        file = self._file(index)
        if not file.exists():
            file = self._partial(index)
        return read_range(file, self._header_bytes[index] + offset, size_bytes)

    def put_chunk(self, chunk: int, content: bytes) -> bool:
        """Keep a chunk if it is the right one; False if its hash does not fit.

        Raises CheckpointError when the disk does not take it.
        """
        index, offset, size_bytes = self.manifest.locate(chunk)
        if len(content) != size_bytes or hashlib.sha256(
            content
        ).digest() != self.manifest.chunk_digest(chunk):
            return False
        part = self.manifest.parts[index]
        try:
            descriptor = self._open_partial(index, part)
            try:
                view, position = memoryview(content), self._header_bytes[index] + offset
                while view:
                    written = os.pwrite(descriptor, view, position)
                    view, position = view[written:], position + written
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.folder}: {error.strerror}") from error
        return True

    def keep(self, chunk: int) -> None:
        """Count a chunk that was put as held; the last one of a part completes its file.

        Not for threads: of two that end a part at once one must be the last.
        """
        self.held[chunk] = True
        index, _, _ = self.manifest.locate(chunk)
        if self.held[self._chunks(index)].all():
            self._complete(index)

    def complete_empty(self, parts: Iterable[Part]) -> None:
        """Make the files of parts without a single byte."""
        for part in parts:
            if not part.chunks:
                (self.folder / part.name).write_bytes(
                    header_for(part.tensors) if part.tensors else b""
                )

    def write_index(self) -> None:
        """Make the folder readable for other software, once all parts are complete."""
        weight_map = {t.name: part.name for part in self.manifest.parts for t in part.tensors}
        index = {"metadata": {"total_size": self.manifest.total_bytes}, "weight_map": weight_map}
        (self.folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")

    @contextmanager
    def in_use(self, parts: Iterable[Part]) -> Iterator[None]:
        """While inside, no process evicts these parts."""
        descriptors = []
        try:
            for part in parts:
                with contextlib.suppress(OSError):
                    descriptor = os.open(self.folder / part.name, os.O_RDONLY)
                    descriptors.append(descriptor)
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    os.utime(self.folder / part.name)
            yield
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def try_lock(self) -> IO[bytes] | None:
        """The right to fetch into this folder, until it is closed; None: another process has it."""
        lock = (self.folder / LOCK_FILE).open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            return None
        return lock

    # --- files
    def _chunks(self, index: int) -> slice:
        first = self.manifest.first_chunks[index]
        return slice(first, first + len(self.manifest.parts[index].chunks))

    def _file(self, index: int) -> Path:
        return self.folder / self.manifest.parts[index].name

    def _partial(self, index: int) -> Path:
        return self.folder / (self.manifest.parts[index].name + PARTIAL)

    def _is_complete(self, index: int, part: Part) -> bool:
        try:
            size_bytes = (self.folder / part.name).stat().st_size
        except OSError:
            return False
        return size_bytes == self._header_bytes[index] + part.size_bytes

    def _is_right(self, chunk: int, digest: bytes) -> bool:
        try:
            return hashlib.sha256(self.read_chunk(chunk)).digest() == digest
        except CheckpointError:
            return False

    def _open_partial(self, index: int, part: Part) -> int:
        partial = self._partial(index)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
        size_bytes = self._header_bytes[index] + part.size_bytes
        if os.fstat(descriptor).st_size != size_bytes:
            os.truncate(descriptor, size_bytes)
        return descriptor

    def _reopen(self, index: int, part: Part) -> None:
        """Take a file that is not right for one that is being fetched."""
        with contextlib.suppress(FileNotFoundError):
            self._file(index).replace(self._partial(index))
        if self.held[self._chunks(index)].all() and part.chunks and self._partial(index).exists():
            self._complete(index)

    def _complete(self, index: int) -> None:
        part = self.manifest.parts[index]
        descriptor = self._open_partial(index, part)
        try:
            if part.tensors:
                os.pwrite(descriptor, header_for(part.tensors), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._partial(index).replace(self._file(index))


@dataclass(frozen=True, slots=True)
class _Evictable:
    used_unix_s: float
    size_bytes: int
    file: Path


class Store:
    """All revisions in a folder, within a limit of bytes."""

    def __init__(self, folder: Path, *, limit_bytes: int | None = None) -> None:
        self.folder = folder
        self._limit_bytes = limit_bytes

    def revisions(self) -> list[StoredRevision]:
        """All revisions of which anything is here, by name."""
        found = []
        for folder in sorted(self.folder.glob("*/")):
            with contextlib.suppress(CheckpointError):
                found.append(_read(folder))
        return sorted(found, key=lambda stored: stored.manifest.name)

    def open(self, digest: bytes) -> StoredRevision | None:
        """The revision with this manifest, or None."""
        try:
            return _read(self.folder / digest.hex())
        except CheckpointError:
            return None

    def create(
        self, manifest: Manifest, signatures: Sequence[ManifestSignature] = ()
    ) -> StoredRevision:
        """Begin to keep a revision, or open it. Raises CheckpointError when the disk refuses."""
        folder = self.folder / manifest.digest.hex()
        known = self.open(manifest.digest)
        merged = {
            item.publisher: item for item in (*(known.signatures if known else ()), *signatures)
        }
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            _write(folder / SIGNATURES_FILE, signatures_to_json(merged.values()))
            _write(folder / MANIFEST_FILE, manifest.content)
        except OSError as error:
            raise CheckpointError(f"cannot write to {folder}: {error.strerror}") from error
        return known or StoredRevision(folder, manifest, tuple(merged.values()))

    def make_room(self, wanted_bytes: int, keep: Path | None = None) -> None:
        """Evict what was not used for the longest time, until so many bytes may be fetched.

        Parts that any process uses stay, and those in the folder ``keep``. Raises CapacityError.
        """
        files = [file for file in self.folder.glob("*/*") if file.is_file()]
        used_bytes = sum(_disk_bytes(file) for file in files)
        allowed = self._allowed_bytes(used_bytes)
        evictable = [
            _Evictable(status.st_mtime, _disk_bytes(file), file)
            for file in files
            if file.parent != keep and file.suffix in (".safetensors", PARTIAL)
            for status in (file.stat(),)
        ]
        for item in sorted(evictable, key=lambda item: item.used_unix_s):
            if used_bytes + wanted_bytes <= allowed:
                return
            if _evict(item.file):
                used_bytes -= item.size_bytes
        if used_bytes + wanted_bytes > allowed:
            raise CapacityError(
                f"{wanted_bytes / 1e9:.2f} GB are to be fetched into {self.folder}, and "
                f"{max(0, allowed - used_bytes) / 1e9:.2f} GB are free there: host fewer blocks, "
                "or allow more with --disk"
            )

    def _allowed_bytes(self, used_bytes: int) -> int:
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free - SPARE_BYTES + used_bytes
        return free if self._limit_bytes is None else min(free, self._limit_bytes)


# --- files ---------------------------------------------------------------------------------------
def signatures_to_json(signatures: Iterable[ManifestSignature]) -> bytes:
    """What lies beside a manifest in stores, mirrors and kits."""
    entries = [{"publisher": s.publisher, "signature": s.signature.hex()} for s in signatures]
    return json.dumps({"signatures": entries}).encode("ascii")


def signatures_from_json(content: bytes, digest: bytes) -> tuple[ManifestSignature, ...]:
    """The signatures in it that are right; others are left out."""
    signatures = []
    try:
        entries: Any = json.loads(content)["signatures"]
        for entry in entries[:16]:
            signature = ManifestSignature(
                PeerId(str(entry["publisher"])), bytes.fromhex(entry["signature"])
            )
            with contextlib.suppress(ProtocolError):
                signature.check(digest)
                signatures.append(signature)
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
    return tuple(signatures)


def _read(folder: Path) -> StoredRevision:
    try:
        content = read_bounded(folder / MANIFEST_FILE, MAX_MANIFEST_BYTES)
        manifest = parse_manifest(content, bytes.fromhex(folder.name))
    except (ManifestError, ValueError) as error:
        raise CheckpointError(f"{folder} has no valid manifest") from error
    try:
        signatures = read_bounded(folder / SIGNATURES_FILE, 64 * 1024)
    except CheckpointError:
        signatures = b""
    return StoredRevision(folder, manifest, signatures_from_json(signatures, manifest.digest))


def read_bounded(file: Path, maximum_bytes: int) -> bytes:
    """A whole file. Raises CheckpointError when it is missing or larger."""
    try:
        with file.open("rb") as stream:
            content = stream.read(maximum_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    if len(content) > maximum_bytes:
        raise CheckpointError(f"{file} is larger than {maximum_bytes} bytes")
    return content


def _write(file: Path, content: bytes) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(file)


def _disk_bytes(file: Path) -> int:
    return file.stat().st_blocks * 512


def _evict(file: Path) -> bool:
    """Remove a part, unless a process uses it."""
    try:
        with file.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
    except OSError:
        return False
    return True
