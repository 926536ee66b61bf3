"""Pings over streams that stay open: does a peer answer, now?

For those who watch others: nodes each other (``swarm.buddies``), the status page its nodes
(``swarm.status.lookout``). What silence means is theirs to say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from swarm.connection import Connection
from swarm.ports import Clock, Transport
from swarm.protocol.errors import NetworkError, ProtocolError, RemoteError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import Ping, Pong
from swarm.protocol.version import STREAM_PROTOCOL

logger = logging.getLogger(__name__)


class ClockObserver(Protocol):
    """Told of other clocks; ``swarm.clock_offset`` listens."""

    def observe(self, peer: PeerId, unix_s: float, round_trip_s: float) -> None: ...


class Pinger:
    """Keeps one stream to each peer that it asks again and again.

    The nodes' services answer the pings (first message of a stream, after Hello). Errors of the
    network are answers here: nothing is raised.
    """

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        addresses_of: Callable[[PeerId], Sequence[str]],
        *,
        answer_timeout_s: float,
        clocks: ClockObserver | None = None,
    ) -> None:
        """``answer_timeout_s`` is for a ping, opening the stream included."""
        self._transport = transport
        self._clock = clock
        self._addresses_of = addresses_of
        self._answer_timeout_s = answer_timeout_s
        self._clocks = clocks
        self._connections: dict[PeerId, Connection] = {}
        self._nonce = 0

    async def silent_among(self, peers: Sequence[PeerId], pings: int = 2) -> list[PeerId]:
        """Those that answer none of so many pings in a row, each later one over a new stream."""
        async with asyncio.TaskGroup() as group:
            asking = {peer: group.create_task(self._answers(peer, pings)) for peer in peers}
        return [peer for peer, task in asking.items() if not task.result()]

    async def close_all_but(self, kept: Collection[PeerId]) -> None:
        """Let go of the streams to all others."""
        for peer in [peer for peer in self._connections if peer not in kept]:
            await self._disconnect(peer)

    async def _answers(self, peer: PeerId, pings: int) -> bool:
        for _ in range(pings):
            if await self._ping(peer):
                return True
        return False

    async def _ping(self, peer: PeerId) -> bool:
        """On the stream that is open, or a new one; whether an answer came in time."""
        started_s = self._clock.monotonic_s()
        connection = self._connections.get(peer)
        self._nonce += 1
        ping = Ping(nonce=self._nonce)
        try:
            async with asyncio.timeout(self._answer_timeout_s):
                if connection is None:
                    connection = await self._connect(peer)
                    started_s = self._clock.monotonic_s()
                await connection.send(ping)
                while (pong := await connection.receive_only(Pong)).nonce != ping.nonce:
                    continue
        except (TimeoutError, NetworkError, ProtocolError, RemoteError) as error:
            logger.debug("%s does not answer: %s", peer, error)
            await self._disconnect(peer)
            return False
        if pong.unix_ms and self._clocks is not None:
            round_trip_s = self._clock.monotonic_s() - started_s
            self._clocks.observe(peer, pong.unix_ms / 1000, round_trip_s)
        return True

    async def _connect(self, peer: PeerId) -> Connection:
        stream = await self._transport.open(peer, STREAM_PROTOCOL, self._addresses_of(peer))
        connection = Connection(stream)
        try:
            await connection.say_hello()
        except BaseException:
            await connection.close()
            raise
        self._connections[peer] = connection
        return connection

    async def _disconnect(self, peer: PeerId) -> None:
        connection = self._connections.pop(peer, None)
        if connection is not None:
            await connection.close()
