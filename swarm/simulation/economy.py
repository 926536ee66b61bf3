"""People who try to get more out of an operator than they put in: what each of them gains.

The books are the real ones, with real signatures; only time and people are simulated. Amounts are
credits. What a strategy *gains* is what its owner may spend at the end beyond what it had; what it
*costs others* is public money or compute that honest people did not get for it.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.ledger.events import budget, escrow, user
from swarm.ledger.rules import is_eligible
from swarm.operator.books import Books
from swarm.operator.journal import Journal
from swarm.operator.policy import Policy
from swarm.operator.settlement import MAX_VOUCHERS
from swarm.protocol.envelope import Envelope
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.identity import Identity
from swarm.protocol.ledger_objects import (
    ANONYMOUS,
    FUNDED,
    MEMBER,
    Allowance,
    Settlement,
    SignedObject,
    Verdict,
    Voucher,
    parse,
    sign,
)
from swarm.protocol.merkle import leaf_hash, root_of
from swarm.protocol.operator_objects import (
    AllowanceRequest,
    Compensation,
    Enrolment,
    MemberEntry,
    MintOrder,
    ModelPrice,
    NodeCertificate,
    OrganisationEntry,
)
from swarm.protocol.prices import UNITS_PER_CREDIT

DAY_S = 24 * 3600
ORIGIN = "simulated.example/ledger"
MODEL = "11" * 32
BLOCKS = 32
MFLOP = 436
TOKEN = BLOCKS * MFLOP * 10
"""Price of one decode token through all blocks: an 8 B model."""


def new_identity(name: str) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(sha256(name.encode()).digest()))


@dataclass
class Holder:
    """A client with an allowance."""

    key: Ed25519PrivateKey
    allowance: Allowance


class Economy:
    """An operator with nodes that were enrolled long ago, and money in its budgets."""

    def __init__(self, honest_nodes: int, **changes: int) -> None:
        self.mint_keys = [new_identity(f"mint {number}") for number in range(3)]
        self.operator = new_identity("operator")
        policy = Policy(
            ORIGIN,
            frozenset(each.public_key_bytes for each in self.mint_keys),
            self.operator.public_key_bytes,
            **changes,  # type: ignore[arg-type]
        )
        self.books = Books(Journal.in_memory(), policy, self.operator.private_key)
        self.now = 1_800_000_000
        self._order(ModelPrice(MODEL, BLOCKS, MFLOP, self.now), self.operator)
        self.honest = [new_identity(f"honest {number}") for number in range(honest_nodes)]
        self.enrol(self.honest)

    def _order(self, order: SignedObject, *signers: Identity) -> None:
        sealed = sign(order, *(each.private_key for each in signers))
        self.books.take_order(sealed, self.now)

    def mint(self, name: str, credits_: int) -> str:
        order = MintOrder(
            secrets.token_hex(16), ORIGIN, name, credits_ * UNITS_PER_CREDIT, "simulation", self.now
        )
        self._order(order, *self.mint_keys[:2])
        return f"mint:{order.order}"

    def give(self, account: Identity, credits_: int) -> None:
        event = self.mint("gifts", credits_)
        order = Compensation(
            secrets.token_hex(16), ORIGIN, event, budget("gifts"), user(account.peer_id),
            credits_ * UNITS_PER_CREDIT, "simulation", self.now,
        )  # fmt: skip
        self._order(order, *self.mint_keys[1:])

    def enrol(
        self, nodes: Sequence[Identity], payout: Identity | None = None, organisation: str = ""
    ) -> None:
        for node in nodes:
            target = payout or node
            enrolment = Enrolment(node.peer_id, target.peer_id, organisation, 1, self.now)
            certificate = None
            if organisation:
                stated = NodeCertificate(
                    node.peer_id, organisation, self.now, self.now + 90 * DAY_S
                )
                certificate = sign(stated, new_identity(organisation).private_key)
            self.books.enrol(sign(enrolment, node.private_key), certificate, self.now)

    def organisation(self, name: str, *, may_validate: bool = False) -> None:
        key = new_identity(name).public_key_bytes.hex()
        self._order(OrganisationEntry(name, key, int(may_validate), self.now), self.operator)

    def member(self, account: Identity, name: str, daily_credits: int, organisation: str) -> None:
        daily = daily_credits * UNITS_PER_CREDIT
        self._order(
            MemberEntry(account.peer_id, name, daily, organisation, self.now), self.operator
        )

    def has_been_busy(self, nodes: Sequence[Identity]) -> None:
        """As after a day of settlements: the draw knows how many nodes there are for a block."""
        for node in nodes:
            self.books.journal.db.execute(
                "UPDATE node SET model = ?, span_millionths = 1000000, settled_unix_s = ?"
                " WHERE node = ?",
                (MODEL, self.now, node.peer_id),
            )

    def ask(
        self,
        units: int,
        *,
        account: Identity | None = None,
        allowance_class: str = FUNDED,
        budget_name: str = "",
        network: str = "",
    ) -> Holder:
        """An allowance. Raises ProtocolError where the operator gives none."""
        key = Ed25519PrivateKey.generate()
        request = AllowanceRequest(
            secrets.token_hex(16), account.peer_id if account else "",
            key.public_key().public_bytes_raw().hex(), allowance_class, budget_name, units, 3600,
            self.now,
        )  # fmt: skip
        sealed = sign(request, account.private_key if account else key)
        issued = self.books.issue(sealed, (network, f"wide {network}"), self.now)
        return Holder(key, parse(Allowance, issued))

    def ask_until_refused(self, units: int, network: str) -> Iterator[Holder]:
        """Anonymous allowances, as many as the operator gives."""
        while True:
            try:
                yield self.ask(units, allowance_class=ANONYMOUS, network=network)
            except ProtocolError as error:
                if error.code is not ErrorCode.OVER_LIMIT:
                    raise
                return

    def voucher(self, holder: Holder, node: Identity, units: int) -> Envelope:
        """For as much work as ``units`` can pay."""
        voucher = Voucher(
            holder.allowance.serial, node.peer_id, "00" * 16, 1, MODEL, 0, BLOCKS, "", 0,
            units // TOKEN, 0, 0, "", self.now,
        )  # fmt: skip
        return sign(voucher, holder.key)

    def settle(self, node: Identity, vouchers: Sequence[Envelope]) -> int:
        """Units paid."""
        paid = 0
        for batch in _batches(vouchers):
            root = root_of([leaf_hash(voucher.payload) for voucher in batch]).hex()
            stated = Settlement(
                node.peer_id, self.now - 3600, self.now, len(batch), root, 0, "00" * 32
            )
            outcomes = self.books.settle(sign(stated, node.private_key), batch, self.now)
            paid += sum(outcome.paid_units for outcome in outcomes)
        return paid

    def judge(self, node: Identity, outcome: str, *validators: str) -> str:
        verdict = Verdict(
            secrets.token_hex(32), node.peer_id, "22" * 16, MODEL, 0, BLOCKS, 0, 16,
            500_000, 700_000, 30_000, 50_000, "33" * 32, "44" * 32, "55" * 32, "bfloat16", outcome,
            self.now,
        )  # fmt: skip
        keys = [new_identity(name).private_key for name in validators]
        return self.books.take_verdict(sign(verdict, *keys), self.now)

    def pass_days(self, days: float) -> None:
        self.now += int(days * DAY_S)
        while self.books.release_expired(self.now):
            pass
        self.books.vest(self.now)

    def spendable(self, account: Identity) -> int:
        return self.books.journal.balance(user(account.peer_id))

    def waiting(self, node: Identity) -> int:
        return self.books.journal.balance(escrow(node.peer_id))


def _batches(vouchers: Sequence[Envelope]) -> Iterator[Sequence[Envelope]]:
    for first in range(0, len(vouchers), MAX_VOUCHERS):
        yield vouchers[first : first + MAX_VOUCHERS]


@dataclass(frozen=True)
class Outcome:
    """One line of the table; credits, and what they are compared with."""

    strategy: str
    put_in: float
    got_out: float
    """What its owner may spend at the end, what still waits in escrow included."""
    spendable: float
    limit: float
    """What the design allows it to get at most."""
    note: str = ""
    details: dict[str, float] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return self.got_out <= self.limit


def _credits(units: float) -> float:
    return units / UNITS_PER_CREDIT


def self_dealing_funded(identities: int = 100, rounds: int = 3) -> Outcome:
    """Own money, own nodes, round and round: the fee is all that changes."""
    economy = Economy(0, nodes_per_allowance=1)
    economy.organisation("front")
    users = [new_identity(f"user {number}") for number in range(identities)]
    nodes = [new_identity(f"node {number}") for number in range(identities)]
    for account, node in zip(users, nodes, strict=True):
        economy.give(account, 10)
        economy.enrol([node], payout=account, organisation="front")
    start = sum(map(economy.spendable, users))
    for _ in range(rounds):
        for account, node in zip(users, nodes, strict=True):
            holder = economy.ask(economy.spendable(account), account=account)
            economy.settle(node, [economy.voucher(holder, node, holder.allowance.maximum_units)])
        economy.pass_days(4)
    spendable = sum(map(economy.spendable, users))
    total = spendable + sum(map(economy.waiting, nodes))
    return Outcome(
        f"self-dealing with own credit, {identities} identities, {rounds} rounds",
        _credits(start), _credits(total), _credits(spendable), _credits(start),
        "loses the fee each time",
    )  # fmt: skip


def self_dealing_subsidised(
    identities: int = 100,
    own_nodes: int = 10,
    honest_nodes: int = 90,
    days: int = 2,
    **changes: int,
) -> Outcome:
    """Public money, own nodes wherever the draw has one, in as many networks as there are users.

    Compared with its share of the nodes: what it would get if its users were strangers to it.
    """
    economy = Economy(honest_nodes, **changes)
    attacker = new_identity("attacker")
    own = [new_identity(f"own {number}") for number in range(own_nodes)]
    economy.enrol(own, payout=attacker)
    economy.mint("public", 10**6)
    economy.pass_days(2)
    drawn = 0
    for _ in range(days):
        economy.has_been_busy([*economy.honest, *own])
        vouchers: dict[str, list[Envelope]] = {node.peer_id: [] for node in own}
        for number in range(identities):
            units = economy.books.policy.anonymous_units
            for holder in economy.ask_until_refused(units, f"net {number}"):
                drawn += holder.allowance.maximum_units
                seed_of_draw = bytes.fromhex(holder.allowance.route_seed)
                for node in own:
                    if is_eligible(seed_of_draw, node.peer_id):
                        most = holder.allowance.per_node_units
                        vouchers[node.peer_id].append(economy.voucher(holder, node, most))
        for node in own:
            economy.settle(node, vouchers[node.peer_id])
        economy.pass_days(1)
    spendable = economy.spendable(attacker)
    total = spendable + sum(map(economy.waiting, own))
    share = own_nodes / (own_nodes + honest_nodes)
    return Outcome(
        f"self-dealing with public money, {identities} identities, {share:.0%} of the nodes",
        0.0, _credits(total), _credits(spendable), _credits(drawn) * share,
        "escrow of nodes that nobody audited", {"drawn": _credits(drawn)},
    )  # fmt: skip


def colluding_organisation() -> Outcome:
    """An organisation's members send grant money to its own nodes: the draw never pays that."""
    economy = Economy(8)
    economy.organisation("uni")
    economy.mint("grant", 10**4)
    nodes = [new_identity(f"uni node {number}") for number in range(8)]
    members = [new_identity(f"member {number}") for number in range(10)]
    economy.enrol(nodes, organisation="uni")
    for member in members:
        economy.member(member, "grant", 100, "uni")
    economy.pass_days(2)
    paid = 0
    for member in members:
        holder = economy.ask(
            50 * UNITS_PER_CREDIT, account=member, allowance_class=MEMBER, budget_name="grant"
        )
        for node in nodes:
            units = holder.allowance.per_node_units
            paid += economy.settle(node, [economy.voucher(holder, node, units)])
    return Outcome("an organisation pays its own nodes from a grant", 0.0, _credits(paid),
                   _credits(paid), 0.0, "same organisation: 0")  # fmt: skip


def over_issue(nodes: int = 40) -> Outcome:
    """Sign for the full share at far more nodes than the allowance can pay."""
    economy = Economy(nodes)
    account = new_identity("over-issuer")
    economy.give(account, 100)
    holder = economy.ask(16 * UNITS_PER_CREDIT, account=account)
    signed = paid = 0
    for node in economy.honest:
        signed += holder.allowance.per_node_units // TOKEN * TOKEN
        paid += economy.settle(
            node, [economy.voucher(holder, node, holder.allowance.per_node_units)]
        )
    suspended = account.peer_id in {
        payer for (payer,) in economy.books.journal.db.execute("SELECT payer FROM suspension")
    }
    return Outcome(
        f"over-issue: one allowance, {nodes} nodes", _credits(paid), _credits(signed),
        0.0, _credits(paid) * nodes / 16,
        f"compute once; then suspended: {'yes' if suspended else 'no'}",
        {"unpaid work": _credits(signed - paid), "suspended": float(suspended)},
    )  # fmt: skip


def slander(validators: int) -> Outcome:
    """Validators accuse an honest node; with enough of them together its escrow goes to payers."""
    economy = Economy(1)
    (victim,) = economy.honest
    accusers = [f"accuser {number}" for number in range(validators)]
    for name in accusers:
        economy.organisation(name, may_validate=True)
    payer = new_identity("accuser's payer")
    economy.give(payer, 100)
    holder = economy.ask(16 * UNITS_PER_CREDIT, account=payer)
    economy.settle(victim, [economy.voucher(holder, victim, holder.allowance.per_node_units)])
    economy.pass_days(4)
    start = economy.spendable(payer)
    earned = economy.waiting(victim)
    states = [economy.judge(victim, "failed", *accusers) for _ in range(2)]
    gained = economy.spendable(payer) - start
    return Outcome(
        f"slander of an honest node by {validators} validating organisation(s)",
        0.0, _credits(gained), _credits(gained), 0.0 if validators < 2 else _credits(earned),
        f"the node is {states[-1]}", {"frozen": _credits(economy.waiting(victim))},
    )  # fmt: skip


def griefing_audits() -> Outcome:
    """A client replays everything it gets on other nodes: it pays for each replay."""
    economy = Economy(2)
    account = new_identity("auditor")
    economy.give(account, 100)
    start = economy.spendable(account)
    for _ in range(5):
        holder = economy.ask(16 * UNITS_PER_CREDIT, account=account)
        for node in economy.honest:
            economy.settle(node, [economy.voucher(holder, node, UNITS_PER_CREDIT)])
    economy.pass_days(4)
    spent = start - economy.spendable(account)
    return Outcome(
        "audits to load others: replays of everything", _credits(spent), 0.0, 0.0, 0.0,
        "replays are paid like any work",
    )  # fmt: skip


def cheating_node(
    cheated_share: float,
    audit_rate: float,
    *,
    power: float = 0.99,
    segments_per_day: int = 200,
    runs: int = 400,
    seed: int = 0,
) -> Outcome:
    """A vetted node turns: how much of what it did not earn does it keep?

    Half of what it earns may be spent at once, half waits 72 hours. Two failed segments freeze the
    rest, an arbiter takes it. ``got_out`` is in prices of segments, against the same node honest.
    """
    chance = random.Random(seed)  # noqa: S311 - no secret
    kept, lasted = [], []
    lot_days = 3
    for _ in range(runs):
        failed = segments = 0
        while failed < 2:
            segments += 1
            if chance.random() < cheated_share and chance.random() < audit_rate * power:
                failed += 1
        cheated = segments * cheated_share
        in_escrow = min(segments, lot_days * segments_per_day) / 2
        before = lot_days * segments_per_day / 2
        """Honest earnings that still waited when it turned, and are lost with the rest."""
        older = max(0.0, before - segments / 2)
        kept.append(cheated - in_escrow - older)
        lasted.append(segments)
    lasted.sort()
    kept.sort()
    return Outcome(
        f"a vetted node cheats on {cheated_share:.0%} of segments, {audit_rate:.0%} audited",
        0.0, sum(kept) / runs, kept[runs // 2], 0.0,
        f"caught after {lasted[runs // 2]} segments (median)",
        {"p95 of segments": float(lasted[runs * 95 // 100])},
    )  # fmt: skip


def all_outcomes() -> list[Outcome]:
    return [
        self_dealing_funded(),
        self_dealing_subsidised(),
        self_dealing_subsidised(own_nodes=1, honest_nodes=99),
        self_dealing_subsidised(own_nodes=50, honest_nodes=50),
        colluding_organisation(),
        over_issue(),
        slander(1),
        slander(2),
        griefing_audits(),
        *(cheating_node(share, 0.05) for share in (1.0, 0.2, 0.05)),
    ]
