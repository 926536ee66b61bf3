"""What we ask of the p2pd daemon, each time on a socket of its own.

hivemind's own calls leak their socket when they fail, and misread addresses with peer ids in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2

from swarm.addresses import is_relayed
from swarm.hivemind_network.multiaddresses import decode_address, encode_address
from swarm.protocol.errors import PeerUnreachable
from swarm.protocol.identity import PeerId

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PeerConnection:
    """A connection of the daemon with a peer; there may be several with the same one."""

    peer: PeerId
    address: str
    """Where the peer is, from here; empty when it is of an unknown kind."""

    @property
    def relayed(self) -> bool:
        return is_relayed(self.address)


@dataclass(frozen=True, slots=True)
class OpenedStream:
    """A stream to a peer, over a connection that the daemon had or made."""

    connection: PeerConnection
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


async def connect(p2p: P2P, peer: PeerId, addresses: Sequence[str]) -> None:
    """Does nothing when there is a connection. Raises PeerUnreachable."""
    request = p2pd_pb2.Request(
        type=p2pd_pb2.Request.CONNECT,
        connect=p2pd_pb2.ConnectRequest(
            peer=parse_peer(peer).to_bytes(), addrs=_encode_addresses(addresses)
        ),
    )
    async with daemon_request(p2p, request) as (_, _, writer):
        writer.close()


async def disconnect(p2p: P2P, peer: PeerId) -> None:
    """Close all connections with ``peer``. Raises PeerUnreachable."""
    request = p2pd_pb2.Request(
        type=p2pd_pb2.Request.DISCONNECT,
        disconnect=p2pd_pb2.DisconnectRequest(peer=parse_peer(peer).to_bytes()),
    )
    async with daemon_request(p2p, request) as (_, _, writer):
        writer.close()


async def open_stream(p2p: P2P, peer: PeerId, protocol: str) -> OpenedStream:
    """Over the best connection there is, or a new one. Raises PeerUnreachable."""
    request = p2pd_pb2.Request(
        type=p2pd_pb2.Request.STREAM_OPEN,
        streamOpen=p2pd_pb2.StreamOpenRequest(peer=parse_peer(peer).to_bytes(), proto=[protocol]),
    )
    async with daemon_request(p2p, request) as (response, reader, writer):
        connection = _connection(response.streamInfo.peer, response.streamInfo.addr)
        return OpenedStream(connection, reader, writer)


async def list_connections(p2p: P2P) -> list[PeerConnection]:
    """All of the daemon. Raises PeerUnreachable when it does not answer."""
    request = p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS)
    async with daemon_request(p2p, request) as (response, _, writer):
        writer.close()
        return [_connection(info.id, info.addrs[0]) for info in response.peers]


async def own_addresses(p2p: P2P) -> list[str]:
    """Where the daemon listens or was told to announce, and what enough peers see of it.

    Raises PeerUnreachable when it does not answer.
    """
    request = p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY)
    async with daemon_request(p2p, request) as (response, _, writer):
        writer.close()
        addresses = (_decode(address) for address in response.identify.addrs)
        return [address for address in addresses if address]


def parse_peer(peer: PeerId) -> PeerID:
    """Raises PeerUnreachable for what is no peer id."""
    try:
        return PeerID.from_base58(peer)
    except ValueError as error:
        raise PeerUnreachable(f"{peer!r} is no peer id") from error


@contextlib.asynccontextmanager
async def daemon_request(
    p2p: P2P, request: p2pd_pb2.Request
) -> AsyncIterator[tuple[p2pd_pb2.Response, asyncio.StreamReader, asyncio.StreamWriter]]:
    """One request and its response; whoever asks closes the socket, unless an error is raised."""
    writer = None
    try:
        connector = p2p._client.control.daemon_connector  # noqa: SLF001
        reader, writer = await connector.open_connection()
        await write_pbmsg(writer, request)
        response = p2pd_pb2.Response()
        await read_pbmsg_safe(reader, response)
        if response.type == p2pd_pb2.Response.ERROR:
            raise PeerUnreachable(" ".join(response.error.msg.split())[:300])
        yield response, reader, writer
    except (OSError, EOFError) as error:
        _abort(writer)
        raise PeerUnreachable(f"the network daemon does not answer: {error}") from error
    except BaseException:
        _abort(writer)
        raise


def _abort(writer: asyncio.StreamWriter | None) -> None:
    if writer is not None:
        writer.transport.abort()


def _connection(peer: bytes, address: bytes) -> PeerConnection:
    return PeerConnection(PeerId(PeerID(peer).to_base58()), _decode(address))


def _decode(address: bytes) -> str:
    try:
        return decode_address(address)
    except ValueError:
        return ""


def _encode_addresses(addresses: Iterable[str]) -> list[bytes]:
    """What is no address is left out (peers announce them)."""
    encoded = []
    for address in addresses:
        try:
            encoded.append(encode_address(address))
        except ValueError as error:
            logger.debug("no address: %s", error)
    return encoded
