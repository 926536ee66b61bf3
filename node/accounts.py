"""What a node knows of who pays, in what order it serves them, and the account of each session.

Whoever presents an allowance sends vouchers as the work goes on; the node answers with receipts,
and stops at two windows of work that no voucher covers. A voucher is on the disk before its receipt
is sent. Priority is by class, never by balance; within a class payers take turns. Without an
operator allowances are self-issued: they count for statistics, and for tit-for-tat, since an owner
may sign them with the key of their own node.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from swarm.ledger.channel import (
    ChannelTerms,
    Equivocation,
    Signed,
    VoucherChannel,
    check_allowance,
)
from swarm.ledger.exposure import may_go_on
from swarm.ledger.node_books import LedgerStore
from swarm.ledger.rules import is_eligible
from swarm.ledger.token_bucket import TokenBuckets
from swarm.ledger.transcript import Transcript
from swarm.ports import Clock
from swarm.protocol import ledger_objects
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.ledger_objects import (
    ANONYMOUS,
    AUDIT,
    FUNDED,
    LOCAL,
    MEMBER,
    Allowance,
    Receipt,
    Voucher,
    Work,
)
from swarm.protocol.messages import (
    OpenSession,
    RenewAllowance,
    SignedReceipt,
    SignedVoucher,
)
from swarm.protocol.policy import policy_digest

log = logging.getLogger(__name__)

MOST_RENEWALS = 1024
"""Of one session; each is a line in the books."""
OWNER_PRIORITY, FUNDED_PRIORITY, MEMBER_PRIORITY, LOWEST_PRIORITY = range(4)
_CLASS_PRIORITY = {
    FUNDED: FUNDED_PRIORITY,
    AUDIT: FUNDED_PRIORITY,  # operators show challenges as funded; this is the same
    MEMBER: MEMBER_PRIORITY,
    ANONYMOUS: LOWEST_PRIORITY,
    LOCAL: LOWEST_PRIORITY,
}


@dataclass(frozen=True, slots=True)
class Standing:
    """Who pays for a session, and before whom it is served."""

    payer: str
    """A pseudonym by which payers take turns."""
    priority: int
    """0 first."""
    allowance: Allowance | None = None
    signed: Signed | None = None


@dataclass(frozen=True, slots=True)
class LedgerTerms:
    """What a node's books are about."""

    model_revision: bytes
    mflop_per_block_token: int
    dtype_class: str
    operators: Collection[bytes] = ()
    """Public keys that may issue allowances that can be spent."""
    owner_keys: Collection[bytes] = ()
    """Who signs with one of these is our owner and is served first."""
    anonymous_tokens_per_s: int = 0
    """For each peer without a paid allowance; 0: no limit."""
    anonymous_burst_tokens: int = 16384


class NodeLedger:
    """The books of one node: admits sessions and opens their accounts."""

    def __init__(
        self,
        identity: Identity,
        store: LedgerStore,
        terms: LedgerTerms,
        clock: Clock,
        *,
        owed_to: Callable[[], Mapping[str, int]] | None = None,
    ) -> None:
        """``owed_to``: units by which each payer did more for our owner than we did for them."""
        self.terms = terms
        self._identity = identity
        self._store = store
        self._clock = clock
        self._owed_to = owed_to
        self._anonymous = TokenBuckets(terms.anonymous_tokens_per_s, terms.anonymous_burst_tokens)

    @property
    def store(self) -> LedgerStore:
        return self._store

    def admit(self, request: OpenSession, peer: PeerId) -> Standing:
        """Check the allowance of a new session. Raises ProtocolError, also for want of tokens."""
        standing = self._standing(request, peer)
        if standing.priority == LOWEST_PRIORITY and self.terms.anonymous_tokens_per_s:
            tokens = request.rows * request.maximum_tokens
            if not self._anonymous.take(peer, tokens, self._clock.monotonic_s()):
                raise ProtocolError(ErrorCode.NO_CAPACITY, "more than anonymous users get")
        return standing

    def renewed(self, request: RenewAllowance, peer: PeerId, before: Standing) -> Standing:
        """Check another allowance of a session. Raises ProtocolError.

        OVER_LIMIT for one that is served after others than the first was: the session was let in
        before those.
        """
        standing = self._standing(request, peer)
        if standing.priority > before.priority:
            raise ProtocolError(ErrorCode.OVER_LIMIT, "an allowance of a lower class")
        return standing

    def _standing(self, request: OpenSession | RenewAllowance, peer: PeerId) -> Standing:
        if not request.allowance:
            return Standing(payer=peer, priority=LOWEST_PRIORITY)
        signed = Signed(request.allowance, request.allowance_signature, request.allowance_issuer)
        allowance = check_allowance(
            signed, operators=self.terms.operators, now_unix_s=self._clock.unix_s()
        )
        issuer = signed.public_key
        if issuer in self.terms.owner_keys:
            return Standing("owner", OWNER_PRIORITY, allowance, signed)
        priority = _CLASS_PRIORITY[allowance.allowance_class]
        if allowance.route_seed and not is_eligible(
            bytes.fromhex(allowance.route_seed), self._identity.peer_id
        ):
            # It cannot pay us: whoever sends it here gets no turn before others for it.
            priority = LOWEST_PRIORITY
        if allowance.allowance_class != LOCAL:
            return Standing(allowance.serial, priority, allowance, signed)
        # Self-issued: a key that is made for each session has no history, one that stays has.
        payer = peer if issuer.hex() == allowance.voucher_key else issuer.hex()
        if self._owed_to is not None and self._owed_to().get(payer, 0) > 0:
            priority = MEMBER_PRIORITY
        return Standing(payer, priority, allowance, signed)

    def account(
        self, standing: Standing, request: OpenSession, session_id: bytes
    ) -> SessionAccount:
        """The account of a session that was opened."""
        return SessionAccount(
            identity=self._identity,
            store=self._store,
            clock=self._clock,
            standing=standing,
            terms=self.terms,
            request=request,
            session_id=session_id,
        )


@dataclass(frozen=True, slots=True)
class PendingReceipt:
    """A voucher that counts, and the receipt that waits until it is on the disk."""

    standing: Standing
    voucher: Signed
    receipt: Signed
    units: int


class SessionAccount:
    """Work done and vouched for in one session, and what was handled in it."""

    def __init__(
        self,
        *,
        identity: Identity,
        store: LedgerStore,
        clock: Clock,
        standing: Standing,
        terms: LedgerTerms,
        request: OpenSession,
        session_id: bytes,
    ) -> None:
        self._identity = identity
        self._store = store
        self._clock = clock
        self.standing = standing
        """Who pays now."""
        self._terms = terms
        self._session = session_id.hex()
        self._policy = request.policy
        self.transcript = Transcript(session_id, request.policy)
        self.done = Work()
        self._channel_terms = ChannelTerms(
            node=identity.peer_id,
            session=self._session,
            model=request.model_revision.hex(),
            first_block=request.first_block,
            end_block=request.end_block,
            adapter=request.adapter_id.hex(),
            mflop_per_block_token=terms.mflop_per_block_token,
            policy=policy_digest(request.policy).hex(),
        )
        self._channel: VoucherChannel | None = None
        self._covered_before = Work()
        """By the allowances before this one."""
        self._renewals = 0
        self._begun = ""
        """Serial of the allowance that was noted last."""
        self._answered: PendingReceipt | None = None
        if standing.allowance is not None:
            self._channel = VoucherChannel(standing.allowance, self._channel_terms)

    @property
    def wants_vouchers(self) -> bool:
        return self._channel is not None

    def may_do(self, work: Work) -> bool:
        """Whether the vouchers so far allow one more step."""
        return self._channel is None or may_go_on(self.done, self._covered, work)

    @property
    def _covered(self) -> Work:
        covered = self._covered_before
        return covered if self._channel is None else covered + self._channel.covered

    def renew(self, standing: Standing) -> PendingReceipt | None:
        """Let vouchers draw on another allowance from now on. Raises ProtocolError, and then
        nothing changed.

        Returns the last voucher of the one before, to :meth:`end` with; None if there was none.
        """
        before, channel = self.standing.allowance, self._channel
        if before is None or channel is None or standing.allowance is None:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "no allowance to be renewed")
        if standing.allowance.serial == before.serial:
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "the same allowance")
        if self._renewals >= MOST_RENEWALS:
            raise ProtocolError(ErrorCode.OVER_LIMIT, "too many allowances in one session")
        self._renewals += 1
        last, self._answered = self._answered, None
        self._covered_before = self._covered
        self._channel = VoucherChannel(standing.allowance, self._channel_terms)
        self.standing = standing
        return last

    def add(self, work: Work) -> None:
        """Work that was accepted."""
        self.done += work

    def accept(self, message: SignedVoucher) -> PendingReceipt:
        """Check a voucher, which counts from now on; :meth:`keep` what this returns.

        Raises ProtocolError; for an Equivocation :meth:`keep_evidence`.
        """
        channel = self._channel
        if channel is None:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "no allowance was presented")
        channel.accept(message.payload, message.signature, self._clock.unix_s())
        best, signed = channel.best, channel.best_signed
        if best is None or signed is None:
            raise RuntimeError("a voucher was accepted and is not there")
        # A voucher that comes again gets the same receipt: two would contradict each other.
        if self._answered is None or self._answered.voucher.payload != signed.payload:
            self._answered = PendingReceipt(
                self.standing, signed, self._receipt(best), channel.units
            )
        return self._answered

    async def keep(self, pending: PendingReceipt) -> SignedReceipt:
        """Write a voucher to the disk; only then may its receipt be sent."""
        standing = pending.standing
        allowance, signed = standing.allowance, standing.signed
        if allowance is None or signed is None:
            raise RuntimeError("a receipt without an allowance")
        if self._begun != allowance.serial:
            self._begun = allowance.serial
            await self._store.begin(signed, allowance.serial, standing.payer, self._policy)
        await self._store.keep(pending.voucher, pending.receipt, pending.units)
        return SignedReceipt(payload=pending.receipt.payload, signature=pending.receipt.signature)

    async def keep_evidence(self, error: Equivocation) -> None:
        """Keep two vouchers that contradict each other."""
        await self._store.keep_evidence(
            "equivocation",
            error.first.envelope(Voucher).to_json(),
            error.second.envelope(Voucher).to_json(),
        )

    def _receipt(self, voucher: Voucher) -> Signed:
        receipt = Receipt(
            serial=voucher.serial,
            node=voucher.node,
            session=voucher.session,
            sequence=voucher.sequence,
            model=voucher.model,
            first_block=voucher.first_block,
            end_block=voucher.end_block,
            adapter=voucher.adapter,
            prefill_tokens=voucher.prefill_tokens,
            decode_tokens=voucher.decode_tokens,
            backward_tokens=voucher.backward_tokens,
            moved_bytes=voucher.moved_bytes,
            steps=self.transcript.length,
            transcript=self.transcript.head.hex(),
            dtype_class=self._terms.dtype_class,
            unix_s=int(self._clock.unix_s()),
            policy=voucher.policy,
        )
        return Signed.of(ledger_objects.sign(receipt, self._identity.private_key))

    async def close(self) -> SignedReceipt | None:
        """The session is over: what was vouched for is kept; the receipt for the last voucher."""
        return None if self._answered is None else await self.end(self._answered)

    async def end(self, last: PendingReceipt) -> SignedReceipt:
        """No more vouchers of its allowance will come in this session; the receipt once more."""
        receipt = await self.keep(last)
        if last.standing.allowance is not None:
            await self._store.end(last.standing.allowance.serial, self._session)
        return receipt
