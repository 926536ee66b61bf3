"""The client's side of the books: allowances, vouchers for what hops did, their receipts.

Each chain has an allowance with a key of its own, so that nodes cannot link a user's sessions. When
no operator granted one it is self-issued: it costs nothing and counts for statistics only, unless
the user signs it with the key of a node of their own.

A voucher covers what was issued to a hop before the step that it goes with, so that a hop does at
most two windows of work on trust, and the client pays for at most what is in flight.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.ledger.channel import Equivocation, Signed
from swarm.ledger.exposure import uncovered, voucher_is_due
from swarm.ports import Clock
from swarm.protocol import ledger_objects, strict_json
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.identity import PeerId, public_key_from_peer_id
from swarm.protocol.ledger_objects import (
    LOCAL,
    MAX_ALLOWANCE_S,
    SERIAL_BYTES,
    Allowance,
    Receipt,
    Voucher,
    Work,
)
from swarm.protocol.messages import OpenSession, SessionOpened, SignedReceipt, SignedVoucher
from swarm.protocol.policy import policy_digest
from swarm.protocol.prices import CURRENT_EPOCH
from swarm.protocol.strict_json import MAX_INTEGER

LONGEST_UNSIGNED_S = 2.0
MOST_UNANSWERED = 64
"""Vouchers without a receipt that are remembered; of a node that never answers no more."""


@dataclass(frozen=True, slots=True)
class Grant:
    """An allowance and the key that signs its vouchers."""

    allowance: Allowance
    signed: Signed
    key: Ed25519PrivateKey = field(repr=False)


def issue_for_ourselves(now_unix_s: float, owner: Ed25519PrivateKey | None = None) -> Grant:
    """A self-issued allowance; ``owner`` lets nodes know whose it is."""
    key = Ed25519PrivateKey.generate()
    allowance = Allowance(
        serial=secrets.token_hex(SERIAL_BYTES),
        voucher_key=key.public_key().public_bytes_raw().hex(),
        maximum_units=MAX_INTEGER,
        per_node_units=MAX_INTEGER,
        not_before_unix_s=int(now_unix_s),
        expires_unix_s=int(now_unix_s) + MAX_ALLOWANCE_S,
        allowance_class=LOCAL,
        price_epoch=CURRENT_EPOCH,
        route_seed="",
    )
    return Grant(allowance, Signed.of(ledger_objects.sign(allowance, owner or key)), key)


class HopAccount:
    """What one hop did in a session, as the client knows it."""

    def __init__(
        self, grant: Grant, peer: PeerId, request: OpenSession, opened: SessionOpened, clock: Clock
    ) -> None:
        self.grant = grant
        self.peer = peer
        self.mflop_per_block_token = opened.mflop_per_block_token
        self.dtype_class = opened.dtype_class
        self.issued = Work()
        self.voucher: Voucher | None = None
        """The latest that was signed."""
        self.voucher_signed: Signed | None = None
        self.receipt: Receipt | None = None
        """The latest that came."""
        self.receipt_signed: Signed | None = None
        self._session = opened.session_id.hex()
        self._opened = opened
        self._request = request
        self._clock = clock
        self._signed_s = clock.monotonic_s()
        self._unanswered: dict[int, Voucher] = {}

    def renewed(self, grant: Grant) -> HopAccount:
        """Of the same session at the same hop, for what this has not vouched for and what comes."""
        fresh = HopAccount(grant, self.peer, self._request, self._opened, self._clock)
        fresh.issued = self.issued - self.covered
        return fresh

    @property
    def has_ended(self) -> bool:
        """Whether vouchers of this allowance would be refused."""
        return self._clock.unix_s() >= self.grant.allowance.expires_unix_s

    @property
    def blocks(self) -> int:
        return self._request.end_block - self._request.first_block

    @property
    def policy(self) -> bytes:
        """Under which the session was opened, as it travelled; empty for none."""
        return self._request.policy

    @property
    def has_latest_receipt(self) -> bool:
        """Whether the latest voucher was answered."""
        if self.voucher is None:
            return True
        return self.receipt is not None and self.receipt.sequence == self.voucher.sequence

    @property
    def covered(self) -> Work:
        return self.voucher.work if self.voucher is not None else Work()

    def before_step(self, work: Work) -> SignedVoucher | None:
        """A step of ``work`` is about to be sent: the voucher that goes with it, if one is due."""
        late = (
            self._clock.monotonic_s() - self._signed_s > LONGEST_UNSIGNED_S
            and uncovered(self.issued, self.covered) > 0
        )
        due = late or voucher_is_due(self.issued, self.covered, work)
        voucher = self.sign_all() if due else None
        self.issued += work
        return voucher

    def sign_all(self, *, again: bool = False) -> SignedVoucher | None:
        """A voucher for all that was issued so far; None when there is one already.

        ``again``: for the same once more, so that the receipt shows what was done since.
        """
        if self.issued == self.covered and not again:
            return None
        request, issued = self._request, self.issued
        voucher = Voucher(
            serial=self.grant.allowance.serial,
            node=self.peer,
            session=self._session,
            sequence=self.voucher.sequence + 1 if self.voucher is not None else 1,
            model=request.model_revision.hex(),
            first_block=request.first_block,
            end_block=request.end_block,
            adapter=request.adapter_id.hex(),
            prefill_tokens=issued.prefill_tokens,
            decode_tokens=issued.decode_tokens,
            backward_tokens=issued.backward_tokens,
            moved_bytes=issued.moved_bytes,
            transcript=self.receipt.transcript if self.receipt is not None else "",
            unix_s=int(self._clock.unix_s()),
            policy=policy_digest(self.policy).hex(),
        )
        signed = Signed.of(ledger_objects.sign(voucher, self.grant.key))
        self.voucher, self.voucher_signed = voucher, signed
        self._signed_s = self._clock.monotonic_s()
        self._unanswered[voucher.sequence] = voucher
        if len(self._unanswered) > MOST_UNANSWERED:
            del self._unanswered[min(self._unanswered)]
        return SignedVoucher(payload=signed.payload, signature=signed.signature)

    def is_receipt_for(self, message: SignedReceipt) -> bool:
        """Whether a receipt says that it is for this account. Raises DecodeError."""
        return strict_json.parse(Receipt, message.payload).serial == self.grant.allowance.serial

    def take(self, message: SignedReceipt) -> None:
        """Check a hop's receipt. Raises ProtocolError, or Equivocation with the evidence."""
        if self.receipt_signed is not None and message.payload == self.receipt_signed.payload:
            return
        signed = Signed(message.payload, message.signature, public_key_from_peer_id(self.peer))
        receipt = strict_json.parse(Receipt, message.payload)
        signed.verify(Receipt)
        if self.receipt is not None and self.receipt_signed is not None:
            same_session = receipt.session == self.receipt.session
            if same_session and receipt.sequence == self.receipt.sequence:
                raise Equivocation(self.receipt_signed, signed)
            if receipt.sequence < self.receipt.sequence or receipt.steps < self.receipt.steps:
                raise ProtocolError(ErrorCode.ROLLED_BACK, "an older receipt")
        voucher = self._unanswered.get(receipt.sequence)
        if voucher is None or not _answers(receipt, voucher):
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "a receipt for no voucher of ours")
        for sequence in [number for number in self._unanswered if number <= receipt.sequence]:
            del self._unanswered[sequence]
        self.receipt, self.receipt_signed = receipt, signed


def _answers(receipt: Receipt, voucher: Voucher) -> bool:
    shared = (
        "serial",
        "node",
        "session",
        "model",
        "first_block",
        "end_block",
        "adapter",
        "work",
        "policy",
    )
    return all(getattr(receipt, name) == getattr(voucher, name) for name in shared)
