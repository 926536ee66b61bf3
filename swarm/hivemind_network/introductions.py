"""Two peers show each other their passports before one asks the other's directory.

hivemind's requests have no place for a passport. So a peer that is about to ask another one opens a
stream first, on which both say Hello; from then on each knows whom it deals with, since libp2p
authenticates the peer id of every later request.
"""

from __future__ import annotations

import asyncio
import logging

from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from swarm.connection import Connection
from swarm.gate import Gate
from swarm.hivemind_network.requests import open_stream
from swarm.hivemind_network.streams import HivemindStream
from swarm.protocol.errors import NetworkError, ProtocolError
from swarm.protocol.identity import PeerId
from swarm.protocol.version import INTRODUCTION_PROTOCOL

log = logging.getLogger(__name__)

INTRODUCTION_TIMEOUT_S = 5.0


async def introduce(p2p: P2P, peer: PeerId, gate: Gate | None) -> None:
    """Show each other passports. Raises NetworkError, RemoteError or ProtocolError."""
    try:
        async with asyncio.timeout(INTRODUCTION_TIMEOUT_S):
            opened = await open_stream(p2p, peer, INTRODUCTION_PROTOCOL)
            stream = HivemindStream(
                peer,
                opened.reader,
                opened.writer,
                relayed=opened.connection.relayed,
                gate=gate,
            )
            async with Connection(stream) as connection:
                await connection.say_hello()
    except TimeoutError:
        raise NetworkError(f"{peer} does not introduce itself") from None


async def answer_introductions(p2p: P2P, gate: Gate | None) -> None:
    """Answer peers that introduce themselves."""

    async def accept(
        info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        peer = PeerId(info.peer_id.to_base58())
        stream = HivemindStream(peer, reader, writer, relayed=False, gate=gate)
        connection = Connection(stream)
        try:
            await connection.answer_hello(INTRODUCTION_TIMEOUT_S)
        except ProtocolError as error:
            log.info("refused %s: %s", peer, error)
            await connection.refuse(error)
        except NetworkError as error:
            log.debug("introduction of %s: %s", peer, error)
        finally:
            await connection.close()

    await p2p.add_binary_stream_handler(INTRODUCTION_PROTOCOL, accept)
