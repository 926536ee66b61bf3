"""What a client does, event by event, so that faults come at chosen moments and not by the clock.

``WatchedNetwork`` stands between a client and its network and tells a listener of each dial and of
each message that passes on a stream; ``WatchedChains`` tells of each step that a session takes.
Listeners are called on the client's event loop, before the thing itself happens where that is
possible: a fault in a listener for ``sent`` hits a message that is not on its way yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from swarm.client.remote_blocks import ChainOpener
from swarm.client.remote_chain import RemoteChain
from swarm.gate import Gate
from swarm.ports import Buffer, Stream
from swarm.protocol.codec import PREFIX_BYTES, read_prefix
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import MESSAGE_TYPES
from swarm.protocol.tensors import WireTensor
from swarm.routing import ChainPlan

MESSAGE_NAMES = {kind.TAG: kind.__name__ for kind in MESSAGE_TYPES}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a client did or saw.

    ``what`` is ``dialling``, ``dialled``, ``sent``, ``received`` (with ``peer``, the latter two
    also with the name of the ``message``), ``opening``, ``step``, ``rollback`` or ``token``.
    """

    what: str
    message: str = ""
    peer: PeerId | None = None


Listener = Callable[[Event], None]


class WatchedStream:
    """A stream that tells of the messages on it."""

    def __init__(self, stream: Stream, listener: Listener) -> None:
        self._stream = stream
        self._listener = listener
        self._expects_prefix = True

    @property
    def remote_peer(self) -> PeerId:
        return self._stream.remote_peer

    @property
    def gate(self) -> Gate | None:
        return self._stream.gate

    @property
    def relayed(self) -> bool:
        return self._stream.relayed

    async def send(self, *buffers: Buffer) -> None:
        payload_follows = False
        for buffer in buffers:
            if payload_follows:
                payload_follows = False
                continue
            prefix = read_prefix(bytes(buffer[:PREFIX_BYTES]))
            payload_follows = prefix.payload_bytes > 0
            self._tell("sent", prefix.tag)
        await self._stream.send(*buffers)

    async def receive_exactly(self, size_bytes: int) -> bytes:
        data = await self._stream.receive_exactly(size_bytes)
        if self._expects_prefix:
            self._tell("received", read_prefix(data).tag)
        self._expects_prefix = not self._expects_prefix
        return data

    async def close(self) -> None:
        await self._stream.close()

    def _tell(self, what: str, tag: int) -> None:
        self._listener(Event(what, MESSAGE_NAMES.get(tag, str(tag)), self._stream.remote_peer))


class WatchedNetwork:
    """A client's network that tells of dials and messages; everything else passes through."""

    def __init__(self, network: Any, listener: Listener) -> None:
        self._network = network
        self._listener = listener

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    async def open(
        self,
        peer: PeerId,
        protocol: str,
        addresses: Sequence[str] = (),
        *,
        direct_within_s: float = 0.0,
    ) -> Stream:
        self._listener(Event("dialling", peer=peer))
        stream = await self._network.open(
            peer, protocol, addresses, direct_within_s=direct_within_s
        )
        self._listener(Event("dialled", peer=peer))
        return WatchedStream(stream, self._listener)


class WatchedChain:
    """A chain that tells of its steps."""

    def __init__(self, chain: RemoteChain, listener: Listener) -> None:
        self._chain = chain
        self._listener = listener
        self._length = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chain, name)

    @property
    def plan(self) -> ChainPlan:
        return self._chain.plan

    @property
    def passes(self) -> int:
        return self._chain.passes

    async def step(
        self,
        activations: WireTensor,
        position: int,
        *,
        output_tokens: int,
        row_order: tuple[int, ...] = (),
    ) -> WireTensor:
        self._listener(Event("rollback" if position < self._length else "step"))
        self._length = position + activations.shape[1]
        return await self._chain.step(
            activations, position, output_tokens=output_tokens, row_order=row_order
        )

    async def close(self) -> None:
        await self._chain.close()


class WatchedChains:
    """Opens chains for one session and keeps the latest one in sight."""

    def __init__(self, client: ChainOpener, listener: Listener) -> None:
        self._client = client
        self._listener = listener
        self.chain: WatchedChain | None = None

    async def open_chain(self, request: Any, **options: Any) -> WatchedChain:
        self._listener(Event("opening"))
        self.chain = WatchedChain(await self._client.open_chain(request, **options), self._listener)
        return self.chain

    async def close(self) -> None:
        await self._client.close()

    @property
    def peers(self) -> frozenset[PeerId]:
        """The nodes that serve this session now."""
        if self.chain is None:
            return frozenset()
        return frozenset(hop.peer_id for hop in self.chain.plan.hops)
