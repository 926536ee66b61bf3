"""Two ends of a byte stream within one process: for a hop whose next hop is on the same node.

libp2p does not dial itself, and there is no need to leave the process.
"""

from __future__ import annotations

import asyncio

from swarm.ports import Buffer
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import PeerId

WINDOW_BYTES = 8 * 1024 * 1024


class _Pipe:
    """Bytes in one direction."""

    def __init__(self) -> None:
        self._reader = asyncio.StreamReader(limit=WINDOW_BYTES)
        self._unread_bytes = 0
        self._room = asyncio.Event()
        self._is_closed = False

    async def write(self, buffer: Buffer) -> None:
        if self._is_closed:
            raise NetworkError("the stream is closed")
        self._reader.feed_data(bytes(buffer))
        self._unread_bytes += len(buffer)
        while self._unread_bytes > WINDOW_BYTES and not self._is_closed:
            self._room.clear()
            await self._room.wait()

    async def read_exactly(self, size_bytes: int) -> bytes:
        try:
            data = await self._reader.readexactly(size_bytes)
        except asyncio.IncompleteReadError:
            raise NetworkError("the stream is closed") from None
        self._unread_bytes -= size_bytes
        self._room.set()
        return data

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._reader.feed_eof()
            self._room.set()


class LocalStream:
    """One end; a ``swarm.ports.Stream``."""

    def __init__(self, own_peer: PeerId, outgoing: _Pipe, incoming: _Pipe) -> None:
        self._own_peer = own_peer
        self._outgoing = outgoing
        self._incoming = incoming

    @property
    def remote_peer(self) -> PeerId:
        """Ourselves."""
        return self._own_peer

    @property
    def gate(self) -> None:
        """Nobody needs a passport for himself."""

    @property
    def relayed(self) -> bool:
        return False

    async def send(self, *buffers: Buffer) -> None:
        """Send all buffers; waits while the other end has much to read."""
        for buffer in buffers:
            await self._outgoing.write(buffer)

    async def receive_exactly(self, size_bytes: int) -> bytes:
        """Wait for ``size_bytes`` bytes. Raises NetworkError when the stream ends before."""
        return await self._incoming.read_exactly(size_bytes)

    async def close(self) -> None:
        """Close both directions."""
        self._outgoing.close()
        self._incoming.close()


def stream_to_ourselves(own_peer: PeerId) -> tuple[LocalStream, LocalStream]:
    """Both ends of a new stream."""
    one, other = _Pipe(), _Pipe()
    return LocalStream(own_peer, one, other), LocalStream(own_peer, other, one)
