"""Brings an adapter to a node that lacks it, and only what the node's blocks need of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from swarm.client.link import HopFailed
from swarm.connection import Connection, PassportCheck
from swarm.ports import Transport
from swarm.protocol.adapter_index import AdapterIndex, ModuleSpec, TensorSpec, size_bytes
from swarm.protocol.errors import ErrorCode, NetworkError, ProtocolError, RemoteError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import (
    MAX_PAYLOAD_BYTES,
    AdapterIndexPart,
    AdapterStatus,
    AdapterTensor,
    PushAdapter,
)
from swarm.protocol.tensors import ITEM_BYTES, WireTensor
from swarm.protocol.version import STREAM_PROTOCOL
from swarm.routing import Hop as PlannedHop

log = logging.getLogger(__name__)

SLOWEST_BYTES_PER_S = 128 * 1024
"""An upload that is slower than a weak home line is given up."""
QUEUE_S = 20.0
FETCH_S = 25.0
"""For a node that tries to get it from peers first."""
_PIECE_BYTES = 4096
_PIECES = 15
_TENSOR_BYTES = MAX_PAYLOAD_BYTES // 4
"""Of one message: the node reads a message whole, and pings must not wait long behind it."""


class AdapterSource(Protocol):
    """Where an adapter's bytes come from; ``swarm.catalogue.adapter.AdapterFiles`` is one."""

    @property
    def index(self) -> AdapterIndex: ...

    @property
    def catalogue_name(self) -> str:
        """``NAME@REVISION`` by which nodes may fetch it from peers; empty: they cannot."""

    def read(self, module: ModuleSpec) -> Sequence[bytes]:
        """The bytes of a module's tensors, in the order of ``ModuleSpec.tensors``."""


def push_timeout_s(source: AdapterSource) -> float:
    """How long bringing it to one node may take; others may be before us."""
    fetching_s = FETCH_S if source.catalogue_name else 0.0
    return QUEUE_S + fetching_s + source.index.size_bytes / SLOWEST_BYTES_PER_S


@dataclass(frozen=True, slots=True)
class Pushed:
    """What it took."""

    sent_bytes: int
    """Of tensors; 0 when the node had the adapter already, or got it from peers."""


async def bring_adapter(
    transport: Transport,
    hop: PlannedHop,
    source: AdapterSource,
    *,
    model_revision: bytes,
    only_for: PassportCheck | None = None,
) -> None:
    """Give a hop the adapter that it lacks. Raises HopFailed."""
    try:
        pushed = await push_adapter(
            transport,
            hop.peer_id,
            hop.addresses,
            source,
            model_revision=model_revision,
            only_for=only_for,
        )
    except (NetworkError, RemoteError, ProtocolError) as error:
        raise HopFailed(hop, error) from error
    log.info("brought the adapter to %s: %d bytes", hop.peer_id, pushed.sent_bytes)


async def push_adapter(
    transport: Transport,
    peer: PeerId,
    addresses: Sequence[str],
    source: AdapterSource,
    *,
    model_revision: bytes,
    only_for: PassportCheck | None = None,
) -> Pushed:
    """Bring an adapter to ``peer``; returns when sessions may use it there.

    Raises RemoteError(ADAPTER_REFUSED, ADAPTER_NO_ROOM ...), NetworkError and ProtocolError.
    """
    index = source.index
    try:
        async with (
            asyncio.timeout(push_timeout_s(source)),
            Connection(await transport.open(peer, STREAM_PROTOCOL, addresses)) as connection,
        ):
            await connection.say_hello(
                PushAdapter(
                    adapter_id=index.adapter_id,
                    model_revision=model_revision,
                    index_bytes=len(index.encoded),
                    catalogue_name=source.catalogue_name,
                ),
                only_for=only_for,
            )
            status = await connection.receive_only(AdapterStatus)
            if status.loaded:
                return Pushed(0)
            for part in _index_parts(index.encoded):
                await connection.send(part)
            if source.catalogue_name:
                status = await connection.receive_only(AdapterStatus)
                if status.loaded:
                    return Pushed(0)
            # What the node refuses, it says at once: do not send the rest into the void.
            answer = asyncio.create_task(connection.receive_only(AdapterStatus))
            try:
                await _send_tensors(connection, index, status, source, answer)
                if not (await answer).loaded:
                    raise ProtocolError(ErrorCode.BAD_FIELD, "an adapter is neither taken nor not")
            finally:
                answer.cancel()
                await asyncio.gather(answer, return_exceptions=True)
            return Pushed(size_bytes(index.of_blocks(status.first_block, status.end_block)))
    except TimeoutError:
        raise NetworkError(f"{peer} did not take the adapter in time") from None


async def _send_tensors(
    connection: Connection,
    index: AdapterIndex,
    status: AdapterStatus,
    source: AdapterSource,
    answer: asyncio.Task[AdapterStatus],
) -> None:
    for number, module in enumerate(index.modules):
        if not status.first_block <= module.block < status.end_block:
            continue
        for place, (spec, data) in enumerate(zip(module.tensors, source.read(module), strict=True)):
            for values in _pieces(spec, data):
                try:
                    await connection.send(AdapterTensor(module=number, tensor=place, values=values))
                except NetworkError:
                    if answer.done():
                        await answer  # it says why
                    raise
                if answer.done():
                    await answer
                    return


def _index_parts(encoded: bytes) -> Iterator[AdapterIndexPart]:
    pieces = [encoded[at : at + _PIECE_BYTES] for at in range(0, len(encoded), _PIECE_BYTES)]
    for first in range(0, len(pieces), _PIECES):
        yield AdapterIndexPart(pieces=tuple(pieces[first : first + _PIECES]))


def _pieces(spec: TensorSpec, data: bytes) -> Iterator[WireTensor]:
    columns = spec.shape[-1]
    row_bytes = columns * ITEM_BYTES[spec.dtype]
    per_piece = max(1, _TENSOR_BYTES // row_bytes) * row_bytes
    for at in range(0, len(data), per_piece):
        piece = data[at : at + per_piece]
        yield WireTensor(spec.dtype, (1, len(piece) // row_bytes, columns), piece)
