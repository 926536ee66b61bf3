"""A catalogue as files: on a USB stick, a network share or any web server.

::

    catalogue.json                     what there is; a hint, the signatures count
    manifests/DIGEST.json              the manifest, byte for byte
    manifests/DIGEST.signatures.json   who stands behind it
    chunks/AB/ABCD...                  each chunk in a file named by its SHA-256

Chunks that two revisions share are there once; no file is larger than 4 MiB.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm.catalogue.holdings import Holding
from swarm.catalogue.store import read_bounded, signatures_from_json, signatures_to_json
from swarm.protocol.errors import CheckpointError, UsageError
from swarm.protocol.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    ManifestError,
    ManifestSignature,
    parse_manifest,
)

CATALOGUE_FILE = "catalogue.json"
MAX_CATALOGUE_BYTES = 8 * 1024 * 1024
MAX_SIGNATURES_BYTES = 64 * 1024
TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class MirrorEntry:
    """What the list of a mirror says of a manifest."""

    name: str
    kind: str
    digest: bytes


class FileMirror:
    """A mirror in a folder or under a ``http://`` or ``https://`` address."""

    def __init__(self, location: str) -> None:
        self.name = location
        is_web = location.startswith(("http://", "https://"))
        self._read: Callable[[str, int], bytes] = self._read_web if is_web else self._read_folder

    async def chunk(self, digest: bytes, size_bytes: int) -> bytes | None:
        """The chunk with this hash, unchecked; None when it is not there."""
        name = digest.hex()
        return await asyncio.to_thread(self._optional, f"chunks/{name[:2]}/{name}", size_bytes)

    async def entries(self) -> list[MirrorEntry]:
        """What the mirror has; empty when it is not there or makes no sense."""
        content = await asyncio.to_thread(self._optional, CATALOGUE_FILE, MAX_CATALOGUE_BYTES)
        return [] if content is None else _entries(content)

    async def manifest(
        self, digest: bytes
    ) -> tuple[Manifest, tuple[ManifestSignature, ...]] | None:
        """A manifest and those of its signatures that are right; None when it is not there."""
        file = f"manifests/{digest.hex()}"
        content = await asyncio.to_thread(self._optional, f"{file}.json", MAX_MANIFEST_BYTES)
        if content is None:
            return None
        try:
            manifest = parse_manifest(content, digest)
        except ManifestError:
            return None
        signed = await asyncio.to_thread(
            self._optional, f"{file}.signatures.json", MAX_SIGNATURES_BYTES
        )
        return manifest, signatures_from_json(signed or b"", digest)

    def _optional(self, path: str, maximum_bytes: int) -> bytes | None:
        try:
            return self._read(path, maximum_bytes)
        except (CheckpointError, OSError, http.client.HTTPException, ValueError):
            return None

    def _read_folder(self, path: str, maximum_bytes: int) -> bytes:
        return read_bounded(Path(self.name).expanduser() / path, maximum_bytes)

    def _read_web(self, path: str, maximum_bytes: int) -> bytes:
        address = urllib.parse.urljoin(self.name.rstrip("/") + "/", path)
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:  # noqa: S310
            content: bytes = answer.read(maximum_bytes + 1)
        if len(content) > maximum_bytes:
            raise CheckpointError(f"{address} is larger than {maximum_bytes} bytes")
        return content


def write_mirror(
    folder: Path, holdings: Sequence[Holding], progress: Callable[[int, int], None] | None = None
) -> None:
    """Add complete revisions to a mirror folder; what is there already is not written again.

    ``progress`` is told chunks done and chunks in all. Blocks; raises UsageError for a revision
    that is not complete, CheckpointError when files cannot be read or written.
    """
    for holding in holdings:
        if not holding.held.all():
            raise UsageError(f"{holding.manifest.name} is not complete here; pull it first")
    total = sum(holding.manifest.number_of_chunks for holding in holdings)
    done = 0
    try:
        (folder / "manifests").mkdir(parents=True, exist_ok=True)
        for holding in holdings:
            for chunk in range(holding.manifest.number_of_chunks):
                name = holding.manifest.chunk_digest(chunk).hex()
                target = folder / "chunks" / name[:2] / name
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _write(target, holding.read_chunk(chunk))
                done += 1
                if progress is not None:
                    progress(done, total)
            file = folder / "manifests" / holding.manifest.digest.hex()
            _write(file.with_suffix(".json"), holding.manifest.content)
            _write(file.with_suffix(".signatures.json"), signatures_to_json(holding.signatures))
        _write(folder / CATALOGUE_FILE, _list(folder, holdings))
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}") from error


def _list(folder: Path, holdings: Iterable[Holding]) -> bytes:
    known: dict[bytes, MirrorEntry] = {}
    with contextlib.suppress(CheckpointError):
        content = read_bounded(folder / CATALOGUE_FILE, MAX_CATALOGUE_BYTES)
        known = {entry.digest: entry for entry in _entries(content)}
    for holding in holdings:
        manifest = holding.manifest
        known[manifest.digest] = MirrorEntry(manifest.name, manifest.kind, manifest.digest)
    listed = [
        {"name": entry.name, "kind": entry.kind, "digest": entry.digest.hex()}
        for entry in sorted(known.values(), key=lambda entry: (entry.name, entry.digest))
    ]
    return json.dumps({"format": 1, "manifests": listed}, indent=1).encode("utf-8")


def _entries(content: bytes) -> list[MirrorEntry]:
    try:
        listed: Any = json.loads(content)["manifests"]
        return [
            MirrorEntry(str(item["name"]), str(item["kind"]), bytes.fromhex(item["digest"]))
            for item in listed
        ]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _write(file: Path, content: bytes) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(file)
