"""What makes an allowance or a voucher acceptable. Pure: time comes as an argument.

A *channel* is one allowance at one node in one session. Rules:

1. An allowance is checked once: signed by an issuer that the verifier trusts for its class, and
   valid now. Whoever has a key may issue class ``local``, which counts for statistics only.
2. A voucher is signed by the allowance's voucher key and names this node, session, model and span,
   and the policy that the session was opened under.
3. Its number and each of its counts never go down; its price stays within the allowance's share
   per node. An exact repetition changes nothing.
4. Two vouchers with one number are an equivocation. Both are kept: they convince anybody. The
   higher one counts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from swarm.protocol import envelope, ledger_objects, strict_json
from swarm.protocol.envelope import Envelope, Signature
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.ledger_objects import (
    LOCAL,
    MAX_ALLOWANCE_S,
    MAX_CLOCK_SKEW_S,
    Allowance,
    Voucher,
    Work,
)
from swarm.protocol.prices import price_table


@dataclass(frozen=True, slots=True)
class Signed:
    """Payload, signature and signer of an object, as they travel on streams."""

    payload: bytes
    signature: bytes
    public_key: bytes

    def envelope(self, kind: type[ledger_objects.SignedObject]) -> Envelope:
        """For files and evidence."""
        signatures = (Signature(self.public_key, self.signature),)
        return Envelope(ledger_objects.payload_type(kind), self.payload, signatures)

    def verify(self, kind: type[ledger_objects.SignedObject]) -> None:
        """Raises ProtocolError: BAD_FIELD for a key that must not be used, BAD_SIGNATURE."""
        signed = envelope.pae(ledger_objects.payload_type(kind), self.payload)
        envelope.verify_bytes(self.public_key, signed, self.signature)

    @classmethod
    def of(cls, sealed: Envelope) -> Signed:
        """Of an envelope with one signature."""
        (only,) = sealed.signatures
        return cls(sealed.payload, only.signature, only.public_key)


class Equivocation(ProtocolError):
    """Two vouchers (or receipts) with the same number; both are evidence."""

    def __init__(self, first: Signed, second: Signed) -> None:
        self.first = first
        self.second = second
        super().__init__(ErrorCode.EQUIVOCATION)


def check_allowance(
    signed: Signed, *, operators: Collection[bytes], now_unix_s: float
) -> Allowance:
    """Rule 1. ``operators`` are the public keys that may issue spendable classes.

    Raises ProtocolError: BAD_FIELD, BAD_SIGNATURE, FOREIGN_OBJECT, NOT_VALID_NOW, OVER_LIMIT.
    """
    allowance = strict_json.parse(Allowance, signed.payload)
    if allowance.allowance_class != LOCAL and signed.public_key not in operators:
        raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "issued by nobody we know")
    signed.verify(Allowance)
    _check_validity(allowance, now_unix_s)
    if allowance.per_node_units > allowance.maximum_units:
        raise ProtocolError(ErrorCode.OVER_LIMIT, "more for one node than for all")
    price_table(allowance.price_epoch)
    return allowance


def _check_validity(allowance: Allowance, now_unix_s: float) -> None:
    begin, end = allowance.not_before_unix_s, allowance.expires_unix_s
    if not begin < end <= begin + MAX_ALLOWANCE_S:
        raise ProtocolError(ErrorCode.NOT_VALID_NOW, "valid for no time, or for too long")
    if not begin - MAX_CLOCK_SKEW_S <= now_unix_s < end + MAX_CLOCK_SKEW_S:
        raise ProtocolError(ErrorCode.NOT_VALID_NOW)


@dataclass(frozen=True, slots=True)
class ChannelTerms:
    """What every voucher of a channel repeats."""

    node: str
    session: str
    model: str
    first_block: int
    end_block: int
    adapter: str
    mflop_per_block_token: int
    policy: str = ""
    """Digest of the session's policy in hexadecimal; empty for none."""


class VoucherChannel:
    """The vouchers of one allowance at one node in one session."""

    def __init__(self, allowance: Allowance, terms: ChannelTerms) -> None:
        self.allowance = allowance
        self.terms = terms
        self.best: Voucher | None = None
        self.best_signed: Signed | None = None
        self._key = bytes.fromhex(allowance.voucher_key)
        self._prices = price_table(allowance.price_epoch)

    @property
    def covered(self) -> Work:
        """What the best voucher vouches for."""
        return self.best.work if self.best is not None else Work()

    @property
    def units(self) -> int:
        """The price of it."""
        return self.price(self.covered)

    def price(self, work: Work) -> int:
        """Raises ProtocolError(OVER_LIMIT) for what cannot be counted."""
        return self._prices.units(
            work,
            blocks=self.terms.end_block - self.terms.first_block,
            mflop_per_block_token=self.terms.mflop_per_block_token,
        )

    def accept(self, payload: bytes, signature: bytes, now_unix_s: float) -> Voucher | None:
        """Take a voucher; None for an exact repetition of the best one.

        Raises Equivocation (after taking the higher one), or ProtocolError with BAD_FIELD,
        BAD_SIGNATURE, FOREIGN_OBJECT, NOT_VALID_NOW, ROLLED_BACK or OVER_LIMIT; nothing changed
        then.
        """
        if self.best_signed is not None and payload == self.best_signed.payload:
            return None
        signed = Signed(payload, signature, self._key)
        voucher = strict_json.parse(Voucher, payload)
        signed.verify(Voucher)
        self._check_terms(voucher)
        _check_validity(self.allowance, now_unix_s)
        if abs(voucher.unix_s - now_unix_s) > MAX_CLOCK_SKEW_S:
            raise ProtocolError(ErrorCode.NOT_VALID_NOW, "made at another time")
        if self.price(voucher.work) > self.allowance.per_node_units:
            raise ProtocolError(ErrorCode.OVER_LIMIT)
        best, best_signed = self.best, self.best_signed
        if best is not None and best_signed is not None:
            if voucher.sequence == best.sequence:
                if self.price(voucher.work) > self.price(best.work):
                    self.best, self.best_signed = voucher, signed
                raise Equivocation(best_signed, signed)
            if voucher.sequence < best.sequence or not voucher.work.covers(best.work):
                raise ProtocolError(ErrorCode.ROLLED_BACK)
        self.best, self.best_signed = voucher, signed
        return voucher

    def _check_terms(self, voucher: Voucher) -> None:
        terms = self.terms
        if (
            voucher.serial != self.allowance.serial
            or voucher.node != terms.node
            or voucher.session != terms.session
            or voucher.model != terms.model
            or (voucher.first_block, voucher.end_block) != (terms.first_block, terms.end_block)
            or voucher.adapter != terms.adapter
            or voucher.policy != terms.policy
        ):
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT)
