"""A peer that publishes adapters, for tests: what ``swarm adapters publish`` does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from swarm.catalogue.library import Library, LibrarySettings
from swarm.catalogue.prompt_adapter import open_any_adapter
from swarm.client.adapters import ADAPTER_ID, reference_to
from swarm.client.publishing import Described, describe_directory
from swarm.memory_network import MemoryNetwork
from swarm.ports import Clock
from swarm.protocol.identity import Identity
from swarm.protocol.manifest import sign_manifest
from swarm.routing import adapter_hint


class Publisher:
    """Adapters for one model, under one key."""

    def __init__(self, directories: Sequence[Path], revision: bytes) -> None:
        self.identity = Identity.generate()
        files = {each.name: open_any_adapter(each) for each in directories}
        self.hints = {name: adapter_hint(each.adapter_id) for name, each in files.items()}
        """What nodes announce that have them, by the folder's name."""
        self._described: dict[str, Described] = {
            each.name: describe_directory(
                each,
                base=revision.hex(),
                attributes={ADAPTER_ID: files[each.name].adapter_id.hex()},
            )
            for each in directories
        }

    def reference(self, name: str) -> str:
        """As the catalogue has it."""
        return reference_to(self._described[name].manifest)

    @asynccontextmanager
    async def serving(
        self, network: MemoryNetwork, clock: Clock, folder: Path
    ) -> AsyncIterator[None]:
        """They are in the catalogue, and sent to whoever asks."""
        peer = network.join(self.identity)
        # Often: in a memory network peers that join later take keys over from those before.
        library = Library(peer, peer, clock, LibrarySettings(folder, announce_period_s=2.0))
        announcer = await library.serve(self.identity, tuple)
        for each in self._described.values():
            library.hold(each.holding((sign_manifest(self.identity, each.manifest),)))
        task = asyncio.create_task(announcer.run())
        try:
            await announcer.announced()
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})
