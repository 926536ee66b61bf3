"""A seed that holds weights: fetches whole models and adapters, and sends them to others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.resolve import local_checkpoint
from swarm.node.addresses import for_record
from swarm.node.board import Board
from swarm.node.config import SeedSettings
from swarm.node.weights import NodeWeights
from swarm.protocol.errors import SwarmError
from swarm.protocol.identity import Identity, PeerId
from swarm.virtual_time import LoopClock

if TYPE_CHECKING:
    from swarm.hivemind_network import HivemindNetwork

log = logging.getLogger(__name__)

EVERYTHING = "all"
LOOK_AGAIN_S = 30.0
"""For models that could not be fetched yet, and for new ones in the catalogue."""


class ModelHolder:
    """Runs beside a seed; the application owns the task of ``run``."""

    def __init__(
        self,
        network: HivemindNetwork,
        identity: Identity,
        settings: SeedSettings,
        board: Board,
        *,
        trusted: frozenset[PeerId] | None = None,
    ) -> None:
        self._network = network
        self._settings = settings
        self._board = board
        self._clock = LoopClock()
        self._held: dict[str, str] = {}
        self._weights = NodeWeights(
            network,
            identity,
            self._clock,
            settings,
            trusted=trusted,
            on_progress=lambda progress: board.update(fetching=progress),
        )

    def close(self) -> None:
        """Let go of the files."""
        self._weights.close()

    async def run(self) -> None:
        """Fetch what is asked for, serve it, and look for more, until cancelled."""
        announcer = await self._weights.serve(for_record(await self._network.addresses()))
        async with asyncio.TaskGroup() as group:
            group.create_task(announcer.run())
            while True:
                for name in await self._wanted():
                    try:
                        await self._hold(name)
                    except SwarmError as error:
                        log.warning("%s cannot be held yet: %s", name, error)
                await self._clock.sleep(LOOK_AGAIN_S if self._held else 2.0)
                self._weights.moved(for_record(await self._network.addresses()))

    async def _wanted(self) -> Iterable[str]:
        names = [name for name in self._settings.models if name != EVERYTHING]
        if EVERYTHING in self._settings.models:
            listed = await self._weights.library.catalogue.all()
            names += [f"{item.name}@{item.revision.hex()}" for item in listed]
        return [name for name in names if name not in self._held]

    async def _hold(self, name: str) -> None:
        local = await asyncio.to_thread(local_checkpoint, name)
        if local is not None:
            checkpoint = await asyncio.to_thread(Checkpoint.open, local)
            await self._weights.give(checkpoint)
            self._note(name, checkpoint.name)
            return
        library = self._weights.library
        stored = await library.locate(name) or await library.locate(name, "adapter")
        if stored is None:
            raise SwarmError("nobody has it")
        await self._weights.fetch(stored, whole=True)
        self._note(name, stored.manifest.name)

    def _note(self, name: str, title: str) -> None:
        self._held[name] = title
        self._board.update(held=tuple(sorted(set(self._held.values()))))
