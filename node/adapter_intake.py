"""Takes adapters that clients bring: the index first, then the tensors of this node's blocks.

An adapter that is in the catalogue is fetched from peers instead; its client then sends no tensor.

Everything is bounded before it is taken: the index by its announced size, the tensors by the index,
their memory by the engine's room for adapters, the bringers by their number. What came is checked
by the engine, hash by hash; what is incomplete at the end of the stream is dropped.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from swarm.connection import Connection
from swarm.node.engine.api import Engine, IncomingAdapter
from swarm.protocol.adapter_index import AdapterIndex, ModuleSpec, decode_index
from swarm.protocol.errors import AdapterError, DecodeError, ErrorCode, ProtocolError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import (
    MAX_PAYLOAD_BYTES,
    AdapterIndexPart,
    AdapterStatus,
    AdapterTensor,
    Message,
    PushAdapter,
)

log = logging.getLogger(__name__)

AT_A_TIME = 4
AT_A_TIME_OF_ONE_PEER = 2
MOST_WAITING = 64
MOST_WAITING_OF_ONE_PEER = 16
LONGEST_S = 600.0

Receive = Callable[[Connection], Awaitable[Message]]


class AdapterCatalogue(Protocol):
    """``node.adapter_weights.CatalogueAdapters`` is one."""

    async def fetch(
        self, name: str, modules: Sequence[ModuleSpec]
    ) -> Callable[[ModuleSpec], Awaitable[list[bytes]]] | None:
        """How to read these modules; None when they are not to be had."""


class AdapterIntake:
    """All adapters that are being brought to one node."""

    def __init__(self, catalogue: AdapterCatalogue | None = None) -> None:
        """``catalogue`` is where adapters that have a name are looked for first."""
        self._catalogue = catalogue
        self._bringers: Counter[PeerId] = Counter()
        self._slots = asyncio.Semaphore(AT_A_TIME)
        self._slots_of: dict[PeerId, asyncio.Semaphore] = {}

    async def take(
        self, connection: Connection, offer: PushAdapter, engine: Engine, receive: Receive
    ) -> None:
        """Serve one stream that began with ``offer``. Raises ProtocolError and NetworkError."""
        if offer.adapter_id in engine.adapters:
            await connection.send(AdapterStatus(loaded=1))
            return
        with self._counted(connection.peer) as slots_of_peer:
            async with slots_of_peer, self._slots:
                if offer.adapter_id not in engine.adapters:  # somebody else may have brought it
                    await self._take_in_time(connection, offer, engine, receive)
        await connection.send(AdapterStatus(loaded=1))

    @contextmanager
    def _counted(self, peer: PeerId) -> Iterator[asyncio.Semaphore]:
        """A place in the queue; the peer's own part of it."""
        if (
            self._bringers.total() >= MOST_WAITING
            or self._bringers[peer] >= MOST_WAITING_OF_ONE_PEER
        ):
            raise ProtocolError(ErrorCode.ADAPTER_NO_ROOM, "too many adapters at a time")
        self._bringers[peer] += 1
        slots = self._slots_of.setdefault(peer, asyncio.Semaphore(AT_A_TIME_OF_ONE_PEER))
        try:
            yield slots
        finally:
            self._bringers[peer] -= 1
            if not self._bringers[peer]:
                del self._bringers[peer], self._slots_of[peer]

    async def _take_in_time(
        self, connection: Connection, offer: PushAdapter, engine: Engine, receive: Receive
    ) -> None:
        try:
            async with asyncio.timeout(LONGEST_S):
                await self._take(connection, offer, engine, receive)
        except TimeoutError:
            raise ProtocolError(ErrorCode.TOO_SLOW, "an adapter") from None

    async def _take(
        self, connection: Connection, offer: PushAdapter, engine: Engine, receive: Receive
    ) -> None:
        wanted = AdapterStatus(loaded=0, first_block=engine.first_block, end_block=engine.end_block)
        await connection.send(wanted)
        index = await _receive_index(connection, offer, receive)
        incoming = engine.adapters.admit(index)
        try:
            if offer.catalogue_name:
                if await self._fetch(offer.catalogue_name, incoming):
                    incoming.finish()
                    return
                await connection.send(wanted)
            connection.maximum_payload_bytes = MAX_PAYLOAD_BYTES
            for number, module in enumerate(index.modules):
                if engine.first_block <= module.block < engine.end_block:
                    tensors = await _receive_module(connection, number, module, receive)
                    await incoming.load_module(module, tensors)
            incoming.finish()
        finally:
            incoming.abandon()

    async def _fetch(self, name: str, incoming: IncomingAdapter) -> bool:
        """Take the tensors from the catalogue; False when the client must send them."""
        read = None
        if self._catalogue is not None:
            read = await self._catalogue.fetch(name, incoming.wanted)
        if read is None:
            return False
        try:
            for module in incoming.wanted:
                await incoming.load_module(module, await read(module))
        except (ProtocolError, AdapterError) as error:
            log.info("the catalogue's %s is not what was asked for: %s", name, error)
            return False
        return True


async def _receive_index(
    connection: Connection, offer: PushAdapter, receive: Receive
) -> AdapterIndex:
    data = bytearray()
    while len(data) < offer.index_bytes:
        message = await receive(connection)
        if not isinstance(message, AdapterIndexPart):
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(message).__name__)
        if not message.pieces:
            raise ProtocolError(ErrorCode.BAD_FIELD, "nothing of an index")
        for piece in message.pieces:
            data += piece
    if len(data) != offer.index_bytes or hashlib.sha256(data).digest() != offer.adapter_id:
        raise ProtocolError(ErrorCode.ADAPTER_REFUSED, "not the index of that adapter")
    try:
        return decode_index(bytes(data))
    except DecodeError as error:
        raise ProtocolError(ErrorCode.ADAPTER_REFUSED, error.detail) from None


async def _receive_module(
    connection: Connection, number: int, module: ModuleSpec, receive: Receive
) -> list[bytearray]:
    """The tensors of one module, each in one or several messages."""
    tensors: list[bytearray] = []
    for place, spec in enumerate(module.tensors):
        data = bytearray()
        while len(data) < spec.size_bytes:
            message = await receive(connection)
            if not isinstance(message, AdapterTensor):
                raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(message).__name__)
            values = message.values
            if (
                (message.module, message.tensor) != (number, place)
                or values.dtype is not spec.dtype
                or values.shape[0] != 1
                or values.shape[2] != spec.shape[-1]
                or len(data) + len(values.data) > spec.size_bytes
            ):
                raise ProtocolError(ErrorCode.ADAPTER_REFUSED, f"module {number} out of order")
            data += values.data
        tensors.append(data)
    return tensors
