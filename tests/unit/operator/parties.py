"""Everybody who deals with an operator, with real keys, for tests of its books."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.operator.books import Books
from swarm.operator.journal import Journal
from swarm.operator.policy import Policy
from swarm.operator.settlement import Outcome
from swarm.protocol.envelope import Envelope
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.ledger_objects import (
    FUNDED,
    Allowance,
    Settlement,
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

MODEL = "11" * 32
BLOCKS = 30
MFLOP = 7
ORIGIN = "operator.example/ledger"
START = 1_800_000_000
NETWORKS = ("network-a", "network-wide")


@cache
def key(name: str) -> Ed25519PrivateKey:
    """The same name, the same key."""
    return Ed25519PrivateKey.from_private_bytes(sha256(name.encode()).digest())


@cache
def identity(name: str) -> Identity:
    return Identity(key(name))


def peer(name: str) -> PeerId:
    return identity(name).peer_id


def public(name: str) -> bytes:
    return key(name).public_key().public_bytes_raw()


def policy(**changes: object) -> Policy:
    values: dict[str, object] = {
        "origin": ORIGIN,
        "mint_keys": frozenset(public(f"mint-{number}") for number in range(3)),
        "operator_key": public("operator"),
        "nodes_per_allowance": 4,
    }
    return Policy(**(values | changes))  # type: ignore[arg-type]


@dataclass
class World:
    """An operator with a priced model, and what others send to it."""

    books: Books = field(
        default_factory=lambda: Books(Journal.in_memory(), policy(), key("operator"))
    )
    now: int = START

    def __post_init__(self) -> None:
        self.order(ModelPrice(MODEL, BLOCKS, MFLOP, self.now), "operator")

    def order(self, order: object, *signers: str) -> int:
        sealed = sign(order, *(key(name) for name in signers))  # type: ignore[arg-type]
        return self.books.take_order(sealed, self.now)

    def mint(self, budget: str, units: int, *signers: str) -> int:
        order = MintOrder(secrets.token_hex(16), ORIGIN, budget, units, "for a test", self.now)
        return self.order(order, *(signers or ("mint-0", "mint-1")))

    def compensate(self, event: str, source: str, target: str, units: int, *signers: str) -> int:
        order = Compensation(
            secrets.token_hex(16), ORIGIN, event, source, target, units, "repair", self.now
        )
        return self.order(order, *(signers or ("mint-0", "mint-2")))

    def fund(self, account: str, units: int) -> None:
        """Give a user money, as an operator would repair a loss."""
        index = self.mint("gifts", units)
        event = self.books.journal.db.execute(
            "SELECT id FROM event WHERE idx = ?", (index,)
        ).fetchone()[0]
        self.compensate(event, "budget:gifts", f"user:{peer(account)}", units)

    def organisation(self, name: str, *, may_validate: bool = False) -> None:
        entry = OrganisationEntry(name, public(name).hex(), int(may_validate), self.now)
        self.order(entry, "operator")

    def member(self, name: str, budget: str, daily: int, organisation: str = "") -> None:
        self.order(MemberEntry(peer(name), budget, daily, organisation, self.now), "operator")

    def enrol(
        self, name: str, *, payout: str = "", organisation: str = "", sequence: int = 1
    ) -> int | None:
        enrolment = Enrolment(peer(name), peer(payout or name), organisation, sequence, self.now)
        certificate = None
        if organisation:
            stated = NodeCertificate(peer(name), organisation, self.now, self.now + 90 * 86400)
            certificate = sign(stated, key(organisation))
        return self.books.enrol(sign(enrolment, key(name)), certificate, self.now)

    def request(
        self,
        account: str = "",
        units: int = 1_000_000,
        allowance_class: str = FUNDED,
        budget: str = "",
        lifetime_s: int = 3600,
        networks: tuple[str, str] = NETWORKS,
    ) -> Client:
        voucher_key = Ed25519PrivateKey.generate()
        request = AllowanceRequest(
            secrets.token_hex(16),
            peer(account) if account else "",
            voucher_key.public_key().public_bytes_raw().hex(),
            allowance_class,
            budget,
            units,
            lifetime_s,
            self.now,
        )
        sealed = sign(request, key(account) if account else voucher_key)
        issued = self.books.issue(sealed, networks, self.now)
        return Client(voucher_key, parse(Allowance, issued), sealed, issued)

    def settle(self, node: str, *vouchers: Envelope) -> list[Outcome]:
        return self.books.settle(settlement(node, vouchers, self.now), vouchers, self.now)

    def verdict(self, node: str, outcome: str, segment: int, *signers: str) -> str:
        found = Verdict(
            sha256(b"%d" % segment).hexdigest(),
            peer(node),
            "22" * 16,
            MODEL,
            0,
            BLOCKS,
            0,
            16,
            *(500_000, 700_000, 30_000, 50_000),
            *("33" * 32, "44" * 32, "55" * 32),
            "bfloat16",
            outcome,
            self.now,
        )
        return self.books.take_verdict(sign(found, *(key(name) for name in signers)), self.now)


@dataclass
class Client:
    """The holder of an allowance."""

    voucher_key: Ed25519PrivateKey
    allowance: Allowance
    request: Envelope
    issued: Envelope

    def voucher(
        self,
        node: str,
        decode_tokens: int,
        sequence: int = 1,
        session: int = 0,
        **changes: object,
    ) -> Envelope:
        values: dict[str, object] = {
            "serial": self.allowance.serial,
            "node": peer(node),
            "session": f"{session:032x}",
            "sequence": sequence,
            "model": MODEL,
            "first_block": 0,
            "end_block": 10,
            "adapter": "",
            "prefill_tokens": 0,
            "decode_tokens": decode_tokens,
            "backward_tokens": 0,
            "moved_bytes": 0,
            "transcript": "",
            "unix_s": self.allowance.not_before_unix_s,
        }
        return sign(Voucher(**(values | changes)), self.voucher_key)  # type: ignore[arg-type]


def settlement(node: str, vouchers: tuple[Envelope, ...], now: int) -> Envelope:
    root = root_of([leaf_hash(voucher.payload) for voucher in vouchers]).hex()
    return sign(
        Settlement(peer(node), now - 3600, now, len(vouchers), root, 0, "00" * 32), key(node)
    )


TOKEN = 10 * 10 * MFLOP
"""Price of one decode token through the ten blocks of ``Client.voucher``."""
