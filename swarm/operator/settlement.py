"""Settlement: a node presents vouchers, and is paid what it was not paid before.

Everything happens in one transaction, and depends only on what was ever presented, not on order or
repetition: a channel (allowance, node, session) is worth its dearest genuine voucher, and what was
paid for it rises towards that within the limits of its allowance. Presenting a voucher again pays
nothing. Vouchers that contradict each other are kept as evidence; the dearer one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any

from swarm.ledger.events import FEE, HOLDS, Event, Posting, escrow, user
from swarm.ledger.rules import (
    DAY_S,
    PAIR_WINDOW_S,
    escrow_part,
    fee,
    is_eligible,
    is_vetted,
    pair_limit,
    royalties,
    split_back,
)
from swarm.operator import nodes
from swarm.operator.journal import Journal
from swarm.operator.policy import SUBSIDISED, Policy
from swarm.operator.registry import adapter_terms
from swarm.protocol.envelope import Envelope, parse_envelope
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.identity import public_key_from_peer_id
from swarm.protocol.ledger_objects import (
    ANONYMOUS,
    MAX_CLOCK_SKEW_S,
    Settlement,
    Voucher,
    parse,
    verified,
)
from swarm.protocol.merkle import leaf_hash, root_of
from swarm.protocol.prices import price_table

MAX_VOUCHERS = 256
"""In one settlement: so many fit into one request and one short transaction."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one voucher: what it was paid now, and why not (more)."""

    paid_units: int = 0
    code: ErrorCode | None = None


@dataclass(slots=True)
class _Batch:
    """What one transaction adds up."""

    node: str
    organisation: str
    registered_unix_s: int
    payout: str
    vetted: bool
    now: int
    by_source: dict[str, int] = field(default_factory=dict)
    by_adapter: dict[str, int] = field(default_factory=dict)
    fees: int = 0
    subsidised: int = 0
    block_tokens: int = 0
    millitokens: int = 0
    channels: list[str] = field(default_factory=list)
    allowances: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, tuple[int, int]] = field(default_factory=dict)
    widest: tuple[int, str] = (0, "")


def settle(
    journal: Journal, policy: Policy, sealed: Envelope, vouchers: Sequence[Envelope], now: int
) -> list[Outcome]:
    """Pay a node for its vouchers; one outcome for each.

    Raises ProtocolError when the settlement itself is not right: BAD_SIGNATURE, BAD_PROOF for other
    vouchers than it names, FOREIGN_OBJECT for a node that is not enrolled or was revoked.
    """
    settlement = parse(Settlement, sealed)
    sealed.require_signatures(public_key_from_peer_id(settlement.node))
    if len(vouchers) > MAX_VOUCHERS:
        raise ProtocolError(ErrorCode.TOO_LARGE, "too many vouchers for one settlement")
    root = root_of([leaf_hash(voucher.payload) for voucher in vouchers])
    if (len(vouchers), root.hex()) != (settlement.vouchers, settlement.vouchers_root):
        raise ProtocolError(ErrorCode.BAD_PROOF, "these are other vouchers than were signed for")
    if settlement.window_end_unix_s > now + MAX_CLOCK_SKEW_S:
        raise ProtocolError(ErrorCode.NOT_VALID_NOW, "the window lies in the future")
    with journal.transaction():
        batch = _open(journal, settlement.node, now)
        outcomes = [_pay(journal, policy, batch, voucher) for voucher in vouchers]
        if batch.by_source:
            _post(journal, batch, settlement)
    return outcomes


def _open(journal: Journal, node: str, now: int) -> _Batch:
    row = journal.db.execute(
        "SELECT organisation, registered_unix_s, state, payout, clean_audits,"
        " certified_until_unix_s FROM node WHERE node = ?",
        (node,),
    ).fetchone()
    if row is None or row[2] == nodes.REVOKED:
        raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "the node is not enrolled")
    organisation, registered, state, payout, clean_audits, certified_until = row
    vetted = state == nodes.ACTIVE and is_vetted(
        certified=certified_until > now,
        clean_audits=clean_audits,
        registered_for_s=now - registered,
    )
    return _Batch(node, organisation, registered, payout, vetted, now)


def _pay(journal: Journal, policy: Policy, batch: _Batch, sealed: Envelope) -> Outcome:
    try:
        voucher = parse(Voucher, sealed)
        allowance = _allowance(journal, batch, voucher)
        verified(Voucher, sealed, allowance["voucher_key"])
        _check_terms(policy, batch, voucher, allowance)
        value = _value(journal, batch, voucher, allowance)
        return _raise_channel(journal, policy, batch, voucher, sealed, allowance, value)
    except ProtocolError as error:
        return Outcome(0, error.code)


def _allowance(journal: Journal, batch: _Batch, voucher: Voucher) -> dict[str, Any]:
    """The allowance's row, as this transaction has changed it so far."""
    known = batch.allowances.get(voucher.serial)
    if known is None:
        row = journal.db.execute(
            "SELECT voucher_key, class, source, payer, organisation, maximum, per_node, used,"
            " price_epoch, route_seed, issued_unix_s, expires_unix_s, is_open,"
            " (SELECT COALESCE(SUM(paid), 0) FROM channel WHERE serial = allowance.serial"
            " AND node = ?) FROM allowance WHERE serial = ?",
            (batch.node, voucher.serial),
        ).fetchone()
        if row is None:
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "no allowance of this operator")
        names = (
            "voucher_key", "class", "source", "payer", "organisation", "maximum", "per_node",
            "used", "price_epoch", "route_seed", "issued_unix_s", "expires_unix_s", "is_open",
            "used_here",
        )  # fmt: skip
        known = batch.allowances[voucher.serial] = dict(zip(names, row, strict=True))
    return known


def _check_terms(
    policy: Policy, batch: _Batch, voucher: Voucher, allowance: dict[str, Any]
) -> None:
    if voucher.node != batch.node:
        raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "the voucher is another node's")
    if not allowance["is_open"] or batch.now > allowance["expires_unix_s"] + policy.grace_s:
        raise ProtocolError(ErrorCode.NOT_VALID_NOW, "the allowance settles no more")
    if voucher.unix_s > allowance["expires_unix_s"] + MAX_CLOCK_SKEW_S:
        raise ProtocolError(ErrorCode.NOT_VALID_NOW, "signed after the allowance had ended")
    if allowance["class"] in SUBSIDISED and (
        not is_eligible(allowance["route_seed"], batch.node)
        or batch.registered_unix_s > allowance["issued_unix_s"] - policy.minimum_node_age_s
        or (batch.organisation and batch.organisation == allowance["organisation"])
    ):
        raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "not drawn for this public money")


def _value(journal: Journal, batch: _Batch, voucher: Voucher, allowance: dict[str, Any]) -> int:
    """What the voucher's work costs."""
    blocks, mflop = batch.models.get(voucher.model) or _model(journal, batch, voucher.model)
    if not voucher.first_block < voucher.end_block <= blocks:
        raise ProtocolError(ErrorCode.BAD_FIELD, "the model has no such blocks")
    table = price_table(allowance["price_epoch"])
    width = voucher.end_block - voucher.first_block
    return table.units(voucher.work, blocks=width, mflop_per_block_token=mflop)


def _model(journal: Journal, batch: _Batch, model: str) -> tuple[int, int]:
    row = journal.db.execute("SELECT blocks, mflop FROM model WHERE model = ?", (model,)).fetchone()
    if row is None:
        raise ProtocolError(ErrorCode.UNKNOWN_MODEL, "the model has no price here")
    batch.models[model] = row
    return row[0], row[1]


def _raise_channel(
    journal: Journal,
    policy: Policy,
    batch: _Batch,
    voucher: Voucher,
    sealed: Envelope,
    allowance: dict[str, Any],
    value: int,
) -> Outcome:
    """Bring the channel to the voucher's value, as far as there is money for it."""
    key = (voucher.serial, batch.node, voucher.session)
    row = journal.db.execute(
        "SELECT value, paid, voucher FROM channel WHERE serial = ? AND node = ? AND session = ?",
        key,
    ).fetchone()
    code = None
    best, paid, tokens_before = value, 0, 0
    if row is not None:
        known_value, paid, known = row
        earlier = parse_envelope(known)
        if earlier.payload != sealed.payload:
            before = parse(Voucher, earlier)
            tokens_before = _tokens(before)
            code = _conflict(before, voucher)
            if code is not None:
                _keep(journal, code.name, key, known, sealed.to_json(), batch.now)
            if code is ErrorCode.FOREIGN_OBJECT:
                raise ProtocolError(code, "the session has other blocks or another adapter")
        else:
            tokens_before = _tokens(voucher)
        best = max(value, known_value)
    due = best - paid
    granted = min(due, _room(journal, policy, batch, allowance))
    if due > granted and code is None:
        code = ErrorCode.OVER_LIMIT
        if allowance["used"] + due > allowance["maximum"]:
            _over_issued(journal, allowance, key, sealed, batch.now)
    if row is None or value > row[0]:
        journal.db.execute(
            "INSERT OR REPLACE INTO channel VALUES (?, ?, ?, ?, ?, ?, ?)",
            (*key, voucher.sequence, value, paid + granted, sealed.to_json()),
        )
    elif granted:
        journal.db.execute(
            "UPDATE channel SET paid = ? WHERE serial = ? AND node = ? AND session = ?",
            (paid + granted, *key),
        )
    if granted:
        _count(journal, batch, voucher, allowance, granted, _tokens(voucher) - tokens_before)
        batch.channels.append(":".join((*key, str(paid + granted))))
    return Outcome(granted, code)


def _conflict(before: Voucher, now: Voucher) -> ErrorCode | None:
    """How two different vouchers of a channel contradict each other, if they do."""
    same = ("model", "first_block", "end_block", "adapter")
    if any(getattr(before, name) != getattr(now, name) for name in same):
        return ErrorCode.FOREIGN_OBJECT
    if before.sequence == now.sequence:
        return ErrorCode.EQUIVOCATION
    early, late = (before, now) if before.sequence < now.sequence else (now, before)
    return None if late.work.covers(early.work) else ErrorCode.ROLLED_BACK


def _room(journal: Journal, policy: Policy, batch: _Batch, allowance: dict[str, Any]) -> int:
    """What the allowance still has for this node."""
    room: int = min(
        allowance["maximum"] - allowance["used"], allowance["per_node"] - allowance["used_here"]
    )
    if allowance["class"] in SUBSIDISED:
        since = (batch.now - PAIR_WINDOW_S) // DAY_S
        income, of_pair = journal.db.execute(
            "SELECT COALESCE(SUM(units), 0), COALESCE(SUM(units) FILTER (WHERE payer = ?), 0)"
            " FROM pair WHERE node = ? AND day >= ?",
            (allowance["organisation"] or allowance["payer"], batch.node, since),
        ).fetchone()
        room = min(room, pair_limit(income, policy.pair_floor_units) - of_pair)
    return max(0, room)


def _count(
    journal: Journal,
    batch: _Batch,
    voucher: Voucher,
    allowance: dict[str, Any],
    granted: int,
    tokens: int,
) -> None:
    allowance["used"] += granted
    allowance["used_here"] += granted
    journal.db.execute(
        "UPDATE allowance SET used = used + ? WHERE serial = ?", (granted, voucher.serial)
    )
    source = allowance["source"]
    batch.by_source[source] = batch.by_source.get(source, 0) + granted
    batch.fees += fee(granted, price_table(allowance["price_epoch"]).fee_permille)
    if voucher.adapter:
        batch.by_adapter[voucher.adapter] = batch.by_adapter.get(voucher.adapter, 0) + granted
    blocks = batch.models[voucher.model][0]
    width = voucher.end_block - voucher.first_block
    batch.block_tokens += max(0, tokens) * width
    batch.millitokens += max(0, tokens) * width * 1000 // blocks
    batch.widest = max(batch.widest, (width * 10**6 // blocks, voucher.model))
    if allowance["class"] in SUBSIDISED:
        batch.subsidised += granted
        journal.db.execute(
            "INSERT INTO pair VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET units = units + excluded.units",
            (
                batch.node,
                allowance["organisation"] or allowance["payer"],
                batch.now // DAY_S,
                granted,
            ),
        )


def _post(journal: Journal, batch: _Batch, settlement: Settlement) -> None:
    """One event for the batch: holds pay the fee, the adapters' payees, and the node."""
    total = sum(batch.by_source.values())
    to_payees: dict[str, int] = {}
    terms = partial(adapter_terms, journal)
    for adapter, amount in batch.by_adapter.items():
        for payee, units in royalties(amount, adapter, terms).items():
            to_payees[payee] = to_payees.get(payee, 0) + units
    earned = total - batch.fees - sum(to_payees.values())
    waiting = escrow_part(earned, vetted=batch.vetted)
    amounts: dict[str, int] = {HOLDS: -total, FEE: batch.fees, escrow(batch.node): waiting}
    for payee, units in ((batch.payout, earned - waiting), *to_payees.items()):
        amounts[user(payee)] = amounts.get(user(payee), 0) + units
    postings: tuple[Posting, ...] = tuple(item for item in amounts.items() if item[1])
    channels = sha256("\n".join(sorted(batch.channels)).encode()).hexdigest()
    detail = {
        "node": batch.node,
        "window_start": settlement.window_start_unix_s,
        "window_end": settlement.window_end_unix_s,
        "vouchers": len(batch.channels),
        "vouchers_root": settlement.vouchers_root,
        "feed_length": settlement.feed_length,
        "feed_head": settlement.feed_head,
        "paid": total,
        "subsidised": batch.subsidised,
        "block_tokens": batch.block_tokens,
        "millitokens": batch.millitokens,
    }
    index = journal.post(
        Event("settlement", f"settle:{batch.node}:{channels}", batch.now, postings, detail)
    )
    for name in ("paid", "block_tokens", "millitokens"):
        journal.add_to_meta(name, int(str(detail[name])))
    if waiting:
        journal.db.executemany(
            "INSERT INTO lot VALUES (?, ?, ?, ?, ?)",
            [
                (batch.node, batch.now, index, source, units)
                for source, units in split_back(waiting, batch.by_source).items()
            ],
        )
    journal.db.execute(
        "UPDATE node SET span_millionths = ?, model = ?, settled_unix_s = ?,"
        " earned_units = earned_units + ? WHERE node = ?",
        (*batch.widest, batch.now, earned, batch.node),
    )


def _tokens(voucher: Voucher) -> int:
    return voucher.prefill_tokens + voucher.decode_tokens + voucher.backward_tokens


def _keep(
    journal: Journal, kind: str, key: tuple[str, str, str], first: str, second: str, now: int
) -> None:
    """Both signed objects, whole: anybody can check what they show."""
    journal.db.execute(
        "INSERT OR IGNORE INTO evidence VALUES (?, ?, ?, ?, ?, ?, ?)",
        (kind, *key, first, second, now),
    )


def _over_issued(
    journal: Journal,
    allowance: dict[str, Any],
    key: tuple[str, str, str],
    sealed: Envelope,
    now: int,
) -> None:
    """The client has signed for more than it was given: no further allowance for its account.

    Networks are not suspended: others in them have done nothing, and their share is small.
    """
    (issued,) = journal.db.execute(
        "SELECT envelope FROM allowance WHERE serial = ?", (key[0],)
    ).fetchone()
    _keep(journal, ErrorCode.OVER_LIMIT.name, key, issued, sealed.to_json(), now)
    if allowance["class"] != ANONYMOUS:
        journal.db.execute(
            "INSERT OR IGNORE INTO suspension VALUES (?, ?)", (allowance["payer"], "over-issue")
        )
