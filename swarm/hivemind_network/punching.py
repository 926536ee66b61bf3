"""Another try at a hole through the routers, for connections that began before it was possible.

The daemon punches holes by itself (libp2p's DCUtR), but only when a relayed connection is new, and
only when it knows how others see it, which takes four peers with public addresses that say so. A
connection that is older stays on its relay. So it is closed once, when there is hope; streams on it
end, and whoever opens them again gets a new connection, and with luck a direct one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from hivemind.p2p import P2P

from swarm.addresses import is_given_by_router
from swarm.hivemind_network.requests import disconnect, list_connections, own_addresses
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import PeerId

logger = logging.getLogger(__name__)

CHECK_PERIOD_S = 5.0
PAUSES_S = (0.0, 60.0, 600.0)
"""Before each try; the peer may learn how others see it later than we do."""


@dataclass(slots=True)
class _Tries:
    """Of one peer: how many, and when the latest began."""

    count: int
    latest_s: float


class HolePuncher:
    """Closes relayed connections that we made; the network owns the task of ``run``."""

    def __init__(self, daemon: Callable[[], P2P]) -> None:
        self._daemon = daemon
        self._tries: dict[PeerId, _Tries | None] = {}

    def dialled(self, peer: PeerId) -> None:
        """Only the side that dials closes: streams of clients to us are theirs."""
        self._tries.setdefault(peer, None)

    async def run(self) -> None:
        """Until cancelled. Network errors are logged, never raised."""
        while True:
            await asyncio.sleep(CHECK_PERIOD_S)
            try:
                await self._check(time.monotonic())
            except NetworkError as error:
                logger.debug("hole punching: %s", error)

    async def _check(self, now_s: float) -> None:
        possible = any(map(is_given_by_router, await own_addresses(self._daemon())))
        connections = await list_connections(self._daemon())
        connected = {connection.peer for connection in connections}
        direct = {connection.peer for connection in connections if not connection.relayed}
        for peer, tries in list(self._tries.items()):
            if peer in direct or (peer not in connected and tries is None):
                del self._tries[peer]
            elif tries is None:
                # If it was possible from the beginning, the daemon has just tried.
                self._tries[peer] = _Tries(count=int(possible), latest_s=now_s)
            elif (
                possible
                and peer in connected
                and tries.count < len(PAUSES_S)
                and now_s - tries.latest_s >= PAUSES_S[tries.count]
            ):
                self._tries[peer] = _Tries(tries.count + 1, now_s)
                logger.info("closing the relayed connection to %s to punch a hole", peer)
                await disconnect(self._daemon(), peer)
