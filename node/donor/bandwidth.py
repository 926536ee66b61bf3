"""Streams that keep to the owner's bandwidth, and are counted.

Whole messages wait for their turn and then go at full speed: to a peer a capped node is one whose
messages come later, never one that stalls in the middle of a frame. On average over a few seconds
the rate is the cap, however many streams there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from swarm.gate import Gate
from swarm.ports import (
    Buffer,
    Clock,
    Directory,
    DirectoryEntry,
    Stream,
    StreamHandler,
    Transport,
)
from swarm.protocol.identity import PeerId

BURST_S = 0.25
"""What a quiet node may send at once, in seconds of its cap."""
CRUMB_BYTES = 64
"""Reads up to this size, such as a frame's prefix, wait until everything before is paid for. Larger
ones do not: the rest of a frame is read under a time limit that is the peer's to keep, not ours."""


class Pace:
    """Gives each message the time at which it has been paid for, in the order of asking."""

    def __init__(self, clock: Clock, bytes_per_s: int | None = None) -> None:
        self._clock = clock
        self._paid_until_s = 0.0
        self.bytes_per_s = bytes_per_s
        self.total_bytes = 0

    def count(self, size_bytes: int) -> float:
        """Count it, and tell how long to wait until it is paid for."""
        self.total_bytes += size_bytes
        if self.bytes_per_s is None:
            return 0.0
        now_s = self._clock.monotonic_s()
        begin_s = max(self._paid_until_s, now_s - BURST_S)
        self._paid_until_s = begin_s + size_bytes / self.bytes_per_s
        return max(0.0, self._paid_until_s - now_s)

    async def pay(self, size_bytes: int) -> None:
        """Wait until the message may go."""
        wait_s = self.count(size_bytes)
        if wait_s > 0:
            await self._clock.sleep(wait_s)


class Network(Transport, Directory, Protocol):
    """Both ports of one peer."""


class CappedNetwork:
    """A network whose streams share two paces; the directory is not capped."""

    def __init__(self, network: Network, up: Pace, down: Pace) -> None:
        self._network = network
        self._up = up
        self._down = down

    @property
    def peer_id(self) -> PeerId:
        return self._network.peer_id

    async def addresses(self) -> Sequence[str]:
        return await self._network.addresses()

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        async def capped(stream: Stream) -> None:
            await handler(self._capped(stream))

        await self._network.serve(protocol, capped)

    async def open(
        self,
        peer: PeerId,
        protocol: str,
        addresses: Sequence[str] = (),
        *,
        direct_within_s: float = 0.0,
    ) -> Stream:
        stream = await self._network.open(
            peer, protocol, addresses, direct_within_s=direct_within_s
        )
        return self._capped(stream)

    async def is_direct(self, peer: PeerId) -> bool | None:
        return await self._network.is_direct(peer)

    async def store(self, key: str, value: bytes, expires_unix_s: float) -> bool:
        return await self._network.store(key, value, expires_unix_s)

    async def get(
        self, key: str, *, until_unix_s: float = math.inf
    ) -> Mapping[PeerId, DirectoryEntry]:
        return await self._network.get(key, until_unix_s=until_unix_s)

    def _capped(self, stream: Stream) -> Stream:
        return CappedStream(stream, self._up, self._down)


class CappedStream:
    """One of them."""

    def __init__(self, stream: Stream, up: Pace, down: Pace) -> None:
        self._stream = stream
        self._up = up
        self._down = down

    @property
    def remote_peer(self) -> PeerId:
        return self._stream.remote_peer

    @property
    def relayed(self) -> bool:
        return self._stream.relayed

    @property
    def gate(self) -> Gate | None:
        return self._stream.gate

    async def send(self, *buffers: Buffer) -> None:
        await self._up.pay(sum(map(len, buffers)))
        await self._stream.send(*buffers)

    async def receive_exactly(self, size_bytes: int) -> bytes:
        content = await self._stream.receive_exactly(size_bytes)
        if size_bytes <= CRUMB_BYTES:
            # What the peer sends next waits in the pipe meanwhile, and slows it down.
            await self._down.pay(size_bytes)
        else:
            self._down.count(size_bytes)
        return content

    async def close(self) -> None:
        await self._stream.close()
