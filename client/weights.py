"""What a client needs of a model's files: configuration, tokenizer, embeddings, norm and head.

Looked for on this disk, then in the swarm's catalogue and in mirrors, then on the hub. The blocks
stay where they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from swarm.catalogue.download import Progress
from swarm.catalogue.library import Library, LibrarySettings
from swarm.catalogue.resolve import models_directory, resolve_checkpoint
from swarm.client.config import ClientSettings
from swarm.ports import Clock, Directory, Transport
from swarm.protocol.errors import CheckpointError
from swarm.protocol.identity import PeerId


class Network(Transport, Directory, Protocol):
    """Both ports of one peer."""


def client_library(
    network: Network,
    clock: Clock,
    settings: ClientSettings,
    trusted: frozenset[PeerId] | None = None,
) -> Library:
    """The library of a client or of a command; ``trusted`` are publishers of the charter."""
    named = frozenset(map(PeerId, settings.publishers)) or None
    return Library(
        network,
        network,
        clock,
        LibrarySettings(
            folder=models_directory().parent / "store",
            mirrors=settings.mirrors,
            trusted=trusted if named is None else named & trusted if trusted is not None else named,
        ),
    )


async def fetch_ends(
    library: Library,
    name: str,
    *,
    hub: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """The directory of a model with all that a client needs.

    Raises CheckpointError when it is nowhere, else what ``Library.locate`` and ``fetch`` raise.
    """
    stored = await library.locate(name)
    if stored is not None:
        parts = (*stored.manifest.files(), *stored.manifest.end_parts())
        await library.fetch(stored, parts, on_progress)
        return stored.folder
    if hub:
        return await asyncio.to_thread(resolve_checkpoint, name)
    raise CheckpointError(
        f"no model {name!r}: not on this disk, not in the swarm's catalogue, not in a mirror; "
        "swarm models list shows what there is"
    )
