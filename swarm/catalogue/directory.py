"""The catalogue in the DHT: which manifests there are, who publishes them, who holds their chunks.

Everybody who holds chunks says so under the manifest's key, and a few of them list the manifest in
the shard of its name. Who lists one need not have published it: the entry has the publisher's
signature. Which publishers to believe is for the reader to know (a charter, or settings).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from swarm.catalogue.download import Source
from swarm.catalogue.holdings import Holding
from swarm.connection import Connection
from swarm.membership import EXPIRY_PERIODS, RecordReader
from swarm.ports import Clock, Directory, Transport
from swarm.protocol.catalogue_records import (
    CATALOGUE_SHARDS,
    MAX_LISTED,
    CatalogueRecord,
    ProviderRecord,
    catalogue_key,
    catalogue_shard,
    provider_key,
)
from swarm.protocol.errors import (
    ErrorCode,
    NetworkError,
    ProtocolError,
    SwarmError,
    UsageError,
)
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.manifest import (
    KINDS,
    MAX_MANIFEST_BYTES,
    Manifest,
    ManifestSignature,
    parse_manifest,
)
from swarm.protocol.messages import GetManifest, ManifestPiece, ManifestSignatures
from swarm.protocol.records import Record, sign_record
from swarm.protocol.version import WEIGHTS_PROTOCOL

log = logging.getLogger(__name__)

LISTERS = 4
"""So many peers list a manifest; further ones only say that they hold it."""
PROVIDERS = 256
"""So many peers say that they hold a manifest: more than anybody will ask."""
FETCH_MANIFEST_S = 30.0


@dataclass(frozen=True, slots=True)
class Listed:
    """A manifest in the catalogue, and the publishers whose signatures were right."""

    name: str
    kind: str
    digest: bytes
    revision: bytes
    base_revision: bytes
    signatures: tuple[ManifestSignature, ...]
    listers: int
    """How many peers list it."""

    @property
    def publishers(self) -> frozenset[PeerId]:
        return frozenset(item.publisher for item in self.signatures)


class CatalogueAnnouncer:
    """Keeps the records of what a peer holds alive; the application owns the task of ``run``."""

    def __init__(
        self,
        identity: Identity,
        directory: Directory,
        clock: Clock,
        holdings: Callable[[], Mapping[bytes, Holding]],
        *,
        addresses: Callable[[], Sequence[str]],
        country: str = "",
        announce_period_s: float = 30.0,
    ) -> None:
        self._identity = identity
        self._directory = directory
        self._clock = clock
        self._reader = RecordReader(directory, clock)
        self._holdings = holdings
        self._addresses = addresses
        self._country = country
        self._period_s = announce_period_s
        self._sequence = 0
        self._changed = asyncio.Event()
        self._announced = asyncio.Event()

    def announce_now(self) -> None:
        """A holding was added: do not wait for the end of the period."""
        self._changed.set()
        self._announced.clear()

    async def announced(self) -> None:
        """Wait until everything was announced once; ``run`` must be running."""
        await self._announced.wait()

    async def run(self) -> None:
        """Announce until cancelled. Network errors are logged and tried again."""
        while True:
            self._changed.clear()
            try:
                await self.announce()
                if not self._changed.is_set():
                    self._announced.set()
            except NetworkError as error:
                log.warning("could not announce what is held: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._period_s):
                    await self._changed.wait()

    async def announce(self) -> None:
        """Store all records once."""
        holdings = tuple(self._holdings().values())
        for holding in holdings:
            await self._announce_provider(holding)
        shards: dict[int, list[Holding]] = {}
        for holding in holdings:
            if holding.signatures:
                shards.setdefault(catalogue_shard(holding.manifest.name), []).append(holding)
        for shard, members in shards.items():
            await self._announce_listing(shard, members)

    async def _announce_provider(self, holding: Holding) -> None:
        key = provider_key(holding.manifest.digest)
        known = await self._reader.read(key)
        if sum(record.peer_id < self._identity.peer_id for record in known) >= PROVIDERS:
            return
        await self._store(
            key,
            ProviderRecord(
                peer_id=self._identity.peer_id,
                manifest_digest=holding.manifest.digest,
                chunks_held=int(holding.held.sum()),
                sequence=self._next_sequence(),
                expires_unix_s=self._expiry(),
                addresses=tuple(self._addresses()),
                country=self._country,
            ),
        )

    async def _announce_listing(self, shard: int, holdings: Sequence[Holding]) -> None:
        key = catalogue_key(shard)
        listers: dict[bytes, int] = {}
        for record in await self._reader.read(key):
            if isinstance(record, CatalogueRecord) and record.peer_id < self._identity.peer_id:
                for digest in record.manifest_digests:
                    listers[digest] = listers.get(digest, 0) + 1
        entries = [
            (holding, signature)
            for holding in holdings
            if listers.get(holding.manifest.digest, 0) < LISTERS
            for signature in holding.signatures[:1]
        ][:MAX_LISTED]
        if not entries:
            return
        await self._store(
            key,
            CatalogueRecord(
                peer_id=self._identity.peer_id,
                shard=shard,
                sequence=self._next_sequence(),
                expires_unix_s=self._expiry(),
                names=tuple(item.manifest.name for item, _ in entries),
                kinds=tuple(KINDS.index(item.manifest.kind) for item, _ in entries),
                manifest_digests=tuple(item.manifest.digest for item, _ in entries),
                revisions=tuple(item.manifest.revision for item, _ in entries),
                base_revisions=tuple(item.manifest.base_revision for item, _ in entries),
                publishers=tuple(signature.publisher for _, signature in entries),
                signatures=tuple(signature.signature for _, signature in entries),
            ),
        )

    async def _store(self, key: str, record: CatalogueRecord | ProviderRecord) -> None:
        value = sign_record(self._identity, record)
        await self._directory.store(key, value, record.expires_unix_s)

    def _expiry(self) -> int:
        return int(self._clock.unix_s() + EXPIRY_PERIODS * self._period_s)

    def _next_sequence(self) -> int:
        self._sequence = max(self._sequence + 1, int(self._clock.unix_s() * 1000))
        return self._sequence


class Catalogue:
    """Reads the catalogue; believes only some publishers, if it is told which."""

    def __init__(
        self,
        transport: Transport,
        directory: Directory,
        clock: Clock,
        *,
        trusted: Collection[PeerId] | None = None,
        country: str = "",
    ) -> None:
        """``trusted`` None believes every publisher."""
        self._transport = transport
        self._reader = RecordReader(directory, clock)
        self._clock = clock
        self._trusted = trusted
        self._country = country

    async def all(self) -> list[Listed]:
        """All manifests of believed publishers, by name."""
        found: list[Listed] = []
        for shard in range(CATALOGUE_SHARDS):
            found += self._listed(await self._reader.read(catalogue_key(shard)))
        return sorted(found, key=lambda item: (item.name, item.digest))

    async def find(self, name: str, revision: bytes = b"") -> list[Listed]:
        """The manifests of a name (and a revision, or the beginning of one), best known first."""
        records = await self._reader.read(catalogue_key(catalogue_shard(name)))
        found = [
            item
            for item in self._listed(records)
            if item.name == name and item.revision.startswith(revision)
        ]
        return sorted(found, key=lambda item: (-item.listers, item.digest))

    def _listed(self, records: Iterable[Record]) -> list[Listed]:
        found: dict[bytes, Listed] = {}
        for record in records:
            if not isinstance(record, CatalogueRecord):
                continue
            for index, digest in enumerate(record.manifest_digests):
                publisher = PeerId(record.publishers[index])
                if self._trusted is not None and publisher not in self._trusted:
                    continue
                signature = ManifestSignature(publisher, record.signatures[index])
                known = found.get(digest)
                signatures = known.signatures if known is not None else ()
                if publisher not in {item.publisher for item in signatures}:
                    signatures = (*signatures, signature)
                found[digest] = Listed(
                    name=record.names[index],
                    kind=KINDS[record.kinds[index]],
                    digest=digest,
                    revision=record.revisions[index],
                    base_revision=record.base_revisions[index],
                    signatures=signatures,
                    listers=1 if known is None else known.listers + 1,
                )
        return list(found.values())

    async def sources(self, digest: bytes) -> list[Source]:
        """Who says that they send chunks of a manifest."""
        return [
            Source(
                record.peer_id,
                record.addresses,
                is_near=bool(self._country) and record.country == self._country,
            )
            for record in await self._reader.read(provider_key(digest))
            if isinstance(record, ProviderRecord)
        ]

    async def complete_holders(self, manifest: Manifest) -> set[PeerId]:
        """Who says that they hold all of it."""
        return {
            record.peer_id
            for record in await self._reader.read(provider_key(manifest.digest))
            if isinstance(record, ProviderRecord)
            and record.chunks_held >= manifest.number_of_chunks
        }

    async def manifest(self, listed: Listed) -> tuple[Manifest, tuple[ManifestSignature, ...]]:
        """Fetch a manifest from any peer that has it. Raises NetworkError when none sends it."""
        for source in await self.sources(listed.digest):
            if source.peer_id == self._transport.peer_id:
                continue
            try:
                async with asyncio.timeout(FETCH_MANIFEST_S):
                    manifest, signatures = await fetch_manifest(
                        self._transport, source, listed.digest
                    )
            except (TimeoutError, SwarmError) as error:
                log.info("%s does not send the manifest: %s", source.peer_id, error)
                continue
            if (manifest.name, manifest.revision) != (listed.name, listed.revision):
                log.info("the catalogue describes %s wrongly", listed.digest.hex())
                continue
            mine = {item.publisher: item for item in (*signatures, *listed.signatures)}
            return manifest, tuple(mine.values())
        raise NetworkError(f"nobody sends the manifest of {listed.name} now; try again later")


async def fetch_manifest(
    transport: Transport, source: Source, digest: bytes
) -> tuple[Manifest, tuple[ManifestSignature, ...]]:
    """Ask one peer; signatures that are not right are left out. Raises SwarmErrors."""
    stream = await transport.open(source.peer_id, WEIGHTS_PROTOCOL, source.addresses)
    async with Connection(stream) as connection:
        connection.maximum_payload_bytes = 1024 * 1024
        await connection.say_hello(GetManifest(manifest_digest=digest))
        content = bytearray()
        while True:
            piece = await connection.receive_only(ManifestPiece)
            content += piece.content
            if len(content) > min(piece.total_bytes, MAX_MANIFEST_BYTES):
                raise ProtocolError(ErrorCode.TOO_LARGE, "manifest")
            if len(content) == piece.total_bytes:
                break
        manifest = parse_manifest(bytes(content), digest)
        sent = await connection.receive_only(ManifestSignatures)
    signatures = []
    for publisher, signature in zip(sent.publishers, sent.signatures, strict=False):
        checked = ManifestSignature(PeerId(publisher), signature)
        with contextlib.suppress(ProtocolError):
            checked.check(digest)
            signatures.append(checked)
    return manifest, tuple(signatures)


def choose_listed(found: Sequence[Listed], name: str) -> Listed | None:
    """The only revision of a name; None when there is no such name. Raises UsageError for several.

    Several manifests of one revision differ in files such as licences: the best known is taken.
    """
    if not found:
        return None
    revisions = {item.revision: item for item in reversed(found)}
    if len(revisions) > 1:
        choices = ", ".join(
            f"{name}@{revision.hex()[:12]} by {min(item.publishers)}"
            for revision, item in sorted(revisions.items())
        )
        raise UsageError(f"there are several revisions of {name}: {choices}; name one of these")
    return found[0]


def split_name(text: str) -> tuple[str, bytes]:
    """``NAME@0123abcd`` to the name and the beginning of a revision. Raises UsageError."""
    name, _, revision = text.partition("@")
    if len(revision) % 2:
        revision = revision[:-1]
    try:
        return name, bytes.fromhex(revision)
    except ValueError:
        raise UsageError(f"{text!r}: after @ comes a revision in hexadecimal") from None
