"""What is signed towards an operator: requests for allowances, enrolments, orders to its books.

==================  ==========================  =================================================
object              signed by                   says
==================  ==========================  =================================================
AllowanceRequest    the account, if any         reserve so much for this voucher key
Enrolment           the node                    this node exists, and who gets its earnings
NodeCertificate     an organisation             this node is ours
MintOrder           two of three mint keys      make so much, for this budget
Compensation        two of three mint keys      move so much between two accounts, and why
ModelPrice          the operator                what a block of this model costs
OrganisationEntry   the operator                who may certify nodes, and validate
MemberEntry         the operator                who may draw on a budget, and how much a day
AdapterTermsEntry   the adapter's author        who gets what when it is used
==================  ==========================  =================================================

They are objects like those in `ledger_objects`, signed and parsed in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarm.protocol.ledger_objects import (
    ALLOWANCE_CLASSES,
    HASH_BYTES,
    KEY_BYTES,
    MAX_ALLOWANCE_S,
    SERIAL_BYTES,
    SignedObject,
)
from swarm.protocol.messages import MAX_BLOCKS
from swarm.protocol.strict_json import choice, hexadecimal, text, unsigned

ORDER_LIFETIME_S = 24 * 3600
"""An order that is older than this is refused; a repetition within it is known by its number."""


@dataclass(frozen=True, slots=True)
class AllowanceRequest(SignedObject):
    """Signed by the key of ``account``; by the voucher key where ``account`` is empty."""

    NAME = "allowance-request"
    request: str = hexadecimal(SERIAL_BYTES)
    """Fresh; a repetition gets the same allowance again."""
    account: str = text(64)
    voucher_key: str = hexadecimal(KEY_BYTES)
    allowance_class: str = choice(*ALLOWANCE_CLASSES)
    budget: str = text(32)
    """For the classes that draw on a budget."""
    maximum_units: int = unsigned()
    lifetime_s: int = unsigned(MAX_ALLOWANCE_S)
    unix_s: int = unsigned()


@dataclass(frozen=True, slots=True)
class Enrolment(SignedObject):
    """``payout`` is the peer id whose account gets the earnings; may be the node's own."""

    NAME = "enrolment"
    node: str = text(64)
    payout: str = text(64)
    organisation: str = text(64)
    """Whose certificate follows; empty for a volunteer."""
    sequence: int = unsigned()
    """Higher than that of the node's enrolment before."""
    unix_s: int = unsigned()


@dataclass(frozen=True, slots=True)
class NodeCertificate(SignedObject):
    NAME = "node-certificate"
    node: str = text(64)
    organisation: str = text(64)
    not_before_unix_s: int = unsigned()
    expires_unix_s: int = unsigned()


@dataclass(frozen=True, slots=True)
class MintOrder(SignedObject):
    NAME = "mint-order"
    order: str = hexadecimal(SERIAL_BYTES)
    log: str = text(128)
    """Origin of the log that it is for."""
    budget: str = text(32)
    amount_units: int = unsigned()
    reason: str = text(200)
    unix_s: int = unsigned()


@dataclass(frozen=True, slots=True)
class Compensation(SignedObject):
    NAME = "compensation"
    order: str = hexadecimal(SERIAL_BYTES)
    log: str = text(128)
    event: str = text(200)
    """Id of the event that is repaired."""
    source: str = text(80)
    target: str = text(80)
    amount_units: int = unsigned()
    reason: str = text(200)
    unix_s: int = unsigned()


@dataclass(frozen=True, slots=True)
class ModelPrice(SignedObject):
    NAME = "model-price"
    model: str = hexadecimal(HASH_BYTES)
    blocks: int = unsigned(MAX_BLOCKS)
    mflop_per_block_token: int = unsigned(1 << 31)
    unix_s: int = unsigned()


@dataclass(frozen=True, slots=True)
class OrganisationEntry(SignedObject):
    NAME = "organisation-entry"
    organisation: str = text(64)
    key: str = hexadecimal(KEY_BYTES)
    may_validate: int = unsigned(1)
    unix_s: int = unsigned()


@dataclass(frozen=True, slots=True)
class MemberEntry(SignedObject):
    NAME = "member-entry"
    account: str = text(64)
    budget: str = text(32)
    daily_units: int = unsigned()
    organisation: str = text(64)
    unix_s: int = unsigned()


@dataclass(frozen=True, slots=True)
class AdapterTermsEntry(SignedObject):
    """``payees`` and ``parents`` are lists ``NAME:BASISPOINTS`` separated by commas."""

    NAME = "adapter-terms"
    adapter: str = hexadecimal(HASH_BYTES)
    author: str = text(64)
    royalty_permille: int = unsigned(1000)
    payees: str = text(640)
    parents: str = text(320)
    unix_s: int = unsigned()
