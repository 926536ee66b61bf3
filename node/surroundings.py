"""What a running node does about the others: it looks around, watches its buddies, keeps its clock
right, and remembers on disk by whom it will find the swarm again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from swarm.buddies import Buddies
from swarm.cached_peers import load_peers, save_peers, worth_keeping
from swarm.clock_offset import ClockOffsets, describe_offset
from swarm.membership import Announcer, list_models, read_nodes
from swarm.nodes_view import NODE_VIEW, NodesView, ViewSettings
from swarm.ports import Clock, Directory, Transport
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.records import NodeRecord

log = logging.getLogger(__name__)

CLOCK_PERIOD_S = 15.0
PEERS_PERIOD_S = 300.0


class Network(Transport, Directory, Protocol):
    """Both ports of one peer, and the clock by which its directory works."""

    def correct_clock(self, offset_s: float) -> None: ...


class Surroundings:
    """Runs beside the service of a node; the application owns the task of ``run``."""

    def __init__(
        self,
        identity: Identity,
        network: Network,
        announcer: Announcer,
        *,
        clock: Clock,
        clock_offsets: ClockOffsets,
        peers_file: Path,
        on_clock: Callable[[str], None],
    ) -> None:
        """``clock`` is the corrected one; ``on_clock`` is told in words how far ours is off."""
        revision = announcer.record.model_revision
        self._own = identity.peer_id
        self._network = network
        self._announcer = announcer
        self._clock = clock
        self._offsets = clock_offsets
        self._peers_file = peers_file
        self._on_clock = on_clock
        self.view = NodesView(
            network,
            clock,
            revision,
            settings=view_settings(announcer.period_s),
            own=identity.peer_id,
            on_accused=announcer.announce_now,
        )
        self._buddies = Buddies(
            identity,
            network,
            network,
            clock,
            self.view,
            model_revision=revision,
            clocks=clock_offsets,
        )

    async def run(self) -> None:
        """Until cancelled. Errors of the network and the disk are logged, never raised."""
        async with asyncio.TaskGroup() as group:
            for part in (self.view.run, self._buddies.run, self._keep_clock, self._keep_peers):
                group.create_task(part())

    async def _keep_clock(self) -> None:
        known_s: float | None = None
        while True:
            offset_s = self._offsets.offset_s
            if known_s is None or abs(offset_s - known_s) > 1.0:
                if offset_s or known_s:
                    log.warning("%s", describe_offset(offset_s) or "the clock is right again")
                    self._announcer.announce_now()
                known_s = offset_s
                self._network.correct_clock(offset_s)
                self._on_clock(describe_offset(offset_s))
            await self._clock.sleep(CLOCK_PERIOD_S)

    async def _keep_peers(self) -> None:
        await self.view.ready()
        while True:
            await _remember(self._peers_file, self.view.records(), self._own)
            await self._clock.sleep(PEERS_PERIOD_S)


def view_settings(announce_period_s: float) -> ViewSettings:
    """Records end after three periods of those who announce them.

    They are read before that: otherwise the others vanish for moments, and a buddy that is not
    known cannot be missed.
    """
    return replace(NODE_VIEW, refresh_s=min(NODE_VIEW.refresh_s, announce_period_s))


async def remember_peers(directory: Directory, clock: Clock, own: PeerId, path: Path) -> None:
    """For seeds: keep nodes of all models in the peers file until cancelled."""
    while True:
        try:
            models = await list_models(directory, clock)
            nodes = [await read_nodes(directory, item.model_revision, clock) for item in models]
        except NetworkError as error:
            log.info("the directory does not answer: %s", error)
        else:
            await _remember(path, (record for records in nodes for record in records), own)
        await clock.sleep(PEERS_PERIOD_S)


async def _remember(path: Path, records: Iterable[NodeRecord], own: PeerId) -> None:
    def write() -> None:
        save_peers(path, worth_keeping(records, own=own, before=load_peers(path)))

    try:
        await asyncio.to_thread(write)
    except OSError as error:
        log.warning("could not keep the peers in %s: %s", path, error.strerror)
