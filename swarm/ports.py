"""The three ports through which everything outside a process is reached.

``hivemind_network`` implements them over libp2p, ``memory_network`` in memory for simulations.
Nothing else in the project knows how bytes travel.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from swarm.protocol.identity import PeerId

if TYPE_CHECKING:
    from swarm.gate import Gate

Buffer = bytes | bytearray | memoryview


class Stream(Protocol):
    """An ordered, encrypted byte stream with one peer, whose identity is authenticated."""

    @property
    def remote_peer(self) -> PeerId:
        """Who is at the other end. The only thing about a peer that needs no checking."""

    @property
    def gate(self) -> Gate | None:
        """Whom we let in and what we show; None in a swarm without a charter."""

    @property
    def relayed(self) -> bool:
        """Whether a third peer passes the bytes on; stays so when a better way is found."""

    async def send(self, *buffers: Buffer) -> None:
        """Send the buffers one after the other; waits while the link is congested.

        Raises NetworkError when the stream is broken. After a cancelled send the stream must be
        closed, since a part may have been sent.
        """

    async def receive_exactly(self, size_bytes: int) -> bytes:
        """Wait for ``size_bytes`` bytes. Raises NetworkError when the stream ends before."""

    async def close(self) -> None:
        """Close both directions; never raises, and a second call does nothing."""


StreamHandler = Callable[[Stream], Awaitable[None]]


class Transport(Protocol):
    """Opens streams to peers and accepts theirs."""

    @property
    def peer_id(self) -> PeerId: ...

    async def addresses(self) -> Sequence[str]:
        """Multiaddresses at which this peer can be dialled, without the ``/p2p/`` part's peer."""

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Run ``handler`` for each stream that peers open for ``protocol``; it owns the stream."""

    async def open(
        self,
        peer: PeerId,
        protocol: str,
        addresses: Sequence[str] = (),
        *,
        direct_within_s: float = 0.0,
    ) -> Stream:
        """Dial ``peer`` (``addresses`` are hints). Raises PeerUnreachable.

        Peers behind routers are reached through a relay at once, and directly as soon as a hole is
        punched. For streams that live long it is worth waiting for that, for ``direct_within_s``.
        """

    async def is_direct(self, peer: PeerId) -> bool | None:
        """Whether a stream that is opened now needs no relay; None without a connection.

        Raises PeerUnreachable when the network itself does not answer.
        """


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """One subkey of a directory key. ``value`` has passed the record validator."""

    value: bytes
    expires_unix_s: float


class Directory(Protocol):
    """The DHT: keys with one entry per peer, all signed and expiring."""

    async def store(self, key: str, value: bytes, expires_unix_s: float) -> bool:
        """Store our own entry (the subkey is our peer id). False when no peer took it."""

    async def get(
        self, key: str, *, until_unix_s: float = math.inf
    ) -> Mapping[PeerId, DirectoryEntry]:
        """The latest entries under ``key`` that passed validation; empty when there are none.

        Asks all peers that should keep the key. With ``until_unix_s`` it asks a few of them in
        turn and stops at the first one that has an entry which expires later: a fraction of the
        traffic, but some entries may be missing or older.
        """


class Clock(Protocol):
    """Time, so that simulations can jump."""

    def monotonic_s(self) -> float: ...

    def unix_s(self) -> float: ...

    async def sleep(self, duration_s: float) -> None: ...
