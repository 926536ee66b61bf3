"""Orders to the books: money made and repaired by two of three keys, models, members, adapters.

An order is taken once: its number (or the hash of what was signed) is kept. Entries of models,
organisations and members replace those before and are signed by the operator.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import sha256
from typing import TypeVar

from swarm.ledger.events import ACCOUNT, MINT, Event, budget
from swarm.ledger.rules import AdapterTerms
from swarm.operator.journal import Journal
from swarm.operator.policy import Policy
from swarm.protocol.envelope import Envelope, parse_envelope
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.identity import check_public_key, public_key_from_peer_id
from swarm.protocol.ledger_objects import MAX_CLOCK_SKEW_S, parse, payload_type
from swarm.protocol.operator_objects import (
    ORDER_LIFETIME_S,
    AdapterTermsEntry,
    Compensation,
    MemberEntry,
    MintOrder,
    ModelPrice,
    OrganisationEntry,
)

E = TypeVar("E", ModelPrice, OrganisationEntry, MemberEntry)
MINT_SIGNATURES = 2
BUDGET_NAME = re.compile("[a-z0-9-]{1,32}")


def take_order(journal: Journal, policy: Policy, sealed: Envelope, now: int) -> int:
    """Do what a signed order says; returns the index of its event.

    Raises ProtocolError: BAD_SIGNATURE, NOT_VALID_NOW for an old one, EQUIVOCATION for one that was
    taken before, OVER_LIMIT if the money is not there, BAD_FIELD for an order of no known kind.
    """
    handlers: dict[str, Callable[[Journal, Policy, Envelope, int], int]] = {
        payload_type(MintOrder): _mint,
        payload_type(Compensation): _compensate,
        payload_type(ModelPrice): _model,
        payload_type(OrganisationEntry): _organisation,
        payload_type(MemberEntry): _member,
        payload_type(AdapterTermsEntry): _adapter,
    }
    handler = handlers.get(sealed.payload_type)
    if handler is None:
        raise ProtocolError(ErrorCode.BAD_FIELD, "an order of unknown kind")
    with journal.transaction():
        return handler(journal, policy, sealed, now)


def adapter_terms(journal: Journal, adapter: str) -> AdapterTerms | None:
    row = journal.db.execute("SELECT terms FROM adapter WHERE adapter = ?", (adapter,)).fetchone()
    return _parsed_terms(parse(AdapterTermsEntry, parse_envelope(row[0]))) if row else None


def _mint(journal: Journal, policy: Policy, sealed: Envelope, now: int) -> int:
    order = parse(MintOrder, sealed)
    _require_mint_keys(policy, sealed)
    _once(journal, order.order, order.log, order.unix_s, policy, now)
    if not BUDGET_NAME.fullmatch(order.budget) or order.amount_units == 0:
        raise ProtocolError(ErrorCode.BAD_FIELD, "no such budget, or nothing to mint")
    amount = order.amount_units
    postings = ((MINT, -amount), (budget(order.budget), amount))
    # the order itself is in the log: whoever replays it sees who made the money
    return journal.post(
        Event("mint", f"mint:{order.order}", now, postings, {"order": sealed.to_json()})
    )


def _compensate(journal: Journal, policy: Policy, sealed: Envelope, now: int) -> int:
    order = parse(Compensation, sealed)
    _require_mint_keys(policy, sealed)
    _once(journal, order.order, order.log, order.unix_s, policy, now)
    if (
        MINT in (order.source, order.target)
        or order.source == order.target
        or not ACCOUNT.fullmatch(order.source)
        or not ACCOUNT.fullmatch(order.target)
        or order.source.startswith(("hold", "escrow"))
        or order.target.startswith(("hold", "escrow"))
        or order.amount_units == 0
    ):
        raise ProtocolError(ErrorCode.BAD_FIELD, "not between two accounts that one may repair")
    if journal.index_of(order.event) is None:
        raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "there is no such event to repair")
    postings = ((order.source, -order.amount_units), (order.target, order.amount_units))
    detail = {"order": sealed.to_json()}
    return journal.post(Event("compensate", f"compensate:{order.order}", now, postings, detail))


def _model(journal: Journal, policy: Policy, sealed: Envelope, now: int) -> int:
    entry = _entry(journal, policy, ModelPrice, sealed, now)
    if entry.blocks == 0 or entry.mflop_per_block_token == 0:
        raise ProtocolError(ErrorCode.BAD_FIELD, "a model without blocks or without price")
    journal.db.execute(
        "INSERT OR REPLACE INTO model VALUES (?, ?, ?)",
        (entry.model, entry.blocks, entry.mflop_per_block_token),
    )
    return _note(journal, "model", sealed, now)


def _organisation(journal: Journal, policy: Policy, sealed: Envelope, now: int) -> int:
    entry = _entry(journal, policy, OrganisationEntry, sealed, now)
    key = bytes.fromhex(entry.key)
    check_public_key(key)
    if not entry.organisation:
        raise ProtocolError(ErrorCode.BAD_FIELD, "an organisation has a name")
    journal.db.execute(
        "INSERT OR REPLACE INTO organisation VALUES (?, ?, ?)",
        (entry.organisation, key, entry.may_validate),
    )
    return _note(journal, "organisation", sealed, now)


def _member(journal: Journal, policy: Policy, sealed: Envelope, now: int) -> int:
    entry = _entry(journal, policy, MemberEntry, sealed, now)
    public_key_from_peer_id(entry.account)
    if not BUDGET_NAME.fullmatch(entry.budget):
        raise ProtocolError(ErrorCode.BAD_FIELD, "no such budget")
    journal.db.execute(
        "INSERT OR REPLACE INTO member VALUES (?, ?, ?, ?)",
        (entry.account, entry.budget, entry.daily_units, entry.organisation),
    )
    return _note(journal, "member", sealed, now)


def _adapter(journal: Journal, policy: Policy, sealed: Envelope, now: int) -> int:
    """Terms of an adapter, signed by its author; they do not change once they are known."""
    entry = parse(AdapterTermsEntry, sealed)
    sealed.require_signatures(public_key_from_peer_id(entry.author))
    terms = _parsed_terms(entry)
    if not terms.is_acceptable():
        raise ProtocolError(ErrorCode.BAD_FIELD, "terms that would not add up")
    for payee, _ in terms.payees:
        public_key_from_peer_id(payee)
    if journal.db.execute("SELECT 1 FROM adapter WHERE adapter = ?", (entry.adapter,)).fetchone():
        raise ProtocolError(ErrorCode.EQUIVOCATION, "the adapter has terms already")
    journal.db.execute("INSERT INTO adapter VALUES (?, ?)", (entry.adapter, sealed.to_json()))
    return _note(journal, "adapter", sealed, now)


def _entry(journal: Journal, policy: Policy, kind: type[E], sealed: Envelope, now: int) -> E:
    """An entry that the operator has signed lately, once."""
    entry = parse(kind, sealed)
    sealed.require_signatures(policy.operator_key)
    _once(journal, sha256(sealed.payload).hexdigest(), policy.origin, entry.unix_s, policy, now)
    return entry


def _once(journal: Journal, order: str, log: str, unix_s: int, policy: Policy, now: int) -> None:
    if log != policy.origin:
        raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "the order is for another log")
    if not now - ORDER_LIFETIME_S <= unix_s <= now + MAX_CLOCK_SKEW_S:
        raise ProtocolError(ErrorCode.NOT_VALID_NOW, "the order is too old, or not valid yet")
    if journal.db.execute("SELECT 1 FROM used_order WHERE id = ?", (order,)).fetchone():
        raise ProtocolError(ErrorCode.EQUIVOCATION, "the order was taken before")
    journal.db.execute("INSERT INTO used_order VALUES (?)", (order,))


def _require_mint_keys(policy: Policy, sealed: Envelope) -> None:
    if len(sealed.signers() & policy.mint_keys) < MINT_SIGNATURES:
        raise ProtocolError(ErrorCode.BAD_SIGNATURE, "two of the mint keys must sign")


def _note(journal: Journal, kind: str, sealed: Envelope, now: int) -> int:
    """The signed entry itself becomes the leaf's content; it holds no personal data."""
    event_id = f"{kind}:{sha256(sealed.payload).hexdigest()}"
    return journal.post(Event(kind, event_id, now, (), {"entry": sealed.to_json()}))


def _parsed_terms(entry: AdapterTermsEntry) -> AdapterTerms:
    return AdapterTerms(entry.royalty_permille, _shares(entry.payees), _shares(entry.parents))


def _shares(text: str) -> tuple[tuple[str, int], ...]:
    """``NAME:BASISPOINTS,...``. Raises ProtocolError(BAD_FIELD)."""
    shares = []
    for part in text.split(",") if text else ():
        name, _, points = part.partition(":")
        if not (name and points.isascii() and points.isdigit() and len(points) <= 5):
            raise ProtocolError(ErrorCode.BAD_FIELD, "not a list of shares")
        shares.append((name, int(points)))
    return tuple(shares)
