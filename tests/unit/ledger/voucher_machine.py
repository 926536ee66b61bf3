"""A node's books under every interleaving of vouchers, crashes, repetitions and hostile objects.

The oracle below is written apart from the code under test and knows nothing of it: it keeps what a
notary would, the best voucher that the payer really signed for this channel, and what it is worth.
"""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import replace
from types import ModuleType
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from swarm.client.vouchers import Grant
from swarm.ledger import channel as real_channel
from swarm.ledger import node_books as real_books
from swarm.ledger.channel import Signed
from swarm.ledger.commits import DirectCommits
from swarm.node import accounts as real_accounts
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.identity import Identity
from swarm.protocol.ledger_objects import Allowance, Receipt, Voucher, sign
from swarm.protocol.messages import OpenSession, SignedVoucher
from swarm.protocol.strict_json import parse
from swarm.protocol.tensors import DType, WireTensor

NODE = Identity(Ed25519PrivateKey.from_private_bytes(b"n" * 32))
PAYER = Ed25519PrivateKey.from_private_bytes(b"p" * 32)
THIEF = Ed25519PrivateKey.from_private_bytes(b"t" * 32)
MODEL = bytes(range(32))
BLOCKS, MFLOP = 4, 7
LIMIT_TOKENS = 40
LIMIT = BLOCKS * MFLOP * 10 * LIMIT_TOKENS
START_S = 1_800_000_000
DAY_S = 24 * 3600
TENSOR = WireTensor(DType.FLOAT32, (1, 1, 1), bytes(4))
LIES: tuple[dict[str, Any], ...] = (
    {"serial": "00" * 16},
    {"node": Identity(THIEF).peer_id},
    {"session": "ff" * 16},
    {"model": "00" * 32},
    {"first_block": 1},
    {"end_block": 9},
    {"adapter": "00" * 32},
    {"policy": "00" * 32},
)


class Time:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now_s = float(START_S)

    def monotonic_s(self) -> float:
        return self.now_s

    def unix_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        raise AssertionError("nothing here waits")


def done(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that never really waits."""
    try:
        work.send(None)
    except StopIteration as stopped:
        return stopped.value
    raise AssertionError("it waits")


class Oracle:
    """What one channel is worth, by what its payer signed."""

    def __init__(self) -> None:
        self.sequence = -1  # none yet
        self.tokens = 0
        self.payload = b""

    def expects(self, payload: bytes, sequence: int, tokens: int) -> ErrorCode | None:
        """For a voucher without a lie, at a valid time."""
        if payload == self.payload:
            return None
        if tokens > LIMIT_TOKENS:
            return ErrorCode.OVER_LIMIT
        if sequence == self.sequence:
            if tokens > self.tokens:
                self.tokens, self.payload = tokens, payload
            return ErrorCode.EQUIVOCATION
        if sequence < self.sequence or tokens < self.tokens:
            return ErrorCode.ROLLED_BACK
        self.sequence, self.tokens, self.payload = sequence, tokens, payload
        return None

    @property
    def units(self) -> int:
        return BLOCKS * MFLOP * 10 * self.tokens


class VoucherMachine(RuleBasedStateMachine):
    """One node and one payer; sessions come and go, the books stay."""

    channel_module: ModuleType = real_channel
    books_module: ModuleType = real_books
    accounts_module: ModuleType = real_accounts

    @initialize()
    def start(self) -> None:
        self.clock = Time()
        self.commits = DirectCommits(real_books.SCHEMA)
        allowance = Allowance(
            serial="ab" * 16,
            voucher_key=PAYER.public_key().public_bytes_raw().hex(),
            maximum_units=LIMIT * 16,
            per_node_units=LIMIT,
            not_before_unix_s=START_S,
            expires_unix_s=START_S + DAY_S,
            allowance_class="local",
            price_epoch=1,
            route_seed="",
        )
        self.grant = Grant(allowance, Signed.of(sign(allowance, PAYER)), PAYER)
        self.oracles: dict[str, Oracle] = {}
        self.receipts: dict[tuple[str, int], list[Receipt]] = {}
        self.sent: list[SignedVoucher] = []
        self.evidence = 0
        self.open_session()

    def open_session(self) -> None:
        """As after a crash: a new process finds the same books."""
        self.session = len(self.oracles).to_bytes(16, "big")
        self.oracle = self.oracles[self.session.hex()] = Oracle()
        store = self.books_module.LedgerStore(self.commits)
        terms = self.accounts_module.LedgerTerms(MODEL, MFLOP, "float32")
        ledger = self.accounts_module.NodeLedger(NODE, store, terms, self.clock)
        request = OpenSession(
            model_revision=MODEL,
            first_block=0,
            end_block=BLOCKS,
            rows=1,
            maximum_tokens=64,
            wire_dtype=1,
            wire_encoding=0,
            previous_peer=NODE.peer_id,
            allowance=self.grant.signed.payload,
            allowance_signature=self.grant.signed.signature,
            allowance_issuer=self.grant.signed.public_key,
        )
        standing = self.accounts_module.Standing(
            "payer", 3, self.grant.allowance, self.grant.signed
        )
        self.account = ledger.account(standing, request, self.session)

    @property
    def is_valid_time(self) -> bool:
        return START_S - 300 <= self.clock.now_s < START_S + DAY_S + 300

    def voucher(self, sequence: int, tokens: int, **changes: Any) -> Voucher:
        return replace(
            Voucher(
                serial=self.grant.allowance.serial,
                node=NODE.peer_id,
                session=self.session.hex(),
                sequence=sequence,
                model=MODEL.hex(),
                first_block=0,
                end_block=BLOCKS,
                adapter="",
                prefill_tokens=0,
                decode_tokens=tokens,
                backward_tokens=0,
                moved_bytes=0,
                transcript="",
                unix_s=int(self.clock.now_s),
            ),
            **changes,
        )

    def offer(self, message: SignedVoucher, expected: ErrorCode | None, *, crash: bool) -> None:
        try:
            pending = self.account.accept(message)
        except ProtocolError as error:
            if error.code is ErrorCode.EQUIVOCATION:
                self.evidence += 1
                done(self.account.keep_evidence(error))
            assert error.code is expected, f"{error.code.name} instead of {expected}"  # noqa: PT017
            return
        assert expected is None, f"taken instead of {expected}"
        if crash:
            self.open_session()  # before it was on the disk: no receipt was sent
            return
        answer = done(self.account.keep(pending))
        receipt = parse(Receipt, answer.payload)
        self.receipts.setdefault((receipt.session, receipt.sequence), []).append(receipt)

    @rule(
        step=st.integers(-1, 2),
        more=st.integers(-3, 30),
        lie=st.sampled_from([None, None, None, *LIES]),
        thief=st.integers(0, 9),
        late_s=st.sampled_from([0, 0, 0, 299, 301]),
        crash=st.sampled_from([False, False, False, True]),
    )
    def vouch(
        self,
        step: int,
        more: int,
        lie: dict[str, Any] | None,
        thief: int,
        late_s: int,
        crash: bool,
    ) -> None:
        """A voucher, honest or not."""
        self.vouch_with(step, more, lie, thief, late_s, crash)

    def vouch_with(
        self,
        step: int,
        more: int,
        lie: dict[str, Any] | None = None,
        thief: int = 1,
        late_s: int = 0,
        crash: bool = False,
    ) -> None:
        sequence = max(0, self.oracle.sequence + step)
        tokens = max(0, self.oracle.tokens + more)
        changes = dict(lie or {})
        voucher = self.voucher(sequence, tokens, **changes)
        voucher = replace(voucher, unix_s=voucher.unix_s - late_s)
        signed = Signed.of(sign(voucher, THIEF if thief == 0 else PAYER))
        message = SignedVoucher(signed.payload, signed.signature)
        self.sent.append(message)
        expected: ErrorCode | None
        if signed.payload == self.oracle.payload:
            expected = None  # a repetition is recognised by its bytes
        elif thief == 0:
            expected = ErrorCode.BAD_SIGNATURE
        elif lie is not None:
            expected = ErrorCode.FOREIGN_OBJECT
        elif not self.is_valid_time or late_s > 300:
            expected = ErrorCode.NOT_VALID_NOW
        else:
            expected = self.oracle.expects(signed.payload, sequence, tokens)
        self.offer(message, expected, crash=crash)

    @rule(which=st.integers(0, 50), bit=st.integers(0, 7), place=st.integers(0, 10_000))
    def tamper(self, which: int, bit: int, place: int) -> None:
        """A bit of what was sent before is flipped."""
        if not self.sent:
            return
        message = self.sent[which % len(self.sent)]
        data = bytearray(message.payload + message.signature)
        data[place % len(data)] ^= 1 << bit
        changed = SignedVoucher(bytes(data[:-64]), bytes(data[-64:]))
        if changed.payload == self.oracle.payload:
            return  # only its signature differs: a repetition, and nothing new is kept of it
        before = self.account.done, dict(self.books())
        try:
            self.account.accept(changed)
        except ProtocolError:
            assert before == (self.account.done, dict(self.books()))
            return
        raise AssertionError("something altered was taken")

    @rule(which=st.integers(0, 50))
    def replay(self, which: int) -> None:
        """What was sent before comes again, perhaps from another session."""
        if not self.sent:
            return
        self.replay_of(self.sent[which % len(self.sent)])

    def replay_of(self, message: SignedVoucher) -> None:
        before = self.oracle.units
        was = self.oracle.payload == message.payload
        try:
            pending = self.account.accept(message)
        except ProtocolError as error:
            if error.code is ErrorCode.EQUIVOCATION:
                voucher = parse(Voucher, message.payload)
                self.oracle.expects(message.payload, voucher.sequence, voucher.decode_tokens)
                done(self.account.keep_evidence(error))
                self.evidence += 1
            return
        voucher = parse(Voucher, message.payload)
        if not was:
            # It never arrived before (the process crashed, or a lie about time came true).
            assert (
                self.oracle.expects(message.payload, voucher.sequence, voucher.decode_tokens)
                is None
            )
        receipt = parse(Receipt, done(self.account.keep(pending)).payload)
        self.receipts.setdefault((receipt.session, receipt.sequence), []).append(receipt)
        assert self.oracle.units >= before

    @rule(
        step=st.integers(-1, 1),
        more=st.integers(-3, 5),
        again=st.booleans(),
    )
    def vouch_honestly_or_nearly(self, step: int, more: int, again: bool) -> None:
        """Vouchers in a row, some of them twice."""
        self.vouch_with(step, more)
        if again:
            self.replay_of(self.sent[-1])

    @rule(
        what=st.sampled_from(["computes", "computes", "crashes", "closes", "an hour", "a day"]),
    )
    def disturb(self, what: str) -> None:
        """Something else happens meanwhile."""
        match what:
            case "computes":
                self.account.transcript.add(step=1, position=0, given=TENSOR, answered=TENSOR)
            case "crashes":
                self.open_session()
            case "closes":
                done(self.account.close())
                self.open_session()
            case "an hour":
                self.clock.now_s += 3600
            case "a day":
                self.clock.now_s += DAY_S

    def books(self) -> dict[str, int]:
        rows = self.commits.database.execute("SELECT session, units FROM channel")
        return dict(rows.fetchall())

    @invariant()
    def nobody_is_paid_more_than_was_vouched_for(self) -> None:
        if not hasattr(self, "oracles"):
            return
        for session, units in self.books().items():
            assert units <= self.oracles[session].units, "paid above the best voucher"
            assert units <= LIMIT, "paid above the allowance"

    @invariant()
    def every_receipt_has_its_voucher(self) -> None:
        if not hasattr(self, "receipts"):
            return
        rows = self.commits.database.execute("SELECT session, sequence FROM channel").fetchall()
        kept = dict(rows)
        for (session, sequence), receipts in self.receipts.items():
            assert kept.get(session, -1) >= sequence, "a receipt without its voucher"
            if len({receipt.decode_tokens for receipt in receipts}) == 1:
                assert all(each == receipts[0] for each in receipts), "two receipts for one number"

    def teardown(self) -> None:
        if not hasattr(self, "commits"):
            return
        reader = real_books.LedgerReader(self.commits.database)
        reader.verify()
        totals = reader.totals()
        assert totals.evidence == self.evidence
        before = self.books()
        for entry in list(reader.channels()):
            done(
                real_books.LedgerStore(self.commits).keep(entry.voucher, entry.receipt, entry.units)
            )
        assert self.books() == before, "the same again changed something"
        self.commits.database.close()
