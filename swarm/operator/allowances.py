"""Allowances: money reserved for a client's voucher key, and given back when its time is over.

A reservation and its allowance are one transaction. The log says which account reserved how much,
never under which serial: nodes know serials, and must not learn accounts from the log.
"""

from __future__ import annotations

import secrets
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.ledger.events import HOLDS, Event, budget, user
from swarm.ledger.rules import beacon_of, route_seed
from swarm.operator.journal import Journal
from swarm.operator.policy import SUBSIDISED, Policy
from swarm.protocol.envelope import Envelope, parse_envelope
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.identity import public_key_from_peer_id
from swarm.protocol.ledger_objects import (
    ANONYMOUS,
    AUDIT,
    FUNDED,
    LOCAL,
    MAX_ALLOWANCE_S,
    MAX_CLOCK_SKEW_S,
    MEMBER,
    SERIAL_BYTES,
    Allowance,
    parse,
    sign,
)
from swarm.protocol.operator_objects import AllowanceRequest
from swarm.protocol.prices import CURRENT_EPOCH

DAY_S = 24 * 3600
VALIDITY_STEP_S = 600
WIDE_NETWORKS = 16
"""So many times more than a network gets the one around it."""


def issue(
    journal: Journal,
    policy: Policy,
    key: Ed25519PrivateKey,
    sealed: Envelope,
    networks: tuple[str, str],
    now: int,
) -> Envelope:
    """The signed allowance for a request; for a repeated request the same as before.

    ``networks`` names where the request came from, narrow and wide. Raises ProtocolError:
    BAD_SIGNATURE, NOT_VALID_NOW, FOREIGN_OBJECT for who is no member or suspended, OVER_LIMIT.
    """
    request = parse(AllowanceRequest, sealed)
    signer = public_key_from_peer_id(request.account) if request.account else None
    sealed.require_signatures(signer or bytes.fromhex(request.voucher_key))
    if abs(now - request.unix_s) > MAX_CLOCK_SKEW_S:
        raise ProtocolError(ErrorCode.NOT_VALID_NOW, "the request is old, or a clock is wrong")
    request_id = sha256(sealed.payload).hexdigest()
    with journal.transaction() as db:
        row = db.execute(
            "SELECT envelope FROM allowance WHERE request = ?", (request_id,)
        ).fetchone()
        if row:
            return parse_envelope(row[0])
        source, payer, organisation = _payer(journal, policy, request, networks, now)
        if db.execute("SELECT 1 FROM suspension WHERE payer = ?", (payer,)).fetchone():
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "the payer is suspended")
        if request.maximum_units < policy.nodes_per_allowance or request.lifetime_s == 0:
            raise ProtocolError(ErrorCode.BAD_FIELD, "an allowance that is too small to use")
        serial = secrets.token_hex(SERIAL_BYTES)
        seed = (
            route_seed(
                _beacon(journal, now), serial, _replicas(journal, now), policy.eligible_nodes
            )
            if request.allowance_class in SUBSIDISED
            else b""
        )
        begins, ends = _validity(now, request.lifetime_s)
        allowance = Allowance(
            serial=serial,
            voucher_key=request.voucher_key,
            maximum_units=request.maximum_units,
            per_node_units=request.maximum_units // policy.nodes_per_allowance,
            not_before_unix_s=begins,
            expires_unix_s=ends,
            # A node must not know a challenge by what pays for it.
            allowance_class=FUNDED if request.allowance_class == AUDIT else request.allowance_class,
            price_epoch=CURRENT_EPOCH,
            route_seed=seed.hex(),
        )
        envelope = sign(allowance, key)
        db.execute(
            "INSERT INTO allowance (serial, request, envelope, class, source, payer, organisation,"
            " voucher_key, maximum, per_node, price_epoch, route_seed, issued_unix_s,"
            " not_before_unix_s, expires_unix_s) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                serial,
                request_id,
                envelope.to_json(),
                request.allowance_class,
                source,
                payer,
                organisation,
                bytes.fromhex(allowance.voucher_key),
                allowance.maximum_units,
                allowance.per_node_units,
                allowance.price_epoch,
                seed,
                now,
                allowance.not_before_unix_s,
                allowance.expires_unix_s,
            ),
        )
        amount = allowance.maximum_units
        postings = ((source, -amount), (HOLDS, amount))
        detail = {"class": request.allowance_class}
        journal.post(
            Event("allowance", _hidden(journal, "allowance", serial), now, postings, detail)
        )
    return envelope


def _validity(now: int, lifetime_s: int) -> tuple[int, int]:
    """From when to when, in round numbers: nodes see them, and the log has the second at which each
    account reserved something. The exact one would name the account."""
    begins = now - now % VALIDITY_STEP_S
    ends = -(-(now + lifetime_s) // VALIDITY_STEP_S) * VALIDITY_STEP_S
    return begins, min(ends, begins + MAX_ALLOWANCE_S)


def release_expired(journal: Journal, policy: Policy, now: int, limit: int = 1000) -> int:
    """Give back what is left of allowances that settle no more; returns how many were closed."""
    with journal.transaction() as db:
        rows = db.execute(
            "SELECT serial, source, maximum - used FROM allowance"
            " WHERE is_open AND expires_unix_s + ? < ? LIMIT ?",
            (policy.grace_s, now, limit),
        ).fetchall()
        for serial, source, left in rows:
            db.execute("UPDATE allowance SET is_open = 0 WHERE serial = ?", (serial,))
            if left:
                postings = ((HOLDS, -left), (source, left))
                journal.post(Event("release", _hidden(journal, "release", serial), now, postings))
    return len(rows)


def _payer(
    journal: Journal,
    policy: Policy,
    request: AllowanceRequest,
    networks: tuple[str, str],
    now: int,
) -> tuple[str, str, str]:
    """Whose money it is, who is held to account for it, and the organisation behind them."""
    account, wanted = request.account, request.allowance_class
    if wanted == LOCAL or (wanted == ANONYMOUS) != (account == ""):
        raise ProtocolError(ErrorCode.BAD_FIELD, "this class is not issued in this way")
    if wanted == FUNDED:
        return user(account), account, _organisation_of(journal, account)
    if wanted == MEMBER:
        return _member(journal, request, now)
    if wanted == AUDIT:
        if not _validates(journal, account):
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "the account is no validator's")
        return budget(policy.audit_budget), account, ""
    if request.maximum_units > policy.anonymous_units:
        raise ProtocolError(ErrorCode.OVER_LIMIT, "more than an anonymous user gets")
    narrow, wide = networks
    daily = policy.anonymous_daily_units
    _take(journal, narrow, request.maximum_units, daily, now)
    _take(journal, wide, request.maximum_units, WIDE_NETWORKS * daily, now)
    return budget(policy.public_budget), narrow, ""


def _member(journal: Journal, request: AllowanceRequest, now: int) -> tuple[str, str, str]:
    row = journal.db.execute(
        "SELECT daily_units, organisation FROM member WHERE account = ? AND budget = ?",
        (request.account, request.budget),
    ).fetchone()
    if row is None:
        raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "the account may not draw on this budget")
    daily, organisation = row
    (drawn,) = journal.db.execute(
        "SELECT COALESCE(SUM(maximum), 0) FROM allowance"
        " WHERE payer = ? AND source = ? AND issued_unix_s > ?",
        (request.account, budget(request.budget), now - DAY_S),
    ).fetchone()
    if drawn + request.maximum_units > daily:
        raise ProtocolError(ErrorCode.OVER_LIMIT, "the member has drawn its share of the day")
    return budget(request.budget), request.account, organisation


def _take(journal: Journal, network: str, units: int, daily: int, now: int) -> None:
    """A token bucket that fills in a day. Raises ProtocolError(OVER_LIMIT)."""
    row = journal.db.execute(
        "SELECT units, unix_s FROM bucket WHERE network = ?", (network,)
    ).fetchone()
    level, since = row or (daily, now)
    level = min(daily, level + daily * max(0, now - since) // DAY_S) - units
    if level < 0:
        raise ProtocolError(ErrorCode.OVER_LIMIT, "this network has drawn its share")
    journal.db.execute("INSERT OR REPLACE INTO bucket VALUES (?, ?, ?)", (network, level, now))


def _organisation_of(journal: Journal, account: str) -> str:
    row = journal.db.execute(
        "SELECT organisation FROM member WHERE account = ? AND organisation != ''", (account,)
    ).fetchone()
    if row is None:
        row = journal.db.execute(
            "SELECT organisation FROM node WHERE payout = ? AND organisation != ''", (account,)
        ).fetchone()
    return row[0] if row else ""


def _validates(journal: Journal, account: str) -> bool:
    key = public_key_from_peer_id(account)
    row = journal.db.execute(
        "SELECT 1 FROM organisation WHERE key = ? AND may_validate", (key,)
    ).fetchone()
    return row is not None


def _beacon(journal: Journal, now: int) -> bytes:
    """What this hour's draws depend on, fixed when the hour first needs it."""
    name = f"beacon:{now // 3600}"
    beacon = journal.meta(name)
    if beacon is None:
        row = journal.db.execute(
            "SELECT note FROM checkpoint WHERE COALESCE(cosigned_unix_s, unix_s) < ?"
            " ORDER BY cosigned_unix_s IS NULL, size DESC LIMIT 1",
            (now // 3600 * 3600,),
        ).fetchone()
        # before the first checkpoint there is nothing that a witness could have signed
        beacon = beacon_of([row[0].encode() if row else journal.tree.root()])
        journal.set_meta(name, beacon)
    return beacon


def _replicas(journal: Journal, now: int) -> int:
    """Nodes for a block of the model that has fewest, by what was settled in the last day."""
    row = journal.db.execute(
        "SELECT MIN(total) FROM (SELECT SUM(span_millionths) AS total FROM node"
        " WHERE state = 'active' AND settled_unix_s > ? GROUP BY model)",
        (now - DAY_S,),
    ).fetchone()
    return (row[0] or 0) // 10**6


def _hidden(journal: Journal, what: str, serial: str) -> str:
    """An event id that follows from a serial but does not give it away."""
    salt = journal.meta("salt")
    if salt is None:
        salt = secrets.token_bytes(32)
        journal.set_meta("salt", salt)
    return f"{what}:{sha256(salt + what.encode() + bytes.fromhex(serial)).hexdigest()}"
