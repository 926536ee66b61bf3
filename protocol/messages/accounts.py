"""Membership of a swarm, and accounts of work."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.protocol.messages.fields import (
    DIGEST_BYTES,
    LINK_BYTES,
    MAX_OBJECT_BYTES,
    MAX_PASSPORT_BYTES,
    MAX_TOKENS,
    PUBLIC_KEY_BYTES,
    SESSION_ID_BYTES,
    SIGNATURE_BYTES,
    Array,
    Bytes,
    Message,
    Uint,
    wire,
)


# --- membership ----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class RedeemInvitation(Message):
    """To a desk: an invitation that it signed, for a passport for the peer that sends this."""

    TAG = 80
    invitation: bytes = wire(1, Bytes(1, 1024))


@dataclass(frozen=True, slots=True)
class PassportIssued(Message):
    """From a desk: the passport, and the charter as it is now."""

    TAG = 81
    passport: bytes = wire(1, Bytes(1, MAX_PASSPORT_BYTES))
    charter: bytes = wire(2, Bytes(1, 1536))


# --- accounts of work ----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class SignedVoucher(Message):
    """Client to hop, on the control stream: what you did so far (``ledger_objects.Voucher``)."""

    TAG = 70
    payload: bytes = wire(1, Bytes(1, MAX_OBJECT_BYTES))
    signature: bytes = wire(2, Bytes(SIGNATURE_BYTES, SIGNATURE_BYTES))


@dataclass(frozen=True, slots=True)
class SignedReceipt(Message):
    """Hop to client: the voucher is on our disk (``ledger_objects.Receipt``)."""

    TAG = 71
    payload: bytes = wire(1, Bytes(1, MAX_OBJECT_BYTES))
    signature: bytes = wire(2, Bytes(SIGNATURE_BYTES, SIGNATURE_BYTES))


@dataclass(frozen=True, slots=True)
class RenewAllowance(Message):
    """Client to hop, on the control stream: later vouchers of this session draw on this allowance.

    They count from zero, and cover what comes after what the former ones covered.
    """

    TAG = 75
    allowance: bytes = wire(1, Bytes(1, MAX_OBJECT_BYTES))
    allowance_signature: bytes = wire(2, Bytes(SIGNATURE_BYTES, SIGNATURE_BYTES))
    allowance_issuer: bytes = wire(3, Bytes(PUBLIC_KEY_BYTES, PUBLIC_KEY_BYTES))


@dataclass(frozen=True, slots=True)
class ReadTranscript(Message):
    """First message of a stream, by a session's client: show what you handled and sent on.

    Answered by TranscriptPart ..., JournalChunk ..., TranscriptEnd.
    """

    TAG = 72
    session_id: bytes = wire(1, Bytes(SESSION_ID_BYTES, SESSION_ID_BYTES))
    end_position: int = wire(2, Uint(MAX_TOKENS), 0)
    """Positions of the journal that are wanted; 0: none."""


@dataclass(frozen=True, slots=True)
class TranscriptPart(Message):
    """Links of the hash chain, oldest first; each as ``docs/protocol.md`` has it."""

    TAG = 73
    links: tuple[bytes, ...] = wire(1, Array(Bytes(LINK_BYTES, LINK_BYTES), 256))


@dataclass(frozen=True, slots=True)
class TranscriptEnd(Message):
    """Everything was sent. ``start`` is the chain's head before the first link."""

    TAG = 74
    start: bytes = wire(1, Bytes(DIGEST_BYTES, DIGEST_BYTES))
    journal_gone: int = wire(2, Uint(1), 0)
    """1: what was sent on is no longer kept."""
