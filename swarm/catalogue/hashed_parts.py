"""The tensors of a directory as parts of a manifest, with the hashes of their chunks.

Hashing reads everything, so its result is kept in the user's cache folder until one of the files
changes. Reading ranges of a part out of whatever files its tensors lie in is here as well: this is
how a plain checkpoint directory serves chunks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm.catalogue.safetensors_file import TensorInfo
from swarm.protocol.errors import CheckpointError
from swarm.protocol.manifest import Manifest, Part, Tensor, chunk_bytes_for, revision_of

log = logging.getLogger(__name__)

CACHED_FROM_BYTES = 64 * 1024 * 1024
"""Smaller directories are hashed faster than a cache is read."""
HASHING_THREADS = 4
ENDS_FILE = "ends.safetensors"
CONFIG_KEYS_WITHOUT_MEANING = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "_attn_implementation",
        "output_attentions",
        "output_hidden_states",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
    }
)


@dataclass(frozen=True, slots=True)
class HashedParts:
    """What the revision of weights is made of."""

    config_digest: bytes
    chunk_bytes: int
    parts: tuple[Part, ...]
    """Those with tensors: first what belongs to no block, then block by block."""

    @property
    def revision(self) -> bytes:
        return revision_of(self.config_digest, self.chunk_bytes, self.parts)

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> HashedParts:
        parts = tuple(part for part in manifest.parts if not part.is_file)
        return cls(manifest.config_digest, manifest.chunk_bytes, parts)


def config_digest(config: Mapping[str, Any]) -> bytes:
    """SHA-256 of a configuration without the keys that change no result."""
    meaning = {k: v for k, v in config.items() if k not in CONFIG_KEYS_WITHOUT_MEANING}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).digest()


def hashed_parts(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    block_of: Callable[[str], int | None],
) -> HashedParts:
    """Group tensors by block and hash their chunks. Raises CheckpointError for unreadable files."""
    grouped: dict[int | None, list[TensorInfo]] = {}
    for name in sorted(tensors):
        grouped.setdefault(block_of(name), []).append(tensors[name])
    order = sorted(grouped, key=lambda block: -1 if block is None else block)
    total_bytes = sum(info.size_bytes for info in tensors.values())
    chunk_bytes = chunk_bytes_for(total_bytes)
    known = _Cache(directory, tensors) if total_bytes >= CACHED_FROM_BYTES else None
    hashes = known.read(len(order)) if known is not None else None
    if hashes is None:
        readers = [PartBytes(grouped[block]) for block in order]
        with ThreadPoolExecutor(min(HASHING_THREADS, os.cpu_count() or 1)) as threads:
            hashes = list(threads.map(lambda reader: reader.hash_chunks(chunk_bytes), readers))
        if known is not None:
            known.write(hashes)
    parts = []
    for block, chunks in zip(order, hashes, strict=True):
        members = tuple(Tensor(info.name, info.dtype, info.shape) for info in grouped[block])
        parts.append(
            Part(
                name=part_file(block),
                size_bytes=sum(tensor.size_bytes for tensor in members),
                chunks=tuple(chunks),
                tensors=members,
                first_block=0 if block is None else block,
                end_block=0 if block is None else block + 1,
            )
        )
    return HashedParts(config_digest(config), chunk_bytes, tuple(parts))


def part_file(block: int | None) -> str:
    """Name of the file that holds a block's tensors, or those of no block."""
    return ENDS_FILE if block is None else f"block-{block:05d}.safetensors"


class PartBytes:
    """The bytes of a part: those of its tensors one after the other, wherever they lie."""

    def __init__(self, tensors: Sequence[TensorInfo]) -> None:
        self._tensors = [info for info in tensors if info.size_bytes]
        self._starts: list[int] = []
        self.size_bytes = 0
        for info in self._tensors:
            self._starts.append(self.size_bytes)
            self.size_bytes += info.size_bytes

    def read(self, offset: int, size_bytes: int) -> bytes:
        """So many bytes from ``offset`` on. Raises CheckpointError when a file is cut short."""
        pieces: list[bytes] = []
        index = bisect_right(self._starts, offset) - 1
        while size_bytes:
            info = self._tensors[index]
            inside = offset - self._starts[index]
            count = min(size_bytes, info.size_bytes - inside)
            pieces.append(read_range(info.file, info.offset + inside, count))
            offset, size_bytes, index = offset + count, size_bytes - count, index + 1
        return b"".join(pieces)

    def hash_chunks(self, chunk_bytes: int) -> list[bytes]:
        return [
            hashlib.sha256(self.read(start, min(chunk_bytes, self.size_bytes - start))).digest()
            for start in range(0, self.size_bytes, chunk_bytes)
        ]


def read_range(file: Path, offset: int, size_bytes: int) -> bytes:
    """A range of a file. Raises CheckpointError when the file is missing or shorter."""
    try:
        with file.open("rb", buffering=0) as stream:
            content = os.pread(stream.fileno(), size_bytes, offset)
            while len(content) < size_bytes:
                more = os.pread(stream.fileno(), size_bytes - len(content), offset + len(content))
                if not more:
                    raise CheckpointError(f"checkpoint incomplete: {file} is cut short")
                content += more
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    return content


class _Cache:
    """The chunk hashes of one directory, valid as long as its files keep size and time."""

    def __init__(self, directory: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self._state = json.dumps(
            [
                [file.name, status.st_size, status.st_mtime_ns]
                for file in sorted({info.file for info in tensors.values()})
                for status in (file.stat(),)
            ]
        )
        base = os.environ.get("XDG_CACHE_HOME")
        folder = Path(base) if base else Path.home() / ".cache"
        name = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:32]
        self._file = folder / "sovereign-swarm" / "chunk-hashes" / f"{name}.json"

    def read(self, parts: int) -> list[list[bytes]] | None:
        try:
            kept = json.loads(self._file.read_text("ascii"))
            if kept["state"] != self._state or len(kept["parts"]) != parts:
                return None
            return [[bytes.fromhex(chunk) for chunk in chunks] for chunks in kept["parts"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, parts: Sequence[Sequence[bytes]]) -> None:
        kept = {"state": self._state, "parts": [[c.hex() for c in chunks] for chunks in parts]}
        temporary = self._file.with_suffix(f".{os.getpid()}")
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_text(json.dumps(kept), "ascii")
            temporary.replace(self._file)
        except OSError as error:
            log.warning("the hashes of %s cannot be kept: %s", self._file, error.strerror)
