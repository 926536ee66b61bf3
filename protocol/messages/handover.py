"""Hand-over: a node that leaves gives its sessions to another one."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.protocol.messages.fields import (
    DIGEST_BYTES,
    MAX_BLOCKS,
    MAX_ROWS,
    MAX_STEP,
    MAX_TOKENS,
    PEER,
    SESSION_ID_BYTES,
    Array,
    Bytes,
    Message,
    TensorField,
    Uint,
    wire,
)
from swarm.protocol.tensors import WireTensor


@dataclass(frozen=True, slots=True)
class Draining(Message):
    """Hop to client: this node leaves; name a replacement within ``wait_ms``."""

    TAG = 24
    wait_ms: int = wire(1, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class HandOver(Message):
    """Client to leaving hop: move the state of this session to ``peer``'s ``session_id``.

    Without ``final`` the hop sends what it has so far and goes on computing. With it the client
    promises that no step is in flight: the hop sends the rest and has done its part.
    """

    TAG = 25
    peer: str = wire(1, PEER)
    session_id: bytes = wire(2, Bytes(SESSION_ID_BYTES, SESSION_ID_BYTES))
    final: int = wire(3, Uint(1), 0)


@dataclass(frozen=True, slots=True)
class HandedOver(Message):
    """Leaving hop to client: ``length`` positions are moved; the receiver must have ``digest``."""

    TAG = 26
    length: int = wire(1, Uint(MAX_TOKENS))
    digest: bytes = wire(2, Bytes(DIGEST_BYTES, DIGEST_BYTES))
    code: int = wire(3, Uint(65535), 0)
    """Why it failed; 0: it did not. The session goes on at the leaving hop until it ends."""


@dataclass(frozen=True, slots=True)
class TakeOver(Message):
    """First message of a stream, leaving hop to replacement: state of your session follows."""

    TAG = 27
    session_id: bytes = wire(1, Bytes(SESSION_ID_BYTES, SESSION_ID_BYTES))


@dataclass(frozen=True, slots=True)
class CacheChunk(Message):
    """Keys and values of blocks ``[first_block, end_block)`` from ``position`` on.

    ``content`` is ``[blocks x rows x 2 x heads, tokens, head size]``: of each block and row first
    the keys, then the values; in the dtype of the cache. What was there before is overwritten.
    """

    TAG = 28
    first_block: int = wire(1, Uint(MAX_BLOCKS))
    end_block: int = wire(2, Uint(MAX_BLOCKS))
    position: int = wire(3, Uint(MAX_TOKENS))
    content: WireTensor = wire(4, TensorField())


@dataclass(frozen=True, slots=True)
class JournalChunk(Message):
    """A part of the leaving hop's journal: its outputs ``[rows, tokens, hidden]``."""

    TAG = 29
    position: int = wire(1, Uint(MAX_TOKENS))
    activations: WireTensor = wire(2, TensorField())


@dataclass(frozen=True, slots=True)
class TakenOver(Message):
    """Ends a round. Sent by the leaving hop, and answered with what the replacement has.

    After the ``final`` one the replacement goes on from ``length`` with step ``next_step``, and
    tells the client the same. ``left_padding`` has one count per row, in the rows' present order.
    """

    TAG = 30
    length: int = wire(1, Uint(MAX_TOKENS))
    next_step: int = wire(2, Uint(MAX_STEP))
    digest: bytes = wire(3, Bytes(DIGEST_BYTES, DIGEST_BYTES))
    """SHA-256 over all chunks of the stream so far."""
    final: int = wire(4, Uint(1), 0)
    left_padding: tuple[int, ...] = wire(5, Array(Uint(MAX_TOKENS), MAX_ROWS), ())
