"""An operator among people who mean it well and people who do not, in any order of events.

The oracle is written from docs/ledger.md and shares no code with the books: it keeps what was
genuinely signed, prices it by its own arithmetic, and says what each settlement must pay. Whatever
the books say is compared with it after every step, and the log is replayed leaf by leaf beside it.
"""

from __future__ import annotations

import copy
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from swarm.ledger.replay import Replayed
from swarm.operator.books import Books
from swarm.operator.journal import Journal
from swarm.protocol.envelope import Envelope
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.ledger_objects import ANONYMOUS, FUNDED, Voucher, parse, sign
from tests.unit.operator.parties import MFLOP, NETWORKS, Client, World, key, peer, policy

NODES = ("volunteer", "certified", "third")
ACCOUNTS = ("alice", "bob", "")
GRACE_S = 48 * 3600
WIDTH = 10
COUNTS = ((1, 1, 0), (1, 200, 1), (2, 200, 7), (2, 1, 90), (3, 200, 90))
"""Sequence, prefill and decode tokens: some pairs agree, some contradict each other."""
OUTCOMES = ("failed", "not_reproduced", "failed", "passed")
SIGNERS = (("lab",), ("telco",), ("bureau",), ("lab", "telco"))
"""Who signs a verdict."""
JUMPS_S = (60, 3600, 25 * 3600, 60 * 3600, 80 * 3600)


@dataclass
class Known:
    """What the oracle knows of an allowance."""

    client: Client
    best: dict[tuple[str, int], int] = field(default_factory=dict)
    """Price of the dearest voucher presented, by node and session."""
    paid: dict[tuple[str, int], int] = field(default_factory=dict)
    is_open: bool = True

    def at(self, node: str) -> int:
        return sum(units for (where, _), units in self.paid.items() if where == node)

    @property
    def used(self) -> int:
        return sum(self.paid.values())


@dataclass
class Case:
    """What the oracle knows of a node: who has said what of it, and what follows."""

    state: str = "active"
    said: dict[tuple[int, str], str] = field(default_factory=dict)
    """By segment and organisation; empty for what is over."""

    def judged(self, outcome: str, segment: int, signers: tuple[str, ...]) -> str:
        news = [name for name in signers if (segment, name) not in self.said]
        self.said |= {(segment, name): outcome for name in news}
        if not news or self.state == "revoked":
            return self.state
        if outcome == "failed":
            by_segment = self._by(0, "failed")
            by_organisation = self._by(1, "failed")
            both = any(len(names) > 1 for names in by_segment.values())
            each = sum(len(segments) > 1 for segments in by_organisation.values())
            if len(by_segment) > 1:
                self.state = "revoked" if both or each > 1 else "quarantined"
        if outcome == "not_reproduced":
            is_kept_out = self.state == "quarantined"
            if is_kept_out and len(self._by(1, "not_reproduced")) < 2:
                return self.state
            over = ("not_reproduced", "failed") if is_kept_out else ("not_reproduced",)
            self.said |= {place: "" for place, word in self.said.items() if word in over}
            self.state = "active"
        return self.state

    def _by(self, part: int, outcome: str) -> dict[int | str, list[int | str]]:
        """Segments by organisation, or organisations by segment."""
        found: dict[int | str, list[int | str]] = {}
        for place, word in self.said.items():
            if word == outcome:
                found.setdefault(place[part], []).append(place[1 - part])
        return found


@dataclass(frozen=True)
class Signed:
    """One voucher that exists, genuine or not."""

    envelope: Envelope
    allowance: int
    node: str
    session: int
    is_genuine: bool


class Fault(Exception):
    """Something that ends a transaction: a full disk, a bug, the end of the process."""


class FaultyConnection:
    """A database that fails at a chosen statement."""

    def __init__(self, connection: sqlite3.Connection, statements: int) -> None:
        self._connection = connection
        self._left = statements

    def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        if statement != "ROLLBACK":
            self._left -= 1
            if self._left < 0:
                raise Fault
        return self._connection.execute(statement, *arguments)

    def executemany(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        if self._left <= 0:
            raise Fault
        return self._connection.executemany(statement, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@dataclass
class Start(World):
    """An operator that has money, nodes and users already: made once, copied for each run."""

    clients: tuple[Client, ...] = ()
    signed: tuple[Signed, ...] = ()
    """Vouchers of the first client, one for each node, that were settled."""
    database: bytes = b""
    replayed: Replayed = field(default_factory=lambda: Replayed(()))


@cache
def _start() -> Start:
    terms = policy(minimum_node_age_s=0, pair_floor_units=2**52)
    start = Start(Books(Journal.in_memory(), terms, key("operator")))
    start.mint("public", 2_000_000)
    start.fund("alice", 1_500_000)
    start.fund("bob", 40_000)
    start.organisation("uni")
    start.organisation("lab", may_validate=True)
    start.organisation("telco", may_validate=True)
    start.organisation("bureau", may_validate=True)
    start.enrol("volunteer", payout="donor")
    start.enrol("certified", organisation="uni")
    start.enrol("third")
    start.clients = (
        start.request("alice", 400_000),
        start.request("bob", 30_001),
        start.request("", 30_001, ANONYMOUS),
    )
    start.signed = tuple(
        Signed(start.clients[0].voucher(node, 7, 1, 2), 0, node, 2, is_genuine=True)
        for node in NODES
    )
    for each in start.signed:
        start.settle(each.node, each.envelope)
    journal = start.books.journal
    start.replayed = Replayed(terms.mint_keys)
    for leaf in journal.leaves(0, journal.size):
        start.replayed.add(leaf)
    start.database = journal.db.serialize()
    return start


class OperatorMachine(RuleBasedStateMachine):
    journal_class: type[Journal] = Journal

    def __init__(self) -> None:
        super().__init__()
        start = _start()
        connection = sqlite3.connect(":memory:", isolation_level=None)
        connection.deserialize(start.database)
        books = Books(self.journal_class(connection), start.books.policy, key("operator"))
        self.world = copy.copy(start)
        self.world.books = books
        self.allowances = [Known(client) for client in start.clients]
        self.signed: list[Signed] = []
        for each in start.signed:
            price = price_of(each.envelope)
            for amounts in (self.allowances[0].best, self.allowances[0].paid):
                amounts[each.node, each.session] = price
        self.replayed = copy.deepcopy(start.replayed)
        self.cases = {node: Case() for node in NODES}

    # --- what people do ---
    @rule(account=st.sampled_from(ACCOUNTS), units=st.sampled_from((16, 30_001, 400_000)))
    def ask(self, account: str, units: int) -> None:
        allowance_class = FUNDED if account else ANONYMOUS
        with refused_only_with(ErrorCode.OVER_LIMIT, ErrorCode.FOREIGN_OBJECT):
            self.allowances.append(Known(self.world.request(account, units, allowance_class)))

    @rule(which=st.integers(0, 99))
    def ask_again(self, which: int) -> None:
        """A request that is repeated within its time gets what it got before."""
        known = self.allowances[which % len(self.allowances)]
        with refused_only_with(ErrorCode.NOT_VALID_NOW):
            issued = self.world.books.issue(known.client.request, NETWORKS, self.world.now)
            assert issued == known.client.issued

    @rule(
        which=st.integers(0, 99),
        node=st.sampled_from(NODES),
        session=st.sampled_from((0, 0, 1)),
        counts=st.lists(st.sampled_from(COUNTS), min_size=1, max_size=3),
    )
    def vouch(
        self, which: int, node: str, session: int, counts: list[tuple[int, int, int]]
    ) -> None:
        """Some vouchers of one session: honest ones, rollbacks and equivocation alike."""
        index = which % len(self.allowances)
        for sequence, prefill, decode in counts:
            envelope = self.allowances[index].client.voucher(
                node, decode, sequence, session, prefill_tokens=prefill, moved_bytes=sequence * 17
            )
            self.signed.append(Signed(envelope, index, node, session, is_genuine=True))

    @precondition(lambda self: self.signed)
    @rule(which=st.integers(0, 99), how=st.integers(0, 2))
    def forge(self, which: int, how: int) -> None:
        """Somebody else's signature, a changed count, or a changed node: presented at once."""
        honest = self.signed[which % len(self.signed)]
        envelope, node = honest.envelope, honest.node
        if how == 0:
            raised = replace(parse(Voucher, envelope), sequence=9, decode_tokens=99)
            envelope = sign(raised, key("mallory"))
        elif how == 1:
            content = envelope.payload.replace(b'_tokens":', b'_tokens":9', 1)
            envelope = replace(envelope, payload=content)
        else:
            node = NODES[(NODES.index(node) + 1) % len(NODES)]
            content = envelope.payload.replace(peer(honest.node).encode(), peer(node).encode())
            envelope = replace(envelope, payload=content)
        self.present(node, [replace(honest, envelope=envelope, is_genuine=False)])

    @precondition(lambda self: self.signed)
    @rule(which=st.lists(st.integers(0, 99), min_size=1, max_size=3), thief=st.integers(0, 5))
    def settle(self, which: list[int], thief: int) -> None:
        """A node presents vouchers of its own, and at times of others."""
        chosen = [self.signed[index % len(self.signed)] for index in which]
        self.present(NODES[thief] if thief < len(NODES) else chosen[0].node, chosen)

    def present(self, node: str, chosen: list[Signed]) -> None:
        if self.world.books.node(peer(node))["state"] == "revoked":
            with pytest.raises(ProtocolError):
                self.world.settle(node, *(each.envelope for each in chosen))
            return
        outcomes = self.world.settle(node, *(each.envelope for each in chosen))
        for each, outcome in zip(chosen, outcomes, strict=True):
            assert outcome.paid_units == self.expected(node, each), (each, outcome)

    def expected(self, node: str, each: Signed) -> int:
        """What the books must pay for a voucher now; keeps account of it."""
        known = self.allowances[each.allowance]
        allowance = known.client.allowance
        if not each.is_genuine or each.node != node or not known.is_open:
            return 0
        if self.world.now > allowance.expires_unix_s + GRACE_S:
            return 0
        place = (node, each.session)
        price = price_of(each.envelope)
        known.best[place] = max(price, known.best.get(place, 0))
        due = known.best[place] - known.paid.get(place, 0)
        granted = min(
            due,
            allowance.maximum_units - known.used,
            allowance.per_node_units - known.at(node),
        )
        known.paid[place] = known.paid.get(place, 0) + granted
        return granted

    # --- what happens to everybody ---
    @rule(jump_s=st.sampled_from(JUMPS_S))
    def time_passes(self, jump_s: int) -> None:
        self.world.now += jump_s

    @rule()
    def upkeep(self) -> None:
        self.world.books.release_expired(self.world.now)
        self.world.books.vest(self.world.now)
        for known in self.allowances:
            if self.world.now > known.client.allowance.expires_unix_s + GRACE_S:
                known.is_open = False

    @rule(
        node=st.sampled_from(NODES),
        words=st.lists(
            st.tuples(st.sampled_from(OUTCOMES), st.integers(0, 9), st.sampled_from(SIGNERS)),
            min_size=2,
            max_size=6,
        ),
    )
    def judge(self, node: str, words: list[tuple[str, int, tuple[str, ...]]]) -> None:
        """What one organisation found or two have signed, at times what was posted before."""
        for outcome, segment, signers in words:
            number = NODES.index(node) * 10 + segment
            state = self.world.verdict(node, outcome, number, *signers)
            assert state == self.cases[node].judged(outcome, segment, signers)

    @precondition(lambda self: self.signed)
    @rule(
        node=st.sampled_from(NODES),
        which=st.integers(0, 99),
        left_out=st.integers(0, 25),
        restarts=st.booleans(),
    )
    def fail(self, node: str, which: int, left_out: int, restarts: bool) -> None:
        """A settlement that fails midway leaves nothing, whether or not the process lives."""
        books = self.world.books
        journal = books.journal
        connection = journal.db
        # A payment takes 25 statements; most is to be undone near their end.
        journal.db = FaultyConnection(connection, 25 - left_out)  # type: ignore[assignment]
        chosen = self.signed[which % len(self.signed)]
        try:
            outcomes = self.world.settle(node, chosen.envelope)
        except (Fault, ProtocolError):
            pass
        else:
            assert outcomes[0].paid_units == self.expected(node, chosen)
        finally:
            journal.db = connection
        if restarts:
            books.journal = self.journal_class(connection)
        self.present(chosen.node, [chosen])  # the node tries again

    # --- what holds always ---
    @invariant()
    def the_books_are_right(self) -> None:
        """One method: the order of several is not defined, and the log has to be read first."""
        self.the_log_adds_up()
        self.nobody_is_paid_more_than_was_signed_for()
        self.every_unit_in_escrow_remembers_who_paid_it()

    def the_log_adds_up(self) -> None:
        journal = self.world.books.journal
        for leaf in journal.leaves(self.replayed.events, journal.size):
            self.replayed.add(leaf)
        assert self.replayed.root() == journal.tree.root()
        assert dict(self.replayed.balances) == journal.balances()

    def nobody_is_paid_more_than_was_signed_for(self) -> None:
        journal = self.world.books.journal
        balances = journal.balances()
        assert sum(balances.values()) == 0
        assert all(units >= 0 for name, units in balances.items() if name != "mint")
        held = 0
        for known in self.allowances:
            allowance = known.client.allowance
            assert known.used <= allowance.maximum_units
            held += allowance.maximum_units - known.used if known.is_open else 0
        rows = journal.db.execute("SELECT serial, node, session, paid FROM channel").fetchall()
        paid = {(serial, node, session): units for serial, node, session, units in rows if units}
        assert paid == {
            (known.client.allowance.serial, peer(node), f"{session:032x}"): units
            for known in self.allowances
            for (node, session), units in known.paid.items()
            if units
        }
        assert balances.get("holds", 0) == held
        assert sum(self.replayed.paid_by_node.values()) == sum(paid.values())

    def every_unit_in_escrow_remembers_who_paid_it(self) -> None:
        journal = self.world.books.journal
        lots = journal.db.execute("SELECT node, SUM(units) FROM lot GROUP BY node").fetchall()
        assert {f"escrow:{node}": units for node, units in lots} == {
            name: units
            for name, units in journal.balances().items()
            if name.startswith("escrow:") and units
        }


@contextmanager
def refused_only_with(*codes: ErrorCode) -> Iterator[None]:
    """What may be refused, but for these reasons alone."""
    try:
        yield
    except ProtocolError as error:
        if error.code not in codes:
            raise


def price_of(envelope: Envelope) -> int:
    """By the formula of docs/ledger.md, written out."""
    voucher = parse(Voucher, envelope)
    tokens = voucher.prefill_tokens + 10 * voucher.decode_tokens + 2 * voucher.backward_tokens
    return WIDTH * MFLOP * tokens + voucher.moved_bytes // 32
