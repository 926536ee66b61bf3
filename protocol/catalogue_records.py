"""Directory records about models, adapters and those who hold their chunks.

How records are signed, checked and stored: ``records``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from swarm.protocol.errors import ProtocolError
from swarm.protocol.identity import PeerId
from swarm.protocol.manifest import KINDS, ManifestSignature
from swarm.protocol.messages import (
    DIGEST_BYTES,
    MAX_CHUNKS,
    MAX_STEP,
    PEER,
    Array,
    Bytes,
    Text,
    Uint,
    wire,
)

CATALOGUE_SHARDS = 16
MAX_LISTED = 6
"""Manifests that one peer lists in one shard of the catalogue."""
MAX_PROVIDER_ADDRESSES = 8


@dataclass(frozen=True, slots=True)
class CatalogueRecord:
    """Manifests that the peer can send; the fields have one item for each of them."""

    peer_id: PeerId = wire(1, PEER)
    shard: int = wire(2, Uint(CATALOGUE_SHARDS - 1))
    """``catalogue_shard(name)``, the same for all names."""
    sequence: int = wire(3, Uint(MAX_STEP))
    expires_unix_s: int = wire(4, Uint(MAX_STEP))
    names: tuple[str, ...] = wire(5, Array(Text(128), MAX_LISTED))
    kinds: tuple[int, ...] = wire(6, Array(Uint(len(KINDS) - 1), MAX_LISTED))
    """0 a model, 1 an adapter."""
    manifest_digests: tuple[bytes, ...] = wire(
        7, Array(Bytes(DIGEST_BYTES, DIGEST_BYTES), MAX_LISTED)
    )
    revisions: tuple[bytes, ...] = wire(8, Array(Bytes(DIGEST_BYTES, DIGEST_BYTES), MAX_LISTED))
    base_revisions: tuple[bytes, ...] = wire(9, Array(Bytes(0, DIGEST_BYTES), MAX_LISTED))
    """Of the model that an adapter is for; empty for models."""
    publishers: tuple[str, ...] = wire(10, Array(PEER, MAX_LISTED))
    signatures: tuple[bytes, ...] = wire(11, Array(Bytes(64, 64), MAX_LISTED))
    """Each publisher's over the manifest's digest."""

    @property
    def key(self) -> str:
        return catalogue_key(self.shard)

    def problem(self) -> str:
        """What is wrong with it; empty if nothing is."""
        columns = (
            self.kinds,
            self.manifest_digests,
            self.revisions,
            self.base_revisions,
            self.publishers,
            self.signatures,
        )
        if not self.names or any(len(column) != len(self.names) for column in columns):
            return "a catalogue record has one item in each field for each manifest"
        if len(set(self.manifest_digests)) < len(self.names):
            return "a manifest is listed twice"
        if any(not name or catalogue_shard(name) != self.shard for name in self.names):
            return "a name belongs to another shard"
        if any(len(base) not in (0, DIGEST_BYTES) for base in self.base_revisions):
            return "a revision has 32 bytes"
        try:
            for publisher, signature, digest in zip(
                self.publishers, self.signatures, self.manifest_digests, strict=True
            ):
                ManifestSignature(PeerId(publisher), signature).check(digest)
        except ProtocolError as error:
            return error.detail
        return ""


@dataclass(frozen=True, slots=True)
class ProviderRecord:
    """That the peer sends chunks of a manifest; which ones, it tells when asked."""

    peer_id: PeerId = wire(1, PEER)
    manifest_digest: bytes = wire(2, Bytes(DIGEST_BYTES, DIGEST_BYTES))
    chunks_held: int = wire(3, Uint(MAX_CHUNKS))
    sequence: int = wire(4, Uint(MAX_STEP))
    expires_unix_s: int = wire(5, Uint(MAX_STEP))
    addresses: tuple[str, ...] = wire(6, Array(Text(160), MAX_PROVIDER_ADDRESSES), ())
    country: str = wire(7, Text(2), "")
    """As declared: who fetches prefers peers of its own country."""

    @property
    def key(self) -> str:
        return provider_key(self.manifest_digest)

    def problem(self) -> str:
        return ""


def catalogue_shard(name: str) -> int:
    """The shard of a name: the first byte of its SHA-256, modulo."""
    return hashlib.sha256(name.encode()).digest()[0] % CATALOGUE_SHARDS


def catalogue_key(shard: int) -> str:
    """Directory key of one shard of the catalogue."""
    return f"sovereign-swarm/v1/catalogue/{shard}"


def provider_key(manifest_digest: bytes) -> str:
    """Directory key of those who hold chunks of a manifest."""
    return f"sovereign-swarm/v1/providers/{manifest_digest.hex()}"
