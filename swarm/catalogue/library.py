"""A peer's share of the catalogue: what it holds, serves, looks up and fetches.

Nodes, seeds, clients and the commands of ``swarm models`` use one each. It looks for a model in the
store, in the swarm's catalogue and in mirrors, in this order; the hub is for whoever calls it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from swarm.catalogue.chunk_service import ChunkService
from swarm.catalogue.directory import (
    Catalogue,
    CatalogueAnnouncer,
    Listed,
    choose_listed,
    split_name,
)
from swarm.catalogue.download import Download, DownloadLimits, Progress, Source
from swarm.catalogue.holdings import Holding
from swarm.catalogue.mirror import FileMirror
from swarm.catalogue.rate import RateLimit
from swarm.catalogue.store import Store, StoredRevision
from swarm.ports import Clock, Directory, Transport
from swarm.protocol.errors import NetworkError, UsageError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.manifest import Manifest, ManifestSignature, Part
from swarm.protocol.version import WEIGHTS_PROTOCOL

log = logging.getLogger(__name__)

LOCK_PERIOD_S = 0.5


@dataclass(frozen=True, slots=True)
class LibrarySettings:
    """Where weights are kept, and how much of disk and network they may take."""

    folder: Path
    """Of the store."""
    disk_bytes: int | None = None
    """Most that the store may hold; None: the disk, but for a little."""
    upload_bytes_per_s: float | None = None
    download_bytes_per_s: float | None = None
    mirrors: tuple[str, ...] = ()
    """Folders or web addresses."""
    trusted: frozenset[PeerId] | None = None
    """Publishers to believe; None: every one."""
    country: str = ""
    """Ours: peers that declare the same are asked first."""
    announce_period_s: float = 30.0


class Library:
    """Holdings, and the ways to get more; see the module."""

    def __init__(
        self,
        transport: Transport,
        directory: Directory,
        clock: Clock,
        settings: LibrarySettings,
        *,
        limits: DownloadLimits | None = None,
    ) -> None:
        self._transport = transport
        self._directory = directory
        self._clock = clock
        self._settings = settings
        self._limits = limits
        self._download_rate = RateLimit(settings.download_bytes_per_s, clock)
        self._holdings: dict[bytes, Holding] = {}
        self._announcer: CatalogueAnnouncer | None = None
        self.store = Store(settings.folder, limit_bytes=settings.disk_bytes)
        self.mirrors = tuple(map(FileMirror, settings.mirrors))
        self.catalogue = Catalogue(
            transport,
            directory,
            clock,
            trusted=settings.trusted,
            country=settings.country,
        )
        self.service = ChunkService(
            lambda: self._holdings,
            clock=clock,
            upload=RateLimit(settings.upload_bytes_per_s, clock),
        )

    @property
    def believes_everybody(self) -> bool:
        """Whether no publisher was named."""
        return self._settings.trusted is None

    # --- serving
    async def serve(
        self, identity: Identity, addresses: Callable[[], Sequence[str]]
    ) -> CatalogueAnnouncer:
        """Send chunks to whoever asks. The caller runs the announcer that this returns."""
        await self._transport.serve(WEIGHTS_PROTOCOL, self.service.serve_stream)
        self._announcer = CatalogueAnnouncer(
            identity,
            self._directory,
            self._clock,
            lambda: self._holdings,
            addresses=addresses,
            country=self._settings.country,
            announce_period_s=self._settings.announce_period_s,
        )
        return self._announcer

    def hold(self, holding: Holding) -> None:
        """Serve this from now on."""
        self._holdings[holding.manifest.digest] = holding
        if self._announcer is not None:
            self._announcer.announce_now()

    # --- looking up
    async def locate(self, name: str, kind: str = "model") -> StoredRevision | None:
        """The revision that a name means: ``NAME`` or ``NAME@REVISION``; its manifest is fetched.

        None when nobody knows it. Raises UsageError when the name means several revisions,
        NetworkError when nobody sends the manifest.
        """
        plain, revision = split_name(name)
        found = [item for item in await self._find(plain, revision) if item.kind == kind]
        listed = choose_listed(found, plain)
        if listed is not None:
            known = self._open_stored(listed.digest)
            if known is not None:
                return known
            return self._create(*await self.catalogue.manifest(listed))
        return await self._locate_elsewhere(plain, revision, kind)

    async def open(self, digest: bytes) -> StoredRevision | None:
        """The revision with this manifest, from store, peers or mirrors; None if nobody has it."""
        known = self._open_stored(digest)
        if known is not None:
            return known
        for mirror in self.mirrors:
            described = await mirror.manifest(digest)
            if described is not None and self._is_believed(described[1]):
                return self._create(*described)
        return None

    async def _find(self, name: str, revision: bytes) -> list[Listed]:
        try:
            return await self.catalogue.find(name, revision)
        except NetworkError as error:
            log.info("the catalogue cannot be read: %s", error)
            return []

    async def _locate_elsewhere(
        self, name: str, revision: bytes, kind: str
    ) -> StoredRevision | None:
        """In the store, or in a mirror."""

        def fits(manifest: Manifest) -> bool:
            return (
                manifest.name == name
                and manifest.kind == kind
                and manifest.revision.startswith(revision)
            )

        stored = [
            known
            for known in await asyncio.to_thread(self.store.revisions)
            if fits(known.manifest) and self._is_believed(known.signatures)
        ]
        if stored:
            if len({known.manifest.revision for known in stored}) > 1:
                raise UsageError(
                    f"there are several revisions of {name} on this disk: write {name}@REVISION"
                )
            return max(stored, key=lambda known: int(known.held.sum()))
        for mirror in self.mirrors:
            for entry in await mirror.entries():
                if (entry.name, entry.kind) != (name, kind):
                    continue
                described = await mirror.manifest(entry.digest)
                if described is not None and fits(described[0]) and self._is_believed(described[1]):
                    return self._create(*described)
        return None

    def _open_stored(self, digest: bytes) -> StoredRevision | None:
        """The one object for a revision, which knows what is being fetched."""
        held = self._holdings.get(digest)
        return held if isinstance(held, StoredRevision) else self.store.open(digest)

    def _is_believed(self, signatures: Collection[ManifestSignature]) -> bool:
        trusted = self._settings.trusted
        return trusted is None or any(item.publisher in trusted for item in signatures)

    def _create(
        self, manifest: Manifest, signatures: Sequence[ManifestSignature]
    ) -> StoredRevision:
        return self._open_stored(manifest.digest) or self.store.create(manifest, signatures)

    # --- fetching
    async def fetch(
        self,
        stored: StoredRevision,
        parts: Iterable[Part],
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Complete some parts of a revision, from peers and mirrors; what is here is checked.

        Raises NetworkError when nobody sends it, CapacityError when it does not fit on the disk,
        CheckpointError when the disk refuses. Cancelling is safe: what is here stays.
        """
        wanted = tuple(parts)
        async with self._locked(stored):
            await asyncio.to_thread(stored.recover, wanted)
            missing = sorted(
                chunk for chunk in stored.manifest.chunks_of(wanted) if not stored.held[chunk]
            )
            if missing:
                missing_bytes = sum(stored.manifest.locate(chunk)[2] for chunk in missing)
                await asyncio.to_thread(self.store.make_room, missing_bytes, stored.folder)
            self.hold(stored)
            await self._download(stored, wanted, on_progress).run()
            if stored.has(stored.manifest.parts):
                await asyncio.to_thread(stored.write_index)
        if self._announcer is not None:
            self._announcer.announce_now()

    def _download(
        self,
        stored: StoredRevision,
        parts: Sequence[Part],
        on_progress: Callable[[Progress], None] | None,
    ) -> Download:
        async def find() -> list[Source]:
            return await self.catalogue.sources(stored.manifest.digest)

        return Download(
            stored,
            parts,
            transport=self._transport,
            clock=self._clock,
            find_sources=find,
            rate=self._download_rate,
            mirrors=self.mirrors,
            limits=self._limits,
            on_progress=on_progress,
        )

    @asynccontextmanager
    async def _locked(self, stored: StoredRevision) -> AsyncIterator[None]:
        """Only one process fetches into a folder; others wait, and then have less to do."""
        while (lock := stored.try_lock()) is None:
            await self._clock.sleep(LOCK_PERIOD_S)
        with lock:
            yield
