"""Bounds of all fields, and how a message declares them."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar

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
DIGEST_BYTES = 32
"""SHA-256."""
SWARM_ID_BYTES = 32
MAX_PASSPORT_BYTES = 768
"""A chain of two certificates."""
MAX_POLICY_BYTES = 2048
MAX_CHUNKS = 1 << 20
"""In all parts of one manifest."""
MAX_OBJECT_BYTES = 4096
"""Payload of a signed object of the ledger."""
PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
LINK_BYTES = 3 * 8 + 2 * DIGEST_BYTES
"""One link of a transcript: step, position, tokens, hash of the input, hash of the output."""


# --- field specifications ------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Uint:
    """Unsigned integer in ``0 .. maximum``; booleans are refused."""

    maximum: int


@dataclass(frozen=True, slots=True)
class Real:
    """Double-precision number in ``minimum .. maximum``; integers and NaN are refused."""

    minimum: float
    maximum: float


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


@dataclass(frozen=True, slots=True)
class BlobField:
    """The message's one byte string that is too long for a header: 1 to ``maximum_bytes`` bytes.

    The header has its size, the payload its bytes.
    """

    maximum_bytes: int


Spec = Uint | Real | Bytes | Text | Array | TensorField | BlobField


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
