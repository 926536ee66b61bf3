"""Another try at a hole through the routers, for connections that began before it was possible.

The daemon punches holes by itself (libp2p's DCUtR), but only when a relayed connection is new, and
only when both ends know how others see them, which takes four peers with public addresses that say
so. A connection that is older stays on its relay. So it is closed once there is hope at *both* ends
(the other one is asked); streams on it end, and whoever opens them again gets a new connection, and
soon a direct one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from hivemind.p2p import P2P

from swarm.addresses import is_given_by_router
from swarm.hivemind_network.requests import (
    disconnect,
    list_connections,
    open_stream,
    own_addresses,
)
from swarm.ports import Stream
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import PeerId

logger = logging.getLogger(__name__)

PUNCHING_PROTOCOL = "sovereign-swarm/punching"
"""Whoever opens a stream is sent one byte, ``READY`` or ``NOT_YET``."""
READY, NOT_YET = b"\x01", b"\x00"
CHECK_PERIOD_S = 5.0
ANSWER_TIMEOUT_S = 3.0
PAUSES_S = (0.0, 20.0, 300.0)
"""Before each try; all streams to the peer are opened again, so there are few."""


@dataclass(slots=True)
class _Tries:
    """Of one peer: how many, and when the latest began."""

    count: int
    latest_s: float

    def is_due(self, now_s: float) -> bool:
        return self.count < len(PAUSES_S) and now_s - self.latest_s >= PAUSES_S[self.count]


class HolePuncher:
    """Closes relayed connections that we made; the network owns the task of ``run``."""

    def __init__(self, daemon: Callable[[], P2P], own: PeerId) -> None:
        self._daemon = daemon
        self._own = own
        self._tries: dict[PeerId, _Tries | None] = {}
        self._asking: set[PeerId] = set()

    def dialled(self, peer: PeerId) -> None:
        """Only the side that dials closes: streams of clients to us are theirs."""
        self._tries.setdefault(peer, None)

    async def answer(self, stream: Stream) -> None:
        """Tell a peer that would close its relayed connection whether that makes sense."""
        peer = stream.remote_peer
        # If both want to, the one with the smaller id does: two at once would spoil each other.
        ours = peer in self._asking and self._own < peer
        ready = not ours and await self._is_possible()
        if ready and self._tries.get(peer) is not None:
            self._count(peer, time.monotonic())
        await stream.send(READY if ready else NOT_YET)

    async def run(self) -> None:
        """Until cancelled. Network errors are logged, never raised."""
        while True:
            await asyncio.sleep(CHECK_PERIOD_S)
            try:
                await self._check(time.monotonic())
            except NetworkError as error:
                logger.debug("hole punching: %s", error)

    async def _check(self, now_s: float) -> None:
        possible = await self._is_possible()
        connections = await list_connections(self._daemon())
        connected = {connection.peer for connection in connections}
        direct = {connection.peer for connection in connections if not connection.relayed}
        for peer, tries in list(self._tries.items()):
            if peer in direct or (peer not in connected and tries is None):
                self._tries.pop(peer, None)
            elif tries is None:
                # It is new, so the daemon may be trying just now.
                self._tries[peer] = _Tries(0, now_s)
            elif (
                possible
                and peer in connected
                and tries.is_due(now_s)
                and await self._is_ready(peer)
            ):
                self._count(peer, now_s)
                logger.info("closing the relayed connection to %s to punch a hole", peer)
                await disconnect(self._daemon(), peer)

    def _count(self, peer: PeerId, now_s: float) -> None:
        tries = self._tries.get(peer)
        self._tries[peer] = _Tries(1 if tries is None else tries.count + 1, now_s)

    async def _is_possible(self) -> bool:
        """Whether the daemon knows where our router lets others see us; holes go over QUIC."""
        own = await own_addresses(self._daemon())
        return any(is_given_by_router(address) and "/quic-v1" in address for address in own)

    async def _is_ready(self, peer: PeerId) -> bool:
        """Whether the other end can punch, too, and leaves it to us to begin."""
        self._asking.add(peer)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                opened = await open_stream(self._daemon(), peer, PUNCHING_PROTOCOL)
                with contextlib.closing(opened.writer.transport):
                    return await opened.reader.readexactly(1) == READY
        except (NetworkError, EOFError, OSError, TimeoutError) as error:
            logger.debug("%s does not say whether it can punch: %s", peer, error)
            return False
        finally:
            self._asking.discard(peer)
