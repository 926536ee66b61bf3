"""Sends manifests and chunks to peers that ask: within the donor's cap, and to so many at a time.

Streams about weights have a protocol name of their own, so that a node can send chunks while it
still fetches others, long before it serves sessions. One connection asks about one manifest at a
time; its requests are answered in their order, so a slow reader delays only itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from swarm.catalogue.holdings import Holding
from swarm.catalogue.rate import RateLimit
from swarm.connection import KEEPS_FRAMING, Connection
from swarm.ports import Clock, Stream
from swarm.protocol.errors import (
    CheckpointError,
    DecodeError,
    ErrorCode,
    NetworkError,
    ProtocolError,
)
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import (
    AskChunks,
    Chunk,
    ChunksHeld,
    GetChunk,
    GetManifest,
    ManifestPiece,
    ManifestSignatures,
    Message,
    Ping,
    Pong,
)

log = logging.getLogger(__name__)

PIECE_BYTES = 1024 * 1024
RETRY_AFTER_MS = 3000

InThread = Callable[..., Awaitable[Any]]
"""``asyncio.to_thread``, or a stand-in where time is virtual."""


@dataclass(frozen=True, slots=True)
class ChunkLimits:
    """What one peer grants to those who fetch from it."""

    uploads: int = 64
    """Streams that fetch at a time."""
    uploads_per_peer: int = 4
    hello_timeout_s: float = 5.0
    silence_timeout_s: float = 60.0
    mistakes_per_stream: int = 16


@dataclass(slots=True)
class Sent:
    """What was sent so far."""

    bytes: int = 0
    chunks: int = 0
    by_peer: Counter[PeerId] = field(default_factory=Counter)


class ChunkService:
    """Answers about the holdings that it is given; they may change at any time."""

    def __init__(
        self,
        holdings: Callable[[], Mapping[bytes, Holding]],
        *,
        clock: Clock,
        upload: RateLimit | None = None,
        limits: ChunkLimits | None = None,
        in_thread: InThread = asyncio.to_thread,
    ) -> None:
        """``holdings`` are by the digests of their manifests."""
        self._holdings = holdings
        self._upload = upload or RateLimit(None, clock)
        self._limits = limits or ChunkLimits()
        self._in_thread = in_thread
        self._streams: Counter[PeerId] = Counter()
        self.sent = Sent()

    @property
    def uploads(self) -> int:
        """Streams that fetch now."""
        return self._streams.total()

    async def serve_stream(self, stream: Stream) -> None:
        """Handle a stream that a peer opened for ``WEIGHTS_PROTOCOL``."""
        connection = Connection(stream)
        try:
            await connection.answer_hello(self._limits.hello_timeout_s)
            await self._serve(connection, await self._receive(connection))
        except ProtocolError as error:
            log.info("refused %s: %s", connection.peer, error)
            hint_ms = RETRY_AFTER_MS if error.code is ErrorCode.TOO_MANY_UPLOADS else 0
            await connection.refuse(error, retry_after_ms=hint_ms)
        except NetworkError as error:
            log.debug("stream of %s ended: %s", connection.peer, error)
        except Exception:  # the one place for a stream: log, answer with a code, go on serving
            log.exception("stream of %s failed", connection.peer)
            await connection.refuse(ProtocolError(ErrorCode.INTERNAL))
        finally:
            await connection.close()

    async def _serve(self, connection: Connection, message: Message) -> None:
        """Answer until the peer is gone or breaks the protocol."""
        with self._counted(connection.peer):
            holding: Holding | None = None
            mistakes = 0
            while True:
                try:
                    match message:
                        case GetManifest():
                            await self._send_manifest(connection, message)
                        case AskChunks():
                            holding = self._holding(message.manifest_digest)
                            await connection.send(_chunks_held(holding))
                        case GetChunk():
                            await self._send_chunk(connection, holding, message.chunk)
                        case Ping():
                            await connection.send(Pong(nonce=message.nonce))
                        case _:
                            raise ProtocolError(
                                ErrorCode.UNEXPECTED_MESSAGE, type(message).__name__
                            )
                    message = await self._receive(connection)
                except ProtocolError as error:
                    mistakes += 1
                    if (
                        error.code not in _GOES_ON
                        or mistakes > self._limits.mistakes_per_stream
                        or (isinstance(error, DecodeError) and error.code not in KEEPS_FRAMING)
                    ):
                        raise
                    await connection.refuse(error)
                    message = await self._receive(connection)

    async def _receive(self, connection: Connection) -> Message:
        try:
            async with asyncio.timeout(self._limits.silence_timeout_s):
                return await connection.receive()
        except TimeoutError:
            raise NetworkError("silent for too long") from None

    @contextmanager
    def _counted(self, peer: PeerId) -> Iterator[None]:
        limits = self._limits
        if self.uploads >= limits.uploads or self._streams[peer] >= limits.uploads_per_peer:
            raise ProtocolError(ErrorCode.TOO_MANY_UPLOADS)
        self._streams[peer] += 1
        try:
            yield
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    def _holding(self, digest: bytes) -> Holding:
        holding = self._holdings().get(digest)
        if holding is None:
            raise ProtocolError(ErrorCode.UNKNOWN_MANIFEST)
        return holding

    async def _send_manifest(self, connection: Connection, request: GetManifest) -> None:
        holding = self._holding(request.manifest_digest)
        content = holding.manifest.content
        for start in range(0, len(content), PIECE_BYTES):
            piece = content[start : start + PIECE_BYTES]
            await self._upload.take(len(piece))
            await connection.send(ManifestPiece(total_bytes=len(content), content=piece))
        await connection.send(
            ManifestSignatures(
                publishers=tuple(item.publisher for item in holding.signatures[:16]),
                signatures=tuple(item.signature for item in holding.signatures[:16]),
            )
        )

    async def _send_chunk(
        self, connection: Connection, holding: Holding | None, chunk: int
    ) -> None:
        if holding is None or chunk >= len(holding.held) or not holding.held[chunk]:
            raise ProtocolError(ErrorCode.CHUNK_NOT_HELD)
        try:
            content: bytes = await self._in_thread(holding.read_chunk, chunk)
        except CheckpointError:
            raise ProtocolError(ErrorCode.CHUNK_NOT_HELD, "it is gone from the disk") from None
        await self._upload.take(len(content))
        await connection.send(Chunk(chunk=chunk, content=content))
        self.sent.bytes += len(content)
        self.sent.chunks += 1
        self.sent.by_peer[connection.peer] += len(content)


_GOES_ON = KEEPS_FRAMING | {ErrorCode.CHUNK_NOT_HELD, ErrorCode.UNKNOWN_MANIFEST}


def _chunks_held(holding: Holding) -> ChunksHeld:
    """Both bitmaps of a holding; a manifest without a single chunk has one empty byte."""
    bitmaps = np.packbits(holding.held).tobytes() + np.packbits(holding.coming).tobytes()
    return ChunksHeld(bitmaps=bitmaps or b"\0")
