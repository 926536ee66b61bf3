"""Where a node's weights come from, and to whom it gives them.

A model is looked for on this disk, then in the swarm (``swarm.catalogue``), then in mirrors, then
on the hub. What comes from peers and mirrors is fetched for the blocks that the node hosts only.
All of it, and what the owner has put on the disk himself, is sent to others within the cap.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.description import describe_model, model_holding
from swarm.catalogue.directory import CatalogueAnnouncer
from swarm.catalogue.download import Progress
from swarm.catalogue.holdings import PlainDirectory
from swarm.catalogue.library import Library, LibrarySettings
from swarm.catalogue.resolve import local_checkpoint, resolve_checkpoint
from swarm.catalogue.store import StoredRevision
from swarm.node.config import BlockSpan, NodeSettings, PeerSettings
from swarm.ports import Clock, Directory, Transport
from swarm.protocol.errors import CheckpointError, NetworkError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.manifest import Manifest, ManifestSignature, sign_manifest

log = logging.getLogger(__name__)

LOOKS = 3
LOOK_AGAIN_S = 3.0
"""A catalogue that has just begun may not know the model yet."""


class Network(Transport, Directory, Protocol):
    """Both ports of one peer."""


def library_settings(
    settings: PeerSettings, trusted: frozenset[PeerId] | None = None
) -> LibrarySettings:
    """What the owner allows, for ``swarm.catalogue``; ``trusted`` are publishers of the charter."""
    named = frozenset(map(PeerId, settings.publishers)) or None
    return LibrarySettings(
        folder=settings.store_folder,
        disk_bytes=settings.disk_bytes,
        upload_bytes_per_s=settings.upload_bytes_per_s,
        download_bytes_per_s=settings.download_bytes_per_s,
        mirrors=settings.mirrors,
        trusted=trusted if named is None else named & trusted if trusted is not None else named,
        country=settings.country if isinstance(settings, NodeSettings) else "",
        announce_period_s=settings.announce_period_s,
    )


class NodeWeights:
    """One peer's library, with what the owner sees of it."""

    def __init__(
        self,
        network: Network,
        identity: Identity,
        clock: Clock,
        settings: PeerSettings,
        *,
        trusted: frozenset[PeerId] | None = None,
        may_use_hub: bool = True,
        on_progress: Callable[[Progress | None], None],
    ) -> None:
        """``trusted`` are the publishers of the charter; None believes everybody.

        ``on_progress`` is told None when fetching is over.
        """
        self._identity = identity
        self._clock = clock
        self._settings = settings
        self._on_progress = on_progress
        self._may_use_hub = may_use_hub and settings.hub
        self._addresses: tuple[str, ...] = ()
        self._used = ExitStack()
        self.library = Library(network, network, clock, library_settings(settings, trusted))

    async def serve(self, addresses: Sequence[str]) -> CatalogueAnnouncer:
        """Send chunks to peers from now on; the caller runs the announcer."""
        self._addresses = tuple(addresses)
        return await self.library.serve(self._identity, lambda: self._addresses)

    def moved(self, addresses: Sequence[str]) -> None:
        """We are reached at other addresses now."""
        self._addresses = tuple(addresses)

    def close(self) -> None:
        """Let go of the parts that were in use."""
        self._used.close()

    # --- finding
    async def find(self, model: str) -> Path:
        """The directory of a model: its own, or one in the store with at least the small files.

        Raises CheckpointError when it is nowhere, else what ``Library.locate`` and ``fetch`` raise.
        """
        local = await asyncio.to_thread(local_checkpoint, model)
        if local is not None:
            return local
        for attempt in range(LOOKS):
            stored = await self.library.locate(model)
            if stored is not None:
                await self.fetch(stored)
                return stored.folder
            if attempt + 1 < LOOKS:
                await self._clock.sleep(LOOK_AGAIN_S)
        if self._may_use_hub:
            return await asyncio.to_thread(resolve_checkpoint, model)
        places = ", ".join(mirror.name for mirror in self.library.mirrors) or "no mirror is set"
        raise CheckpointError(
            f"no model {model!r}: not on this disk, not in the swarm's catalogue, not in mirrors "
            f"({places}); the hub is switched off. swarm models list shows what there is"
        )

    async def fetch(
        self, stored: StoredRevision, span: BlockSpan | None = None, *, whole: bool = False
    ) -> None:
        """Complete the small files, and the blocks of a span or everything."""
        manifest = stored.manifest
        parts = manifest.files()
        if whole:
            parts = manifest.parts
        elif span is not None:
            parts += manifest.parts_of_blocks(span.first_block, span.end_block)
        try:
            await self.library.fetch(stored, parts, self._on_progress)
        finally:
            self._on_progress(None)
        used = ExitStack()
        used.enter_context(stored.in_use(parts))
        self._used.close()
        self._used = used

    async def ensure(self, checkpoint: Checkpoint, span: BlockSpan) -> None:
        """See to it that the tensors of these blocks are on the disk, and right."""
        if checkpoint.manifest is None:
            return
        stored = await self.library.open(checkpoint.manifest.digest)
        if stored is None or stored.folder.resolve() != checkpoint.path.resolve():
            stored = StoredRevision(checkpoint.path, checkpoint.manifest, ())
        await self.fetch(stored, span)

    # --- giving
    async def give(self, checkpoint: Checkpoint) -> None:
        """Send what lies in a plain directory to others, under the manifest that is known for it.

        If none is, we describe it ourselves and sign it with our own key.
        """
        if checkpoint.manifest is not None:
            stored = await self.library.open(checkpoint.manifest.digest)
            if stored is not None:
                self.library.hold(stored)
            return
        revision = await asyncio.to_thread(lambda: checkpoint.revision)
        manifest, signatures = await self._known_manifest(checkpoint.name, revision) or (None, ())
        if manifest is None:
            manifest = await asyncio.to_thread(describe_model, checkpoint)
            signatures = (sign_manifest(self._identity, manifest),)
        holding = await asyncio.to_thread(_held_directory, checkpoint, manifest, signatures)
        self.library.hold(holding)

    async def _known_manifest(
        self, name: str, revision: bytes
    ) -> tuple[Manifest, tuple[ManifestSignature, ...]] | None:
        for known in await asyncio.to_thread(self.library.store.revisions):
            if known.manifest.revision == revision and known.signatures:
                return known.manifest, known.signatures
        try:
            listed = await self.library.catalogue.find(name, revision)
            if listed:
                return await self.library.catalogue.manifest(listed[0])
        except NetworkError as error:
            log.info("no manifest of %s is known: %s", name, error)
        return None


def _held_directory(
    checkpoint: Checkpoint, manifest: Manifest, signatures: tuple[ManifestSignature, ...]
) -> PlainDirectory:
    """The directory as a holding; of its small files only those that are the manifest's."""
    holding = model_holding(checkpoint, manifest, signatures)
    holding.check_files()
    return holding
