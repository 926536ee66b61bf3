"""The manifest: which bytes make up one revision of a model or an adapter.

A manifest is ASCII JSON; SHA-256 over its exact bytes is its *digest*, and publishers sign that
digest. It lists *parts*: plain files (configuration, tokenizer, chat template, licence), the
tensors of each block, and the tensors outside of blocks. The bytes of a part are cut into chunks of
one size; of each chunk the manifest has the SHA-256. A node fetches the parts of its blocks only.

The *revision* is what nodes announce and sessions name: a hash over what changes results, that is
the configuration, the tensors and their chunks. It follows from the weights alone, however they are
spread over files and whatever files lie beside them, so that nodes that host from a plain directory
and nodes that fetched chunks agree.

How directories become manifests: ``swarm.catalogue.description``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from swarm.protocol.errors import ErrorCode, ProtocolError, UsageError
from swarm.protocol.identity import Identity, PeerId, verify
from swarm.protocol.messages import MAX_BLOCKS

DIGEST_BYTES = 32
MAX_MANIFEST_BYTES = 32 * 1024 * 1024
MAX_PARTS = MAX_BLOCKS + 65
MAX_CHUNKS = 1 << 20
MAX_TENSORS_PER_PART = 8192
MAX_ATTRIBUTES = 32
MAX_TOTAL_BYTES = 1 << 45
SMALLEST_CHUNK_BYTES = 1024 * 1024
LARGEST_CHUNK_BYTES = 4 * 1024 * 1024
"""What one message may carry."""
WANTED_CHUNKS = 1 << 16
SIGNATURE_CONTEXT = b"manifest"
FORMAT = 1

ITEM_BYTES: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Dtypes of tensors, as torch spells them, and the size of one element."""

KINDS = ("model", "adapter")
_PART_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,95}")
_RESERVED_NAMES = frozenset({"manifest.json", "signatures.json", "model.safetensors.index.json"})
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_PRINTABLE = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]*")


class ManifestError(ProtocolError):
    """Bytes from a peer, a mirror or a disk that are no valid manifest."""

    def __init__(self, detail: str) -> None:
        super().__init__(ErrorCode.BAD_FIELD, detail)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A row-major, little endian tensor; tensors of a part follow each other without a gap."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        size = ITEM_BYTES[self.dtype]
        for dimension in self.shape:
            size *= dimension
        return size


@dataclass(frozen=True, slots=True)
class Part:
    """A run of bytes that is fetched and stored as a whole: a plain file or the tensors of a block.

    ``first_block`` and ``end_block`` are both 0 for what belongs to no block.
    """

    name: str
    """Of its file in a store. Unique within the manifest."""
    size_bytes: int
    chunks: tuple[bytes, ...]
    """SHA-256 of each chunk."""
    tensors: tuple[Tensor, ...] = ()
    """In the order of their bytes; empty for a plain file."""
    first_block: int = 0
    end_block: int = 0

    @property
    def is_file(self) -> bool:
        return not self.tensors

    def belongs_to(self, first_block: int, end_block: int) -> bool:
        """Whether it holds tensors of any of these blocks."""
        return self.first_block < end_block and self.end_block > first_block


@dataclass(frozen=True)
class Manifest:
    """A parsed manifest; ``content`` is what was hashed and signed."""

    kind: str
    name: str
    revision: bytes
    licence: str
    base_revision: bytes
    """Of the model that an adapter is for; empty for a model."""
    config_digest: bytes
    number_of_blocks: int
    hidden_size: int
    chunk_bytes: int
    parts: tuple[Part, ...]
    attributes: Mapping[str, str]
    """Further statements of the publisher, such as prices, payees, data or thresholds."""
    content: bytes = field(repr=False)

    @cached_property
    def digest(self) -> bytes:
        """The name of exactly these bytes, by which the manifest is fetched."""
        return hashlib.sha256(self.content).digest()

    @property
    def total_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    @cached_property
    def first_chunks(self) -> tuple[int, ...]:
        """For each part the number of its first chunk; chunks are numbered through all parts."""
        numbers, number = [], 0
        for part in self.parts:
            numbers.append(number)
            number += len(part.chunks)
        return tuple(numbers)

    @cached_property
    def number_of_chunks(self) -> int:
        return sum(len(part.chunks) for part in self.parts)

    def part(self, name: str) -> Part | None:
        return next((part for part in self.parts if part.name == name), None)

    def locate(self, chunk: int) -> tuple[int, int, int]:
        """Index of the part, offset in it and size in bytes of a chunk. Raises IndexError."""
        if not 0 <= chunk < self.number_of_chunks:
            raise IndexError(chunk)
        low, high = 0, len(self.parts)
        while high - low > 1:
            middle = (low + high) // 2
            if self.first_chunks[middle] <= chunk:
                low = middle
            else:
                high = middle
        offset = (chunk - self.first_chunks[low]) * self.chunk_bytes
        return low, offset, min(self.chunk_bytes, self.parts[low].size_bytes - offset)

    def chunk_digest(self, chunk: int) -> bytes:
        """SHA-256 of a chunk."""
        part, offset, _ = self.locate(chunk)
        return self.parts[part].chunks[offset // self.chunk_bytes]

    def chunks_of(self, parts: Iterable[Part]) -> set[int]:
        """The numbers of all chunks of some parts."""
        wanted = {part.name for part in parts}
        return {
            first + index
            for first, part in zip(self.first_chunks, self.parts, strict=True)
            if part.name in wanted
            for index in range(len(part.chunks))
        }

    def files(self) -> tuple[Part, ...]:
        """Configuration, tokenizer and the like: everybody needs these."""
        return tuple(part for part in self.parts if part.is_file)

    def parts_of_blocks(self, first_block: int, end_block: int) -> tuple[Part, ...]:
        """What a node that hosts these blocks needs beside the files."""
        return tuple(part for part in self.parts if part.belongs_to(first_block, end_block))

    def end_parts(self) -> tuple[Part, ...]:
        """Tensors of no block (embeddings, final norm, head): what a client needs."""
        return tuple(part for part in self.parts if part.tensors and not part.end_block)


def chunk_bytes_for(total_bytes: int) -> int:
    """Size of chunks for so many bytes of tensors: 1 MiB, more where there would be 65,536.

    It follows from the size, so that everybody who describes the same weights gets the same chunks.
    """
    size = SMALLEST_CHUNK_BYTES
    while size < LARGEST_CHUNK_BYTES and total_bytes > size * WANTED_CHUNKS:
        size *= 2
    return size


def revision_of(config_digest: bytes, chunk_bytes: int, parts: Iterable[Part]) -> bytes:
    """The 32 bytes that identify weights: configuration, tensors, chunks; no names of files."""
    content = {
        "config": config_digest.hex(),
        "chunk_bytes": chunk_bytes,
        "parts": [
            [
                [part.first_block, part.end_block],
                [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in part.tensors],
                [chunk.hex() for chunk in part.chunks],
            ]
            for part in sorted(parts, key=lambda part: (part.first_block, part.end_block))
            if not part.is_file
        ],
    }
    return hashlib.sha256(b"sovereign-swarm revision 2\n" + _json(content)).digest()


def make_manifest(
    *,
    kind: str,
    name: str,
    config_digest: bytes,
    number_of_blocks: int,
    hidden_size: int,
    chunk_bytes: int,
    parts: Sequence[Part],
    licence: str = "",
    base_revision: bytes = b"",
    attributes: Mapping[str, str] | None = None,
) -> Manifest:
    """Serialise a manifest and read it back. Raises UsageError for one that no peer accepts."""
    content = {
        "format": FORMAT,
        "kind": kind,
        "name": name,
        "licence": licence,
        "base": base_revision.hex(),
        "config": config_digest.hex(),
        "number_of_blocks": number_of_blocks,
        "hidden_size": hidden_size,
        "chunk_bytes": chunk_bytes,
        "attributes": dict(attributes or {}),
        "parts": [
            {
                "name": part.name,
                "bytes": part.size_bytes,
                "blocks": [part.first_block, part.end_block],
                "tensors": [[item.name, item.dtype, list(item.shape)] for item in part.tensors],
                "chunks": [chunk.hex() for chunk in part.chunks],
            }
            for part in parts
        ],
    }
    try:
        return parse_manifest(_json(content))
    except ManifestError as error:
        raise UsageError(f"{name} cannot be published: {error.detail}") from error


def parse_manifest(content: bytes, digest: bytes | None = None) -> Manifest:
    """Read and check a manifest, and that it is the one with this digest. Raises ManifestError."""
    if len(content) > MAX_MANIFEST_BYTES:
        raise ManifestError("too large")
    if digest is not None and hashlib.sha256(content).digest() != digest:
        raise ManifestError("not the manifest that was asked for")
    try:
        value = json.loads(content, parse_float=_refuse, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ManifestError("no valid JSON") from error
    return _Reader(value).manifest(content)


# --- signatures ----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class ManifestSignature:
    """That a publisher stands behind the manifest with some digest."""

    publisher: PeerId
    signature: bytes

    def check(self, digest: bytes) -> None:
        """Raises ProtocolError(BAD_FIELD) unless it is the publisher's for this digest."""
        verify(self.publisher, SIGNATURE_CONTEXT, digest, self.signature)


def sign_manifest(identity: Identity, manifest: Manifest) -> ManifestSignature:
    """Stand behind a manifest with our own key."""
    return ManifestSignature(identity.peer_id, identity.sign(SIGNATURE_CONTEXT, manifest.digest))


# --- reading -------------------------------------------------------------------------------------
def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def _refuse(text: str) -> object:
    raise ValueError(f"{text[:20]} is no integer")


class _Reader:
    """Checks the JSON value of a manifest, field by field, and makes it a Manifest."""

    def __init__(self, value: object) -> None:
        self._top = _mapping(value)

    def manifest(self, content: bytes) -> Manifest:
        top = self._top
        if top.get("format") != FORMAT:
            raise ManifestError("of an unknown format")
        kind = _text(top, "kind", 16)
        if kind not in KINDS:
            raise ManifestError("of an unknown kind")
        chunk_bytes = _natural(top, "chunk_bytes", LARGEST_CHUNK_BYTES)
        if chunk_bytes < SMALLEST_CHUNK_BYTES or chunk_bytes.bit_count() != 1:
            raise ManifestError("chunks have 1, 2 or 4 MiB")
        blocks = _natural(top, "number_of_blocks", MAX_BLOCKS)
        parts = tuple(
            self._part(value, chunk_bytes, blocks) for value in _list(top, "parts", MAX_PARTS)
        )
        if len({part.name for part in parts}) < len(parts):
            raise ManifestError("two parts have the same name")
        if sum(len(part.chunks) for part in parts) > MAX_CHUNKS:
            raise ManifestError("too many chunks")
        if sum(part.size_bytes for part in parts) > MAX_TOTAL_BYTES:
            raise ManifestError("too large")
        config_digest = _digest(top.get("config"))
        name = _text(top, "name", 128)
        if not name:
            raise ManifestError("it has no name")
        base = top.get("base", "")
        return Manifest(
            kind=kind,
            name=name,
            revision=revision_of(config_digest, chunk_bytes, parts),
            licence=_text(top, "licence", 128),
            base_revision=_digest(base) if base != "" else b"",
            config_digest=config_digest,
            number_of_blocks=blocks,
            hidden_size=_natural(top, "hidden_size", 1 << 20),
            chunk_bytes=chunk_bytes,
            parts=parts,
            attributes=_attributes(top.get("attributes", {})),
            content=content,
        )

    @staticmethod
    def _part(value: object, chunk_bytes: int, number_of_blocks: int) -> Part:
        entry = _mapping(value)
        name = _text(entry, "name", 96)
        if not _PART_NAME.fullmatch(name) or name in _RESERVED_NAMES:
            raise ManifestError("a part's name is no plain file name")
        size_bytes = _natural(entry, "bytes", MAX_TOTAL_BYTES)
        span = _list(entry, "blocks", 2)
        if len(span) != 2:
            raise ManifestError("blocks are a first and an end")
        first, end = (_is_natural(item, MAX_BLOCKS) for item in span)
        if (first, end) != (0, 0) and not first < end <= number_of_blocks:
            raise ManifestError("a part's blocks do not lie within the model")
        tensors = tuple(map(_tensor, _list(entry, "tensors", MAX_TENSORS_PER_PART)))
        if tensors and sum(tensor.size_bytes for tensor in tensors) != size_bytes:
            raise ManifestError("a part is not as large as its tensors")
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise ManifestError("a tensor is listed twice")
        chunks = tuple(map(_digest, _list(entry, "chunks", MAX_CHUNKS)))
        if len(chunks) != -(-size_bytes // chunk_bytes):
            raise ManifestError("a part has too few or too many chunks")
        return Part(name, size_bytes, chunks, tensors, first, end)


def _tensor(value: object) -> Tensor:
    if not isinstance(value, list) or len(value) != 3:
        raise ManifestError("a tensor has a name, a dtype and a shape")
    name, dtype, shape = value
    if not isinstance(name, str) or not 0 < len(name) <= 256 or not name.isprintable():
        raise ManifestError("a tensor's name is malformed")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ManifestError("a tensor has an unknown dtype")
    if not isinstance(shape, list) or len(shape) > 8:
        raise ManifestError("a tensor's shape is malformed")
    return Tensor(name, dtype, tuple(_is_natural(item, 1 << 40) for item in shape))


def _attributes(value: object) -> Mapping[str, str]:
    entries = _mapping(value)
    if len(entries) > MAX_ATTRIBUTES:
        raise ManifestError("too many attributes")
    return {key: _text(entries, key, 4096) for key in entries if _text({"k": key}, "k", 64)}


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ManifestError("not an object where one is needed")
    return value


def _list(entry: Mapping[str, Any], key: str, maximum: int) -> list[Any]:
    value = entry.get(key)
    if not isinstance(value, list) or len(value) > maximum:
        raise ManifestError(f"{key} is no list, or too long")
    return value


def _text(entry: Mapping[str, Any], key: str, maximum: int) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or len(value) > maximum or not _PRINTABLE.fullmatch(value):
        raise ManifestError(f"{key} is no text, or too long")
    return value


def _natural(entry: Mapping[str, Any], key: str, maximum: int) -> int:
    return _is_natural(entry.get(key), maximum)


def _is_natural(value: object, maximum: int) -> int:
    if type(value) is not int or not 0 <= value <= maximum:
        raise ManifestError("a number is missing or out of its bounds")
    return value


def _digest(value: object) -> bytes:
    if not isinstance(value, str) or not _HEX_DIGEST.fullmatch(value):
        raise ManifestError("a digest is missing or malformed")
    return bytes.fromhex(value)
