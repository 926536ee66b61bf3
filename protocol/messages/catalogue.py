"""Manifests and chunks of models and adapters, from peer to peer."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.protocol.messages.fields import (
    DIGEST_BYTES,
    MAX_CHUNKS,
    MAX_PAYLOAD_BYTES,
    PEER,
    Array,
    BlobField,
    Bytes,
    Message,
    Uint,
    wire,
)


@dataclass(frozen=True, slots=True)
class GetManifest(Message):
    """First message of a stream: send me the manifest with this digest."""

    TAG = 60
    manifest_digest: bytes = wire(1, Bytes(DIGEST_BYTES, DIGEST_BYTES))


@dataclass(frozen=True, slots=True)
class ManifestPiece(Message):
    """Pieces follow each other until ``total_bytes`` are there; then the signatures."""

    TAG = 61
    total_bytes: int = wire(1, Uint(32 * 1024 * 1024))
    content: bytes = wire(2, BlobField(1024 * 1024))


@dataclass(frozen=True, slots=True)
class ManifestSignatures(Message):
    """Who stands behind the manifest that was just sent; one signature for each publisher."""

    TAG = 62
    publishers: tuple[str, ...] = wire(1, Array(PEER, 16))
    signatures: tuple[bytes, ...] = wire(2, Array(Bytes(64, 64), 16))


@dataclass(frozen=True, slots=True)
class AskChunks(Message):
    """Which chunks of this manifest do you hold? Later ``GetChunk`` are about it too."""

    TAG = 63
    manifest_digest: bytes = wire(1, Bytes(DIGEST_BYTES, DIGEST_BYTES))


@dataclass(frozen=True, slots=True)
class ChunksHeld(Message):
    """Two bitmaps of ``ceil(chunks / 8)`` bytes each: chunks held, and chunks being fetched.

    The first chunk is the highest bit of the first byte.
    """

    TAG = 64
    bitmaps: bytes = wire(1, BlobField(2 * MAX_CHUNKS // 8))


@dataclass(frozen=True, slots=True)
class GetChunk(Message):
    """Send me this chunk. Requests may follow each other; they are answered in their order."""

    TAG = 65
    chunk: int = wire(1, Uint(MAX_CHUNKS - 1))


@dataclass(frozen=True, slots=True)
class Chunk(Message):
    """The bytes of a chunk. The receiver checks them by the hash in its manifest."""

    TAG = 66
    chunk: int = wire(1, Uint(MAX_CHUNKS - 1))
    content: bytes = wire(2, BlobField(MAX_PAYLOAD_BYTES))
