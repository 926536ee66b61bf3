"""Can others dial us? What our own addresses say, and what a peer finds that dials back."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass

from hivemind.p2p import P2P

from swarm.addresses import ip_of, is_global
from swarm.hivemind_network.multiaddresses import decode_address, encode_address
from swarm.hivemind_network.protobuf import (
    encode_field,
    read_delimited,
    read_fields,
    write_delimited,
)
from swarm.hivemind_network.requests import open_stream, parse_peer
from swarm.protocol.errors import PeerUnreachable
from swarm.protocol.identity import PeerId

AUTONAT_PROTOCOL = "/libp2p/autonat/1.0.0"
DIALLED = 0
NOT_REACHED = 100


def is_behind_router(peers: Iterable[str]) -> bool:
    """Whether we reach a peer of the internet from an address that only our own network knows.

    Asks the kernel which address it would send from; nothing is sent.
    """
    sources = {_source_address(peer) for peer in peers if is_global(peer)} - {None}
    return bool(sources) and not any(is_global(f"/ip4/{source}") for source in sources)


def _source_address(peer: str) -> str | None:
    """IPv4 only: nobody translates IPv6 addresses, and a firewall is found by dialling back."""
    ip = ip_of(peer)
    if ip is None or ip.version != 4:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(ip), 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


@dataclass(frozen=True, slots=True)
class DialBack:
    """What a peer found that tried to dial us."""

    reached: bool | None
    """None when it could or would not try."""
    address: str = ""
    """Where it reached us."""


async def ask_to_dial_back(p2p: P2P, peer: PeerId, own: PeerId, addresses: list[str]) -> DialBack:
    """Let a connected peer dial ``addresses`` of ours (libp2p's AutoNAT; takes up to 15 s).

    It dials only the host that it sees us at. Raises PeerUnreachable when it does not answer.
    """
    info = encode_field(1, parse_peer(own).to_bytes())
    info += b"".join(encode_field(2, encode_address(address)) for address in addresses)
    dial = encode_field(1, info)
    opened = await open_stream(p2p, peer, AUTONAT_PROTOCOL)
    try:
        write_delimited(opened.writer, encode_field(1, 0) + encode_field(2, dial))
        return _read_answer(await read_delimited(opened.reader))
    except (OSError, EOFError, ValueError) as error:
        raise PeerUnreachable(f"{peer} did not dial back: {error}") from error
    finally:
        opened.writer.transport.abort()


def _read_answer(message: bytes) -> DialBack:
    """Raises ValueError."""
    status: int | None = None
    address = ""
    for number, value in read_fields(message):
        if number == 3 and isinstance(value, bytes):  # the response
            status = DIALLED
            for inner_number, inner in read_fields(value):
                if inner_number == 1 and isinstance(inner, int):
                    status = inner
                if inner_number == 3 and isinstance(inner, bytes):
                    address = decode_address(inner).partition("/p2p/")[0]
    reached = {DIALLED: True, NOT_REACHED: False}.get(status) if status is not None else None
    return DialBack(reached, address if reached else "")
