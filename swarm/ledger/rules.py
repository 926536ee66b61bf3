"""How a payment is split, what a node's escrow is, who may be paid: the rules of money. Pure.

All amounts are integers in units; divisions round down, and what is left over goes to the node.
The reasons for the numbers are in docs/ledger.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

DAY_S = 24 * 3600
PERMILLE = 1000
BASIS_POINTS = 10_000
MAX_ROYALTY_PERMILLE = 200
MAX_PAYEES = 8
MAX_PARENTS = 4
MAX_PARENT_DEPTH = 3
MAX_PARENT_SHARE = 5_000
"""Basis points of a royalty that all parents together may get: the work at hand counts half."""

ESCROW_S = 72 * 3600
PROBATION_S = 7 * DAY_S
PROBATION_CLEAN_AUDITS = 100
VETTED_ESCROW_PERMILLE = 500
ESCROW_SEGMENTS = 50
CREDIT_LIFETIME_S = 365 * DAY_S
PAIR_CAP_PERMILLE = 50
PAIR_WINDOW_S = 30 * DAY_S
NODE_MINIMUM_AGE_S = DAY_S
MAX_SHARE = 2**32 - 1


@dataclass(frozen=True, slots=True)
class AdapterTerms:
    """Who gets what of a session's price when it uses an adapter."""

    royalty_permille: int
    payees: tuple[tuple[str, int], ...]
    """Peer ids and basis points that sum to 10,000."""
    parents: tuple[tuple[str, int], ...] = ()
    """Adapters that this one is derived from, and basis points of its royalty."""

    def is_acceptable(self) -> bool:
        return (
            0 <= self.royalty_permille <= MAX_ROYALTY_PERMILLE
            and 1 <= len(self.payees) <= MAX_PAYEES
            and len({payee for payee, _ in self.payees}) == len(self.payees)
            and all(share > 0 for _, share in self.payees)
            and sum(share for _, share in self.payees) == BASIS_POINTS
            and len(self.parents) <= MAX_PARENTS
            and all(share > 0 for _, share in self.parents)
            and sum(share for _, share in self.parents) <= MAX_PARENT_SHARE
        )


def fee(amount: int, fee_permille: int) -> int:
    return amount * fee_permille // PERMILLE


def royalties(
    amount: int, adapter: str, terms: Callable[[str], AdapterTerms | None]
) -> dict[str, int]:
    """What each payee of an adapter and of its parents gets of ``amount``, by peer id.

    ``terms`` knows adapters by their hash. Parents of unknown terms, beyond the third generation
    and in circles get nothing; their share stays with the derived adapter's payees.
    """
    own = terms(adapter)
    if own is None:
        return {}
    paid: dict[str, int] = {}
    _share(amount * own.royalty_permille // PERMILLE, own, terms, (adapter,), paid)
    return {payee: units for payee, units in paid.items() if units > 0}


def _share(
    royalty: int,
    own: AdapterTerms,
    terms: Callable[[str], AdapterTerms | None],
    line: tuple[str, ...],
    paid: dict[str, int],
) -> None:
    left = royalty
    if len(line) <= MAX_PARENT_DEPTH:
        for parent, share in own.parents:
            parent_terms = None if parent in line else terms(parent)
            if parent_terms is not None:
                part = royalty * share // BASIS_POINTS
                left -= part
                _share(part, parent_terms, terms, (*line, parent), paid)
    for payee, share in own.payees:
        paid[payee] = paid.get(payee, 0) + left * share // BASIS_POINTS


def is_vetted(*, certified: bool, clean_audits: int, registered_for_s: int) -> bool:
    """Whether a node is past its probation: an organisation vouches for it, or its record does."""
    return certified or (clean_audits >= PROBATION_CLEAN_AUDITS and registered_for_s >= PROBATION_S)


def escrow_part(amount: int, *, vetted: bool) -> int:
    """How much of what a node earned waits; the rest may be spent at once."""
    return amount - amount * (PERMILLE - VETTED_ESCROW_PERMILLE) // PERMILLE if vetted else amount


def route_seed(beacon: bytes, serial: str, nodes_per_block: int, wanted: int = 8) -> bytes:
    """What the draw of a subsidised allowance follows from: 28 bytes of seed, 4 of the share.

    The share is that of all nodes that win, so that about ``wanted`` of a block's nodes do.
    """
    share = min(MAX_SHARE, MAX_SHARE * wanted // max(1, nodes_per_block))
    return sha256(beacon + bytes.fromhex(serial)).digest()[:28] + share.to_bytes(4, "big")


def is_eligible(seed: bytes, node: str) -> bool:
    """Whether a node may be paid for a subsidised allowance: a draw that nobody chose."""
    share = int.from_bytes(seed[28:], "big")
    drawn = int.from_bytes(sha256(seed[:28] + node.encode()).digest()[:4], "big")
    return share == MAX_SHARE or drawn < share


def beacon_of(cosignatures: Sequence[bytes]) -> bytes:
    """What an hour's draws depend on: cosignatures of witnesses, which the operator cannot make."""
    return sha256(b"sovereign-swarm beacon v1\0" + b"".join(sorted(cosignatures))).digest()


def pair_limit(subsidised_income: int, floor_units: int) -> int:
    """How much one payer's network or organisation may have paid one node of public money.

    ``floor_units`` is granted to every pair: the first payer of a node is all of its income.
    """
    return max(floor_units, subsidised_income * PAIR_CAP_PERMILLE // PERMILLE)


def expired_credit(balance: int, earned_lately: int) -> int:
    """What is left of credit older than a year, when the oldest is spent first."""
    return max(0, balance - earned_lately)


def split_back(amount: int, sources: Mapping[str, int]) -> dict[str, int]:
    """Divide ``amount`` by the sizes of ``sources``, whole: the first ones get the remainders."""
    total = sum(sources.values())
    parts = {name: amount * size // total for name, size in sources.items()}
    rest = amount - sum(parts.values())
    for name in sorted(sources)[:rest]:
        parts[name] += 1
    return {name: part for name, part in parts.items() if part}
