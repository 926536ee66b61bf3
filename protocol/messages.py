"""All messages that peers exchange on streams, and the bounds of every field.

A message is a frozen dataclass with an explicit numeric tag; its fields are numbered too. Neither
is derived from a Python name, so that renaming is free and reusing a number is a visible mistake.
Removed numbers stay in ``RETIRED_TAGS`` and are never given out again.

How messages become bytes: ``codec``. Which message may follow which: ``session``. The text for
other implementations: ``docs/protocol.md``.

The life of a session, client ``C`` and hops ``1 .. h``::

    C -> i    Hello, OpenSession        answered by HelloReply, SessionOpened (for every hop i)
    C -> i    SetRoute(next hop)        hop i dials the next hop:
    i -> i+1  Hello, Attach             answered by HelloReply, Attached
    i -> C    RouteReady
    C -> 1    Step                      activations of new tokens, numbered
    i -> i+1  Step                      straight on to the next hop, never back through C
    h -> C    StepResult
    C -> i    CloseSession              answered by SessionClosed, the explicit end of a stream
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar

from swarm.protocol.tensors import WireTensor

# --- bounds that hold for every peer (a node may announce tighter ones) ---------------------------
MAX_HEADER_BYTES = 64 * 1024
"""Largest msgpack map of one message."""
MAX_PAYLOAD_BYTES = 4 * 1024 * 1024
"""Largest tensor of one message, as sent and as decompressed. Longer prompts: several steps."""
MAX_BLOCKS = 1024
MAX_ROWS = 64
MAX_TOKENS = 1 << 22
MAX_HOPS = 64
MAX_STEP = (1 << 53) - 1
MAX_DEADLINE_MS = 10 * 60 * 1000
SESSION_ID_BYTES = 16
REVISION_BYTES = 32


# --- field specifications ------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Uint:
    """Unsigned integer in ``0 .. maximum``; booleans are refused."""

    maximum: int


@dataclass(frozen=True, slots=True)
class Bytes:
    """Byte string whose length is in ``minimum .. maximum``."""

    minimum: int
    maximum: int


@dataclass(frozen=True, slots=True)
class Text:
    """UTF-8 text of at most ``maximum_bytes`` bytes without control characters."""

    maximum_bytes: int


@dataclass(frozen=True, slots=True)
class Array:
    """At most ``maximum_length`` items of one kind; a tuple in Python."""

    item: Uint | Bytes | Text
    maximum_length: int


@dataclass(frozen=True, slots=True)
class TensorField:
    """The message's one tensor: dtype, encoding and shape in the header, bytes in the payload."""


Spec = Uint | Bytes | Text | Array | TensorField


@dataclass(frozen=True, slots=True)
class WireField:
    number: int
    spec: Spec


def wire(number: int, spec: Spec, default: Any = MISSING) -> Any:
    """Declare a field: its number on the wire, its bounds, and its value when a sender omits it."""
    metadata = {"wire": WireField(number, spec)}
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


class Message:
    """Base of all messages; ``TAG`` is its number on the wire."""

    TAG: ClassVar[int]


PEER = Text(64)
"""A libp2p peer id in base58 (``12D3KooW...``)."""


# --- first message of every stream ---------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Hello(Message):
    """The versions that the dialling side speaks. ``software`` is only information."""

    TAG = 1
    minimum_version: int = wire(1, Uint(65535))
    maximum_version: int = wire(2, Uint(65535))
    software: str = wire(3, Text(64), "")


@dataclass(frozen=True, slots=True)
class HelloReply(Message):
    """The highest version in common; it holds for the rest of the stream."""

    TAG = 2
    version: int = wire(1, Uint(65535))
    software: str = wire(2, Text(64), "")


# --- opening a session ---------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class OpenSession(Message):
    """Client to hop: reserve a cache of ``rows x maximum_tokens`` for ``[first_block, end_block)``.

    ``left_padding`` (empty, or one count per row) says how many leading positions of each row are
    padding and must never be attended to. ``previous_peer`` is the only peer whose activations the
    session accepts; for the first hop it is the client itself.
    """

    TAG = 3
    model_revision: bytes = wire(1, Bytes(REVISION_BYTES, REVISION_BYTES))
    first_block: int = wire(2, Uint(MAX_BLOCKS))
    end_block: int = wire(3, Uint(MAX_BLOCKS))
    rows: int = wire(4, Uint(MAX_ROWS))
    maximum_tokens: int = wire(5, Uint(MAX_TOKENS))
    wire_dtype: int = wire(6, Uint(255))
    wire_encoding: int = wire(7, Uint(255))
    previous_peer: str = wire(8, PEER)
    left_padding: tuple[int, ...] = wire(9, Array(Uint(MAX_TOKENS), MAX_ROWS), ())


@dataclass(frozen=True, slots=True)
class SessionOpened(Message):
    """Hop to client. ``session_id`` is made by the hop and valid on this hop only."""

    TAG = 4
    session_id: bytes = wire(1, Bytes(SESSION_ID_BYTES, SESSION_ID_BYTES))
    maximum_step_tokens: int = wire(2, Uint(MAX_TOKENS))
    """Most ``rows x tokens`` in one step."""
    maximum_steps_in_flight: int = wire(3, Uint(1024))
    free_cache_tokens: int = wire(4, Uint(MAX_STEP), 0)


@dataclass(frozen=True, slots=True)
class SetRoute(Message):
    """Client to hop: where the outputs of this session go.

    An empty ``next_peer`` means back to the client on this very stream (the last hop).
    ``route_version`` grows with every change of the route. No address: the hop dials only peers
    that it finds in the directory as hosts of the same model, so that nobody can aim it elsewhere.
    """

    TAG = 5
    route_version: int = wire(1, Uint(MAX_STEP))
    next_peer: str = wire(2, PEER, "")
    next_session_id: bytes = wire(3, Bytes(0, SESSION_ID_BYTES), b"")


@dataclass(frozen=True, slots=True)
class RouteReady(Message):
    """Hop to client: the next hop has accepted the attachment."""

    TAG = 6
    route_version: int = wire(1, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class Attach(Message):
    """Hop to next hop: this stream carries the steps of your session ``session_id``."""

    TAG = 7
    session_id: bytes = wire(1, Bytes(SESSION_ID_BYTES, SESSION_ID_BYTES))
    route_version: int = wire(2, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class Attached(Message):
    """Next hop to hop: the stream belongs to the session; steps may follow."""

    TAG = 8
    route_version: int = wire(1, Uint(MAX_STEP))


# --- steps ---------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Step(Message):
    """New tokens for a session: activations ``[rows, tokens, hidden]`` at ``position``.

    A position below what is cached drops the rest of the cache first (rollback). ``row_order``
    (empty, or one source row for each row) permutes the cache before the step (beam search).
    ``output_tokens`` (at least 1) is how many trailing positions the client wants back from the
    last hop; hops in between always get all of them. ``hop_queue_us`` and ``hop_compute_us`` have
    one entry per hop passed so far.
    """

    TAG = 9
    step: int = wire(1, Uint(MAX_STEP))
    position: int = wire(2, Uint(MAX_TOKENS))
    output_tokens: int = wire(3, Uint(MAX_TOKENS))
    activations: WireTensor = wire(4, TensorField())
    row_order: tuple[int, ...] = wire(5, Array(Uint(MAX_ROWS - 1), MAX_ROWS), ())
    deadline_ms: int = wire(6, Uint(MAX_DEADLINE_MS), 0)
    """What is left of the client's deadline when this is sent; 0 means none."""
    hop_queue_us: tuple[int, ...] = wire(7, Array(Uint(MAX_STEP), MAX_HOPS), ())
    hop_compute_us: tuple[int, ...] = wire(8, Array(Uint(MAX_STEP), MAX_HOPS), ())


@dataclass(frozen=True, slots=True)
class StepResult(Message):
    """Last hop to client: the last positions, ``[rows, output_tokens, hidden]``."""

    TAG = 10
    step: int = wire(1, Uint(MAX_STEP))
    position: int = wire(2, Uint(MAX_TOKENS))
    activations: WireTensor = wire(3, TensorField())
    hop_queue_us: tuple[int, ...] = wire(4, Array(Uint(MAX_STEP), MAX_HOPS), ())
    hop_compute_us: tuple[int, ...] = wire(5, Array(Uint(MAX_STEP), MAX_HOPS), ())


# --- any time ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Error(Message):
    """Something was refused or failed; ``step`` (if not 0) names the step that it concerns."""

    TAG = 11
    code: int = wire(1, Uint(65535))
    retry_after_ms: int = wire(2, Uint(MAX_DEADLINE_MS), 0)
    text: str = wire(3, Text(128), "")
    step: int = wire(4, Uint(MAX_STEP), 0)


@dataclass(frozen=True, slots=True)
class Ping(Message):
    """Are you there? Allowed at any time after ``HelloReply``."""

    TAG = 12
    nonce: int = wire(1, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class Pong(Message):
    TAG = 13
    nonce: int = wire(1, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class CloseSession(Message):
    """Client to hop: free everything of this session."""

    TAG = 14


@dataclass(frozen=True, slots=True)
class SessionClosed(Message):
    """Hop to client: everything is freed. A stream that stops without this broke."""

    TAG = 15


MESSAGE_TYPES: tuple[type[Message], ...] = (
    Hello,
    HelloReply,
    OpenSession,
    SessionOpened,
    SetRoute,
    RouteReady,
    Attach,
    Attached,
    Step,
    StepResult,
    Error,
    Ping,
    Pong,
    CloseSession,
    SessionClosed,
)

RETIRED_TAGS: frozenset[int] = frozenset()
