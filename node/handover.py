"""Moves the state of one session, cache and journal, from a node that leaves to its replacement.

It goes in rounds over one stream, while the session is computed: each round moves what is new or
has changed since the one before. The last round comes when no step is in flight; then both have the
same, and both tell the client a digest of what was moved. Nothing is computed again.

``hop`` knows when a session moves, this module how. The rules of the session itself (numbers,
positions) are ``swarm.protocol.session``'s.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from swarm.connection import Connection
from swarm.journal import Journal
from swarm.node.engine.api import CacheRegion, CacheState, Engine, SessionCache
from swarm.protocol.errors import ErrorCode, NetworkError, ProtocolError, RemoteError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import (
    DIGEST_BYTES,
    CacheChunk,
    HandedOver,
    HandOver,
    JournalChunk,
    Ping,
    Pong,
    TakenOver,
    TakeOver,
)
from swarm.protocol.session import HopSession
from swarm.protocol.tensors import ITEM_BYTES

log = logging.getLogger(__name__)

Dial = Callable[[PeerId, TakeOver], Awaitable[Connection]]
"""Opens a stream to a host of the same model with these first words."""

JOURNAL_CHUNK_BYTES = 256 * 1024


class ChunkDigest:
    """SHA-256 over the chunks of one stream, as ``docs/protocol.md`` has it."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, chunk: CacheChunk | JournalChunk) -> None:
        numbers: tuple[int, ...]
        if isinstance(chunk, CacheChunk):
            numbers = (chunk.TAG, chunk.first_block, chunk.end_block, chunk.position)
            data = chunk.content.data
        else:
            numbers = (chunk.TAG, chunk.position)
            data = chunk.activations.data
        self._hash.update(b"".join(number.to_bytes(8, "big") for number in numbers))
        self._hash.update(data)

    def digest(self) -> bytes:
        return self._hash.digest()


@dataclass(frozen=True, slots=True)
class SessionState:
    """What of a session is moved, on either side."""

    session: HopSession
    engine: Engine
    cache: SessionCache
    journal: Journal


class StateSender:
    """The leaving side of one move. One round at a time; :meth:`changed` at any time."""

    def __init__(self, connection: Connection, state: SessionState) -> None:
        self._connection = connection
        self._state = state
        self._digest = ChunkDigest()
        self._moved = 0
        """So many positions of the cache are right at the other side."""
        self._moved_journal = 0

    def changed(self, position: int) -> None:
        """A step was computed that wrote to the cache from ``position`` on.

        To be called after it, before anything else is awaited: a round that runs may have read
        what was there before, or not.
        """
        self._moved = min(self._moved, position)
        self._moved_journal = min(self._moved_journal, position)

    async def send_round(self, next_step: int, *, final: bool) -> TakenOver:
        """Move what the other side lacks, and wait until it has it.

        Raises ProtocolError when the other side got something else, RemoteError when it refuses,
        NetworkError when it is gone.
        """
        state, engine = self._state, self._state.engine
        cached = await engine.export_state(state.cache)
        await self._send_cache(cached.length)
        await self._send_journal(cached.length)
        said = TakenOver(
            length=cached.length,
            next_step=next_step,
            digest=self._digest.digest(),
            final=int(final),
            left_padding=cached.left_padding,
        )
        await self._connection.send(said)
        answer = await self._connection.receive_only(TakenOver)
        if answer.digest != said.digest or answer.length != said.length:
            raise ProtocolError(ErrorCode.BAD_TENSOR, "the replacement got something else")
        return answer

    async def _send_cache(self, end: int) -> None:
        state, engine = self._state, self._state.engine
        first = self._moved
        # The other side cuts its journal where the cache is written anew.
        self._moved_journal = min(self._moved_journal, first)
        # What changes from here on lowers this again, also while it is being sent.
        self._moved = end
        for region in engine.pieces(state.cache, first, end):
            try:
                content = await engine.export_region(state.cache, region)
            except ProtocolError as error:
                if error.code is not ErrorCode.BAD_POSITION:
                    raise
                # Rolled back meanwhile: this round has nothing more to say of these positions.
                self.changed(region.first_position)
                continue
            await self._send(
                CacheChunk(
                    first_block=region.first_block,
                    end_block=region.end_block,
                    position=region.first_position,
                    content=content,
                )
            )

    async def _send_journal(self, end: int) -> None:
        state = self._state
        terms = state.session.terms
        position_bytes = terms.rows * terms.hidden_size * ITEM_BYTES[terms.wire_dtype]
        per_chunk = max(1, JOURNAL_CHUNK_BYTES // position_bytes)
        first, end = self._moved_journal, min(end, state.journal.length)
        self._moved_journal = end
        for position in range(first, end, per_chunk):
            last = min(position + per_chunk, end, state.journal.length)
            if last <= position:  # rolled back meanwhile
                self.changed(position)
                return
            await self._send(
                JournalChunk(position=position, activations=state.journal.read(position, last))
            )

    async def _send(self, chunk: CacheChunk | JournalChunk) -> None:
        self._digest.add(chunk)
        await self._connection.send(chunk)


class Mover:
    """Moves one session as its client asks: to one replacement, or to another if that fails."""

    def __init__(self, state: SessionState) -> None:
        self._state = state
        self._one_round = asyncio.Lock()
        self._target: tuple[str, bytes] | None = None
        self._connection: Connection | None = None
        self._sender: StateSender | None = None

    def changed(self, position: int) -> None:
        """As :meth:`StateSender.changed`, whether something is being moved or not."""
        if self._sender is not None:
            self._sender.changed(position)

    async def hand_over(self, message: HandOver, dial: Dial) -> HandedOver:
        """One round; failures come back as the answer's code."""
        if self._target != (message.peer, message.session_id):
            await self.close()  # which ends a round with another one that has got stuck
        async with self._one_round:
            try:
                if message.final and self._state.session.steps_in_flight:
                    raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "steps are in flight")
                sender = await self._sender_to(message, dial)
                next_step = self._state.session.received_step + 1
                moved = await sender.send_round(next_step, final=bool(message.final))
                return HandedOver(length=moved.length, digest=moved.digest)
            except (ProtocolError, RemoteError) as error:
                code = error.code
                log.warning("hand-over to %s: %s", message.peer, error)
            except NetworkError as error:
                code = ErrorCode.NEXT_HOP_LOST
                log.info("hand-over to %s: %s", message.peer, error)
            await self.close()
            return HandedOver(length=0, digest=bytes(DIGEST_BYTES), code=code)

    async def _sender_to(self, message: HandOver, dial: Dial) -> StateSender:
        target = (message.peer, message.session_id)
        if self._sender is None or self._target != target:
            await self.close()
            self._connection = await dial(PeerId(message.peer), TakeOver(message.session_id))
            self._sender = StateSender(self._connection, self._state)
            self._target = target
        return self._sender

    async def close(self) -> None:
        """Close the stream to the replacement; a later round begins anew."""
        self._sender = None
        if self._connection is not None:
            await self._connection.close()
            self._connection = None


async def receive_state(connection: Connection, state: SessionState) -> TakenOver:
    """The replacement's side: take everything up to the final round, and go on from there.

    Returns what the client is to be told. Raises ProtocolError for what does not fit, and once the
    session has begun without it.
    """
    digest = ChunkDigest()
    while True:
        message = await connection.receive()
        state.session.require_new()
        match message:
            case CacheChunk():
                await state.engine.import_region(state.cache, _region(message), message.content)
                # What is sent again has changed, and with it what the journal has from there on.
                state.journal.cut(message.position)
                digest.add(message)
            case JournalChunk():
                _take_journal(state, message)
                digest.add(message)
            case TakenOver():
                answer = TakenOver(
                    length=message.length, next_step=message.next_step, digest=digest.digest()
                )
                if message.final:
                    await _finish(state, message)
                await connection.send(answer)
                if message.final:
                    return answer
            case Ping():
                await connection.send(Pong(nonce=message.nonce))
            case _:
                raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(message).__name__)


def _region(chunk: CacheChunk) -> CacheRegion:
    end_position = chunk.position + chunk.content.shape[1]
    return CacheRegion(chunk.first_block, chunk.end_block, chunk.position, end_position)


def _take_journal(state: SessionState, chunk: JournalChunk) -> None:
    terms, tensor = state.session.terms, chunk.activations
    rows, tokens, hidden_size = tensor.shape
    if (rows, hidden_size, tensor.dtype) != (terms.rows, terms.hidden_size, terms.wire_dtype):
        raise ProtocolError(ErrorCode.BAD_TENSOR, "a journal")
    if chunk.position + tokens > terms.maximum_tokens:
        raise ProtocolError(ErrorCode.BAD_POSITION, "a journal beyond what the session reserved")
    if chunk.position > state.journal.length and not state.journal.is_gone:
        raise ProtocolError(ErrorCode.GAP, "a journal")
    state.journal.append(chunk.position, tensor)


async def _finish(state: SessionState, message: TakenOver) -> None:
    padding = message.left_padding or (0,) * state.session.terms.rows
    state.session.take_over(message.length, message.next_step)
    await state.engine.import_state(state.cache, CacheState(message.length, padding))
    state.journal.cut(message.length)
    if state.journal.length < message.length:
        state.journal.drop()  # the leaving node had none: say so to who asks for it
