"""Messages over a stream: framing, bounds before allocation, and peers that send too slowly.

One :class:`Connection` wraps one :class:`~swarm.ports.Stream`. It knows how frames are read and
written, not which message may follow which (``swarm.protocol.session`` and the services do).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TypeVar

from swarm.ports import Buffer, Stream
from swarm.protocol.codec import PREFIX_BYTES, decode, encode, read_prefix
from swarm.protocol.errors import (
    ERROR_TEXTS,
    ErrorCode,
    NetworkError,
    ProtocolError,
    RemoteError,
)
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import Error, Hello, HelloReply, Message, Ping, Pong
from swarm.protocol.passport import Passport
from swarm.protocol.version import (
    MAXIMUM_VERSION,
    MINIMUM_VERSION,
    negotiate,
    software_version,
)

FRAME_GRACE_S = 5.0
"""A frame that has begun must arrive within this, plus its size at the slowest accepted rate."""
SLOWEST_BYTES_PER_S = 64 * 1024

M = TypeVar("M", bound=Message)
PassportCheck = Callable[[PeerId, Passport | None], None]
"""Raises ProtocolError(OUTSIDE_POLICY) for a peer that something must not be sent to."""


class ByteObserver(Protocol):
    """Told of every frame's size."""

    def __call__(self, *, sent: int, received: int) -> None: ...


class Connection:
    """Sends and receives messages; safe for one reader and any number of senders.

    Use as an async context manager: leaving it closes the stream.
    """

    def __init__(
        self,
        stream: Stream,
        on_bytes: ByteObserver | None = None,
        *,
        admits_strangers: bool = False,
    ) -> None:
        """``admits_strangers`` only where a peer gets its passport from us."""
        self._stream = stream
        self._gate = None if admits_strangers else stream.gate
        self.passport: Passport | None = None
        """Of the peer, as checked at its Hello; None for a stranger in an open swarm."""
        self._on_bytes = on_bytes
        self._sending = asyncio.Lock()
        self.maximum_payload_bytes = 0
        """Largest tensor accepted from the peer; 0 until a session allows some."""
        self.bytes_sent = 0
        self.bytes_received = 0
        self.tensors_sent = 0
        self.tensors_received = 0

    @property
    def peer(self) -> PeerId:
        """The authenticated peer at the other end."""
        return self._stream.remote_peer

    @property
    def relayed(self) -> bool:
        """Whether the bytes go through a third peer, which was the only way when it was opened."""
        return self._stream.relayed

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the stream; never raises, and a second call does nothing."""
        await self._stream.close()

    async def send(self, *messages: Message) -> None:
        """Send messages one after the other. Raises NetworkError when the stream is broken.

        Cancelling may leave half a frame behind: close the connection afterwards.
        """
        buffers: list[Buffer] = []
        for message in messages:
            header, payload = encode(message)
            buffers.append(header)
            if len(payload):
                buffers.append(payload)
                self.tensors_sent += 1
        async with self._sending:
            await self._stream.send(*buffers)
        size_bytes = sum(len(buffer) for buffer in buffers)
        self.bytes_sent += size_bytes
        if self._on_bytes is not None:
            self._on_bytes(sent=size_bytes, received=0)

    async def receive(self) -> Message:
        """Wait for the next message, however long that takes; a begun frame must not stall.

        Raises DecodeError for bytes that are no message. Its code tells whether the stream is
        still in step: after BAD_FRAME and TOO_LARGE it is not, and must be closed.
        Raises NetworkError when the stream ends, ProtocolError(TOO_SLOW) for a slow sender.
        """
        prefix = read_prefix(
            await self._stream.receive_exactly(PREFIX_BYTES),
            maximum_payload_bytes=self.maximum_payload_bytes,
        )
        size_bytes = prefix.header_bytes + prefix.payload_bytes
        try:
            async with asyncio.timeout(FRAME_GRACE_S + size_bytes / SLOWEST_BYTES_PER_S):
                body = memoryview(await self._stream.receive_exactly(size_bytes))
        except TimeoutError:
            raise ProtocolError(ErrorCode.TOO_SLOW, f"frame of {size_bytes} bytes") from None
        self.bytes_received += PREFIX_BYTES + size_bytes
        if self._on_bytes is not None:
            self._on_bytes(sent=0, received=PREFIX_BYTES + size_bytes)
        self.tensors_received += prefix.payload_bytes > 0
        header_bytes = prefix.header_bytes
        return decode(prefix, bytes(body[:header_bytes]), body[header_bytes:])

    async def receive_only(self, kind: type[M]) -> M:
        """Receive a message that must be of ``kind``.

        Pings in between are answered. An ``Error`` becomes RemoteError, anything else
        ProtocolError(UNEXPECTED_MESSAGE).
        """
        while True:
            message = await self.receive()
            if isinstance(message, kind):
                return message
            if isinstance(message, Ping):
                await self.send(Pong(nonce=message.nonce))
                continue
            if isinstance(message, Error):
                raise remote_error(message, self.peer)
            raise ProtocolError(
                ErrorCode.UNEXPECTED_MESSAGE,
                f"{type(message).__name__} instead of {kind.__name__}",
            )

    async def say_hello(self, *messages: Message, only_for: PassportCheck | None = None) -> None:
        """Dialling side: offer our versions; ``messages`` go right behind, without waiting.

        In a swarm that keeps strangers out they wait until the peer has shown its passport; with
        ``only_for`` also until that has passed the check, which raises ProtocolError if it has not.
        """
        gate = self._gate
        minimum_version = self._minimum_version()
        hello = Hello(
            minimum_version=minimum_version,
            maximum_version=MAXIMUM_VERSION,
            software=software_version(),
            passport=b"" if gate is None else gate.passport,
            swarm_id=b"" if gate is None else gate.charter.swarm_id,
        )
        waits = only_for is not None or (gate is not None and gate.enforces)
        await self.send(hello, *(() if waits else messages))
        reply = await self.receive_only(HelloReply)
        if not minimum_version <= reply.version <= MAXIMUM_VERSION:
            raise ProtocolError(ErrorCode.UNSUPPORTED_VERSION, f"peer chose {reply.version}")
        self._meet(reply.passport, reply.swarm_id)
        if only_for is not None:
            only_for(self.peer, self.passport)
        if waits and messages:
            await self.send(*messages)

    async def answer_hello(self, timeout_s: float) -> None:
        """Accepting side: wait for Hello and answer with the highest version in common."""
        try:
            async with asyncio.timeout(timeout_s):
                hello = await self.receive_only(Hello)
        except TimeoutError:
            raise ProtocolError(ErrorCode.TOO_SLOW, "no Hello") from None
        version = negotiate(
            self._minimum_version(), MAXIMUM_VERSION, hello.minimum_version, hello.maximum_version
        )
        self._meet(hello.passport, hello.swarm_id)
        gate = self._gate
        await self.send(
            HelloReply(
                version=version,
                software=software_version(),
                passport=b"" if gate is None else gate.passport,
                swarm_id=b"" if gate is None else gate.charter.swarm_id,
            )
        )

    def _minimum_version(self) -> int:
        charter = None if self._gate is None else self._gate.charter
        return max(MINIMUM_VERSION, 0 if charter is None else charter.minimum_protocol_version)

    def _meet(self, passport: bytes, swarm_id: bytes) -> None:
        """Check what the peer has shown. Raises ProtocolError(WRONG_SWARM or PASSPORT_...)."""
        if self._gate is not None:
            self.passport = self._gate.check(self.peer, passport, swarm_id)
            self._gate.watch(self)

    async def refuse(
        self,
        error: ProtocolError,
        *,
        step: int = 0,
        retry_after_ms: int = 0,
        route_version: int = 0,
    ) -> None:
        """Tell the peer the code and its fixed text; a stream that is already gone is no matter."""
        try:
            await self.send(
                error_message(
                    error.code,
                    step=step,
                    retry_after_ms=retry_after_ms,
                    route_version=route_version,
                )
            )
        except NetworkError:
            return


def error_message(
    code: ErrorCode, *, step: int = 0, retry_after_ms: int = 0, route_version: int = 0
) -> Error:
    """The wire form of an error: nothing but a code, hints and the code's fixed text."""
    return Error(
        code=int(code),
        retry_after_ms=retry_after_ms,
        text=ERROR_TEXTS[code],
        step=step,
        route_version=route_version,
    )


def remote_error(message: Error, peer: PeerId) -> RemoteError:
    """The exception for a peer's error; codes that we do not know count as INTERNAL."""
    try:
        code = ErrorCode(message.code)
    except ValueError:
        code = ErrorCode.INTERNAL
    return RemoteError(code, peer=peer, retry_after_ms=message.retry_after_ms)


KEEPS_FRAMING = frozenset(
    {ErrorCode.UNKNOWN_MESSAGE, ErrorCode.BAD_FIELD, ErrorCode.UNSUPPORTED_DTYPE}
)
"""Decode errors after which the next frame can still be read."""
