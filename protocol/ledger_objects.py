"""What peers, operators and validators sign about work: the objects of the contribution ledger.

=============  ===========================  =======================================================
object         signed by                    says
=============  ===========================  =======================================================
Allowance      issuer: the operator, or     the holder of ``voucher_key`` may spend so much until
               the voucher key itself       then (self-issued: statistics only, class ``local``)
Voucher        the voucher key              what this node did for this session so far
Receipt        the node                     the same, and the hash chain over what it handled
Settlement     the node                     which vouchers it presents, and where its feed stands
Checkpoint     the log's key, witnesses     how long the public log is, and its root
Verdict        validators                   what an audit of a segment found
Revocation     the swarm's or org's root    a key is worth nothing any more
Rotation       the old and the new key      a new key continues an old one
=============  ===========================  =======================================================

Counts in vouchers and receipts are cumulative over the session, so only the last one matters and a
lost one does no harm. Peers are named by peer id, other keys by 64 hexadecimal digits.

How they are signed: ``envelope``. What they are worth: ``prices``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.protocol import envelope, strict_json
from swarm.protocol.envelope import Envelope
from swarm.protocol.errors import DecodeError, ErrorCode
from swarm.protocol.messages import MAX_BLOCKS
from swarm.protocol.strict_json import (
    choice,
    hexadecimal,
    hexadecimal_or_absent,
    text,
    unsigned,
)

SERIAL_BYTES = 16
SESSION_BYTES = 16
HASH_BYTES = 32
KEY_BYTES = 32
MAX_CLOCK_SKEW_S = 300
"""Times in signed objects may be off by this much; order never depends on them."""
MAX_ALLOWANCE_S = 24 * 3600

FUNDED, MEMBER, ANONYMOUS, AUDIT, LOCAL = "funded", "member", "anonymous", "audit", "local"
ALLOWANCE_CLASSES = (FUNDED, MEMBER, ANONYMOUS, AUDIT, LOCAL)
"""In the order of their priority, but for ``audit``, which counts as what it pretends to be."""

DTYPE_CLASSES = ("float32", "float16", "bfloat16", "int8", "int4", "w8a8")

PAYLOAD_TYPE = "application/vnd.sovereign-swarm.{}.v1+json"


class SignedObject:
    """Base of all; ``NAME`` is part of the payload type, and so of what is signed."""

    NAME: ClassVar[str]


O = TypeVar("O", bound=SignedObject)  # noqa: E741


@dataclass(frozen=True, slots=True)
class Allowance(SignedObject):
    """Permission to spend ``maximum_units``, at most ``per_node_units`` of them at one node."""

    NAME = "allowance"
    serial: str = hexadecimal(SERIAL_BYTES)
    voucher_key: str = hexadecimal(KEY_BYTES)
    """Fresh for each allowance, so that nodes cannot link a user's sessions."""
    maximum_units: int = unsigned()
    per_node_units: int = unsigned()
    not_before_unix_s: int = unsigned()
    expires_unix_s: int = unsigned()
    allowance_class: str = choice(*ALLOWANCE_CLASSES)
    price_epoch: int = unsigned(1 << 31)
    route_seed: str = hexadecimal(0, HASH_BYTES)
    """From which the eligible nodes follow, for subsidised classes; else empty."""


@dataclass(frozen=True, slots=True)
class Work:
    """Cumulative counts of one session on one node."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    backward_tokens: int = 0
    moved_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.prefill_tokens + other.prefill_tokens,
            self.decode_tokens + other.decode_tokens,
            self.backward_tokens + other.backward_tokens,
            self.moved_bytes + other.moved_bytes,
        )

    def __sub__(self, other: Work) -> Work:
        """What this has beyond ``other``, which it covers."""
        return Work(
            self.prefill_tokens - other.prefill_tokens,
            self.decode_tokens - other.decode_tokens,
            self.backward_tokens - other.backward_tokens,
            self.moved_bytes - other.moved_bytes,
        )

    def covers(self, other: Work) -> bool:
        """Whether no count is lower than in ``other``."""
        return (
            self.prefill_tokens >= other.prefill_tokens
            and self.decode_tokens >= other.decode_tokens
            and self.backward_tokens >= other.backward_tokens
            and self.moved_bytes >= other.moved_bytes
        )


@dataclass(frozen=True, slots=True)
class Voucher(SignedObject):
    """The client's word for what ``node`` did in ``session`` so far, for blocks first to end."""

    NAME = "voucher"
    serial: str = hexadecimal(SERIAL_BYTES)
    node: str = text(64)
    session: str = hexadecimal(SESSION_BYTES)
    sequence: int = unsigned()
    model: str = hexadecimal(HASH_BYTES)
    first_block: int = unsigned(MAX_BLOCKS)
    end_block: int = unsigned(MAX_BLOCKS)
    adapter: str = hexadecimal(0, HASH_BYTES)
    prefill_tokens: int = unsigned()
    decode_tokens: int = unsigned()
    backward_tokens: int = unsigned()
    moved_bytes: int = unsigned()
    transcript: str = hexadecimal(0, HASH_BYTES)
    """Head of the latest receipt that the client has of this session; empty before the first."""
    unix_s: int = unsigned()
    policy: str = hexadecimal_or_absent(HASH_BYTES)
    """SHA-256 of the policy that the session was opened under; empty for none."""

    @property
    def work(self) -> Work:
        return Work(self.prefill_tokens, self.decode_tokens, self.backward_tokens, self.moved_bytes)


@dataclass(frozen=True, slots=True)
class Receipt(SignedObject):
    """The node's word for the same, with ``transcript`` over all inputs and outputs so far."""

    NAME = "receipt"
    serial: str = hexadecimal(SERIAL_BYTES)
    node: str = text(64)
    session: str = hexadecimal(SESSION_BYTES)
    sequence: int = unsigned()
    model: str = hexadecimal(HASH_BYTES)
    first_block: int = unsigned(MAX_BLOCKS)
    end_block: int = unsigned(MAX_BLOCKS)
    adapter: str = hexadecimal(0, HASH_BYTES)
    prefill_tokens: int = unsigned()
    decode_tokens: int = unsigned()
    backward_tokens: int = unsigned()
    moved_bytes: int = unsigned()
    steps: int = unsigned()
    """How many links the transcript's chain has."""
    transcript: str = hexadecimal(HASH_BYTES)
    dtype_class: str = choice(*DTYPE_CLASSES)
    unix_s: int = unsigned()
    policy: str = hexadecimal_or_absent(HASH_BYTES)
    """As in the voucher: the node kept it, or would have refused the session."""

    @property
    def work(self) -> Work:
        return Work(self.prefill_tokens, self.decode_tokens, self.backward_tokens, self.moved_bytes)


@dataclass(frozen=True, slots=True)
class Settlement(SignedObject):
    """The vouchers of a window that a node presents; they travel beside it.

    ``vouchers_root`` is the Merkle root (``protocol.merkle``) over the vouchers' payloads.
    """

    NAME = "settlement"
    node: str = text(64)
    window_start_unix_s: int = unsigned()
    window_end_unix_s: int = unsigned()
    vouchers: int = unsigned(1 << 20)
    vouchers_root: str = hexadecimal(HASH_BYTES)
    feed_length: int = unsigned()
    feed_head: str = hexadecimal(HASH_BYTES)


@dataclass(frozen=True, slots=True)
class Checkpoint(SignedObject):
    """State of an append-only log: ``size`` leaves with this root."""

    NAME = "checkpoint"
    origin: str = text(128)
    size: int = unsigned()
    root: str = hexadecimal(HASH_BYTES)
    unix_s: int = unsigned()


@dataclass(frozen=True, slots=True)
class Verdict(SignedObject):
    """What a replay of one segment found. Errors are relative, in millionths."""

    NAME = "verdict"
    segment: str = hexadecimal(HASH_BYTES)
    """SHA-256 of the receipt's payload that binds it."""
    node: str = text(64)
    session: str = hexadecimal(SESSION_BYTES)
    model: str = hexadecimal(HASH_BYTES)
    first_block: int = unsigned(MAX_BLOCKS)
    end_block: int = unsigned(MAX_BLOCKS)
    first_position: int = unsigned()
    end_position: int = unsigned()
    median_millionths: int = unsigned()
    p95_millionths: int = unsigned()
    median_limit_millionths: int = unsigned()
    p95_limit_millionths: int = unsigned()
    input_hash: str = hexadecimal(HASH_BYTES)
    output_hash: str = hexadecimal(HASH_BYTES)
    reference_hash: str = hexadecimal(HASH_BYTES)
    dtype_class: str = choice(*DTYPE_CLASSES)
    outcome: str = choice("passed", "failed", "not_reproduced")
    unix_s: int = unsigned()


@dataclass(frozen=True, slots=True)
class Revocation(SignedObject):
    """``key`` (a public key) is worth nothing for what the log has from ``effective_size`` on."""

    NAME = "revocation"
    key: str = hexadecimal(KEY_BYTES)
    reason: str = choice("compromised", "superseded", "retired", "misbehaved")
    effective_size: int = unsigned()
    unix_s: int = unsigned()


@dataclass(frozen=True, slots=True)
class Rotation(SignedObject):
    """``new_key`` continues ``old_key`` from ``effective_size`` of the log on; both sign."""

    NAME = "rotation"
    old_key: str = hexadecimal(KEY_BYTES)
    new_key: str = hexadecimal(KEY_BYTES)
    effective_size: int = unsigned()
    unix_s: int = unsigned()


OBJECT_TYPES: tuple[type[SignedObject], ...] = (
    Allowance,
    Voucher,
    Receipt,
    Settlement,
    Checkpoint,
    Verdict,
    Revocation,
    Rotation,
)


def payload_type(kind: type[SignedObject]) -> str:
    """The DSSE payload type of a kind of object."""
    return PAYLOAD_TYPE.format(kind.NAME)


def sign(value: SignedObject, *keys: Ed25519PrivateKey) -> Envelope:
    """Sign an object by one or several keys. Raises UsageError for a field out of bounds."""
    return envelope.seal(payload_type(type(value)), strict_json.dump(value), keys)


def parse(kind: type[O], sealed: Envelope) -> O:
    """The object in an envelope. Raises DecodeError(BAD_FIELD); signatures are NOT checked."""
    if sealed.payload_type != payload_type(kind):
        raise DecodeError(ErrorCode.BAD_FIELD, f"{sealed.payload_type[:64]} is no {kind.NAME}")
    return strict_json.parse(kind, sealed.payload)


def verified(kind: type[O], sealed: Envelope, *public_keys: bytes) -> O:
    """The object in an envelope that each of these keys has signed. Raises ProtocolError."""
    sealed.require_signatures(*public_keys)
    return parse(kind, sealed)
