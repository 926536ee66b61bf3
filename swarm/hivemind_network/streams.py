"""``ports.Stream`` over the unix socket on which p2pd hands us a libp2p stream."""

from __future__ import annotations

import asyncio

from swarm.gate import Gate
from swarm.ports import Buffer
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import PeerId

JOIN_BELOW_BYTES = 128 * 1024
"""Buffers up to this size in total go in one write: 35 % less time for 2 kB, 15 % for 64 kB."""
WRITE_CHUNK_BYTES = 256 * 1024
CLOSE_TIMEOUT_S = 1.0


class HivemindStream:
    """``ports.Stream`` over one libp2p stream, which p2pd hands us as a unix socket."""

    def __init__(
        self,
        remote_peer: PeerId,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        relayed: bool,
        gate: Gate | None = None,
    ) -> None:
        self.gate = gate
        self._remote_peer = remote_peer
        self._relayed = relayed
        self._reader = reader
        self._writer = writer

    @property
    def remote_peer(self) -> PeerId:
        return self._remote_peer

    @property
    def relayed(self) -> bool:
        return self._relayed

    async def send(self, *buffers: Buffer) -> None:
        total_bytes = sum(len(buffer) for buffer in buffers)
        if len(buffers) > 1 and total_bytes <= JOIN_BELOW_BYTES:
            buffers = (b"".join(buffers),)
        try:
            for buffer in buffers:
                # In chunks, since asyncio copies and moves whatever the socket does not take.
                for start in range(0, len(buffer), WRITE_CHUNK_BYTES):
                    if self._writer.is_closing():
                        raise NetworkError(f"the stream to {self._remote_peer} is closed")
                    whole = len(buffer) <= WRITE_CHUNK_BYTES
                    self._writer.write(
                        buffer if whole else memoryview(buffer)[start : start + WRITE_CHUNK_BYTES]
                    )
                    await self._writer.drain()
        except OSError as error:
            raise NetworkError(f"the stream to {self._remote_peer} broke: {error}") from error

    async def receive_exactly(self, size_bytes: int) -> bytes:
        try:
            return await self._reader.readexactly(size_bytes)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise NetworkError(f"the stream from {self._remote_peer} ended") from error

    async def close(self) -> None:
        self._writer.close()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            pass
        finally:
            # A peer that does not read would hold the socket open forever.
            self._writer.transport.abort()
