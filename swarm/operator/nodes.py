"""Nodes at the operator: enrolment, escrow, and what audits do to them.

What a node earned waits in its escrow, as lots that remember who paid. Lots go to the node's
account in time; if validators prove that it cheated, they go back to who paid.
"""

from __future__ import annotations

from hashlib import sha256

from swarm.ledger.events import Event, budget, escrow, user
from swarm.ledger.rules import CREDIT_LIFETIME_S, ESCROW_S, expired_credit, is_vetted
from swarm.operator.journal import Journal
from swarm.operator.policy import Policy
from swarm.operator.uptime import note_probe
from swarm.protocol.envelope import Envelope
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.identity import peer_id_from_public_key, public_key_from_peer_id
from swarm.protocol.ledger_objects import (
    MAX_CLOCK_SKEW_S,
    Revocation,
    Rotation,
    Verdict,
    parse,
)
from swarm.protocol.operator_objects import Enrolment, NodeCertificate

ACTIVE, QUARANTINED, REVOKED = "active", "quarantined", "revoked"
FAILED_SEGMENTS = 2
"""Two different ones: errors on one odd input are correlated, and one is no proof."""
LISTED_NODES = 100


def enrol(journal: Journal, sealed: Envelope, certificate: Envelope | None, now: int) -> int | None:
    """Take in a node, or its newer word about itself; returns the event's index, if it is news.

    Raises ProtocolError: BAD_SIGNATURE, NOT_VALID_NOW, ROLLED_BACK for an older enrolment,
    FOREIGN_OBJECT for an organisation that has not certified it.
    """
    enrolment = parse(Enrolment, sealed)
    sealed.require_signatures(public_key_from_peer_id(enrolment.node))
    public_key_from_peer_id(enrolment.payout)
    if abs(now - enrolment.unix_s) > MAX_CLOCK_SKEW_S:
        raise ProtocolError(ErrorCode.NOT_VALID_NOW, "the enrolment is old, or a clock is wrong")
    with journal.transaction() as db:
        until = _certified_until(journal, enrolment, certificate, now)
        row = db.execute(
            "SELECT payout, organisation, sequence, state FROM node WHERE node = ?",
            (enrolment.node,),
        ).fetchone()
        if row is None:
            db.execute(
                "INSERT INTO node (node, payout, organisation, sequence, registered_unix_s,"
                " certified_until_unix_s) VALUES (?, ?, ?, ?, ?, ?)",
                (
                    enrolment.node,
                    enrolment.payout,
                    enrolment.organisation,
                    enrolment.sequence,
                    now,
                    until,
                ),
            )
        else:
            payout, organisation, sequence, state = row
            if state == REVOKED:
                raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "the node was revoked")
            if enrolment.sequence < sequence:
                raise ProtocolError(ErrorCode.ROLLED_BACK, "there is a newer enrolment")
            if enrolment.sequence == sequence and (payout, organisation) != (
                enrolment.payout,
                enrolment.organisation,
            ):
                raise ProtocolError(ErrorCode.EQUIVOCATION, "another enrolment has this number")
            db.execute(
                "UPDATE node SET payout = ?, organisation = ?, sequence = ?,"
                " certified_until_unix_s = ? WHERE node = ?",
                (
                    enrolment.payout,
                    enrolment.organisation,
                    enrolment.sequence,
                    until,
                    enrolment.node,
                ),
            )
            if (payout, organisation) == (enrolment.payout, enrolment.organisation):
                return None
        detail = {
            "node": enrolment.node,
            "payout": enrolment.payout,
            "organisation": enrolment.organisation,
        }
        event_id = f"enrol:{sha256(sealed.payload).hexdigest()}"
        return journal.post(Event("enrol", event_id, now, (), detail))


def _certified_until(
    journal: Journal, enrolment: Enrolment, certificate: Envelope | None, now: int
) -> int:
    if not enrolment.organisation:
        return 0
    row = journal.db.execute(
        "SELECT key FROM organisation WHERE organisation = ?", (enrolment.organisation,)
    ).fetchone()
    if row is None or certificate is None:
        raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "no certificate of a known organisation")
    certificate.require_signatures(row[0])
    stated = parse(NodeCertificate, certificate)
    if (stated.node, stated.organisation) != (enrolment.node, enrolment.organisation):
        raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "the certificate is another node's")
    if not stated.not_before_unix_s <= now <= stated.expires_unix_s:
        raise ProtocolError(ErrorCode.NOT_VALID_NOW, "the certificate is not valid now")
    return stated.expires_unix_s


def vest(journal: Journal, now: int, limit: int = 200) -> int:
    """Give nodes what has waited long enough; returns how many nodes got something."""
    rows = journal.db.execute(
        "SELECT node, payout, certified_until_unix_s, clean_audits, registered_unix_s FROM node"
        " WHERE state = ? AND EXISTS (SELECT 1 FROM lot WHERE lot.node = node.node"
        " AND settled_unix_s <= ?) LIMIT ?",
        (ACTIVE, now - ESCROW_S, limit),
    ).fetchall()
    vested = 0
    for node, payout, certified_until, clean_audits, registered in rows:
        if not is_vetted(
            certified=certified_until > now,
            clean_audits=clean_audits,
            registered_for_s=now - registered,
        ):
            continue
        with journal.transaction() as db:
            units, last = db.execute(
                "SELECT SUM(units), MAX(idx) FROM lot WHERE node = ? AND settled_unix_s <= ?",
                (node, now - ESCROW_S),
            ).fetchone()
            db.execute(
                "DELETE FROM lot WHERE node = ? AND settled_unix_s <= ?", (node, now - ESCROW_S)
            )
            postings = ((escrow(node), -units), (user(payout), units))
            journal.post(Event("vest", f"vest:{node}:{last}", now, postings, {"node": node}))
        vested += 1
    return vested


def take_verdict(journal: Journal, policy: Policy, sealed: Envelope, now: int) -> str:
    """What a validator found; returns the node's state after it.

    Each validating organisation counts once for a segment. Two failed segments freeze the escrow
    and keep the node out. What takes it: enough organisations that each found two failed segments
    by challenges of their own, or that have signed the same one. What gives it free: as many that
    say ``not_reproduced`` while it is kept out.
    """
    verdict = parse(Verdict, sealed)
    signers = sealed.signers()
    with journal.transaction() as db:
        validators: dict[bytes, str] = dict(
            db.execute("SELECT key, organisation FROM organisation WHERE may_validate").fetchall()
        )
        row = db.execute(
            "SELECT state, organisation FROM node WHERE node = ?", (verdict.node,)
        ).fetchone()
        if row is None or not signers <= validators.keys():
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "no validator, or no node of ours")
        state, organisation = row
        if organisation and organisation in {validators[key] for key in signers}:
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "nobody judges its own nodes")
        news = 0
        for key in signers:
            is_new = db.execute(
                "INSERT OR IGNORE INTO verdict VALUES (?, ?, ?, ?)",
                (verdict.segment, key, verdict.node, verdict.outcome),
            ).rowcount
            news += is_new
            if is_new and state == ACTIVE and verdict.outcome == "passed":
                note_probe(journal, verdict, validators[key], now)
        if not news or state == REVOKED:
            return str(state)
        if verdict.outcome == "passed":
            db.execute(
                "UPDATE node SET clean_audits = clean_audits + 1 WHERE node = ?", (verdict.node,)
            )
            return str(state)
        said = sha256(sealed.payload + b"".join(sorted(signers))).hexdigest()
        detail = {"verdict": sealed.to_json()}
        journal.post(Event("verdict", f"verdict:{said}", now, (), detail))
        if verdict.outcome == "failed":
            return _failed(journal, policy, verdict.node, state, now)
        return _not_reproduced(journal, policy, verdict.node, state)


def _failed(journal: Journal, policy: Policy, node: str, state: str, now: int) -> str:
    db = journal.db
    db.execute("UPDATE node SET clean_audits = 0 WHERE node = ?", (node,))
    db.execute("DELETE FROM probe WHERE node = ?", (node,))
    (segments, agreed) = db.execute(
        "SELECT COUNT(DISTINCT segment), MAX(signers) FROM (SELECT segment, COUNT(*) AS signers"
        " FROM verdict WHERE node = ? AND outcome = 'failed' GROUP BY segment)",
        (node,),
    ).fetchone()
    (certain,) = db.execute(
        "SELECT COUNT(*) FROM (SELECT organisation FROM verdict JOIN organisation ON key = signer"
        " WHERE node = ? AND outcome = 'failed' AND may_validate"
        " GROUP BY organisation HAVING COUNT(DISTINCT segment) >= ?)",
        (node, FAILED_SEGMENTS),
    ).fetchone()
    if segments >= FAILED_SEGMENTS:
        state = QUARANTINED
        if max(agreed, certain) >= policy.validators_to_decide:
            state = REVOKED
            _forfeit(journal, node, now)
        db.execute("UPDATE node SET state = ? WHERE node = ?", (state, node))
    return state


def _not_reproduced(journal: Journal, policy: Policy, node: str, state: str) -> str:
    """Bad memory or a bad driver, or a false accusation: it starts again, with nothing lost."""
    db = journal.db
    if state == QUARANTINED:
        (agreed,) = db.execute(
            "SELECT COUNT(DISTINCT organisation) FROM verdict JOIN organisation ON key = signer"
            " WHERE node = ? AND outcome = 'not_reproduced' AND may_validate",
            (node,),
        ).fetchone()
        if agreed < policy.validators_to_decide:
            return state
        db.execute("UPDATE node SET state = ?, clean_audits = 0 WHERE node = ?", (ACTIVE, node))
        _close(journal, node, "failed")
    # Of a node that is not kept out it is no word about a later quarantine.
    _close(journal, node, "not_reproduced")
    return ACTIVE


def _close(journal: Journal, node: str, outcome: str) -> None:
    """These verdicts have done what they do. They stay, so that nobody brings them in again."""
    journal.db.execute(
        "UPDATE verdict SET outcome = 'closed' WHERE node = ? AND outcome = ?", (node, outcome)
    )


def quarantined(journal: Journal, after: str) -> list[dict[str, object]]:
    """Nodes that wait for others to look at them, a page of them by peer id, and who found what."""
    rows = journal.db.execute(
        "SELECT node, organisation FROM node WHERE state = ? AND node > ? ORDER BY node LIMIT ?",
        (QUARANTINED, after, LISTED_NODES),
    ).fetchall()
    accusers = (
        "SELECT DISTINCT organisation FROM verdict JOIN organisation ON key = signer"
        " WHERE node = ? AND outcome = 'failed' ORDER BY organisation"
    )
    return [
        {
            "node": node,
            "organisation": organisation,
            "accused_by": [name for (name,) in journal.db.execute(accusers, (node,))],
        }
        for node, organisation in rows
    ]


def validators(journal: Journal) -> list[dict[str, str]]:
    """The organisations whose verdicts count, and their keys."""
    rows = journal.db.execute(
        "SELECT organisation, key FROM organisation WHERE may_validate ORDER BY organisation"
    )
    return [{"organisation": name, "key": key.hex()} for name, key in rows]


def _forfeit(journal: Journal, node: str, now: int) -> None:
    """All of a cheat's escrow goes back to the accounts that paid it."""
    rows = journal.db.execute(
        "SELECT source, SUM(units), MAX(idx) FROM lot WHERE node = ? GROUP BY source", (node,)
    ).fetchall()
    if rows:
        total = sum(units for _, units, _ in rows)
        last = max(index for _, _, index in rows)
        postings = ((escrow(node), -total), *((source, units) for source, units, _ in rows))
        journal.db.execute("DELETE FROM lot WHERE node = ?", (node,))
        journal.post(Event("forfeit", f"forfeit:{node}:{last}", now, postings, {"node": node}))


def revoke(journal: Journal, policy: Policy, sealed: Envelope, now: int) -> int:
    """A key that is worth nothing from now on, said by itself, its organisation or the operator."""
    revocation = parse(Revocation, sealed)
    key = bytes.fromhex(revocation.key)
    node = peer_id_from_public_key(key)
    with journal.transaction() as db:
        row = db.execute(
            "SELECT organisation.key FROM node LEFT JOIN organisation USING (organisation)"
            " WHERE node = ?",
            (node,),
        ).fetchone()
        if row is None:
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "no node of ours")
        if not sealed.signers() & {key, row[0], policy.operator_key}:
            raise ProtocolError(ErrorCode.BAD_SIGNATURE, "not signed by whom it should be")
        db.execute("UPDATE node SET state = ? WHERE node = ?", (REVOKED, node))
        return journal.post(
            Event("revoke", f"revoke:{node}", now, (), {"revocation": sealed.to_json()})
        )


def rotate(journal: Journal, sealed: Envelope, now: int) -> int:
    """A node goes on under a new key; both have signed. Its escrow and its record go along."""
    rotation = parse(Rotation, sealed)
    old_key, new_key = bytes.fromhex(rotation.old_key), bytes.fromhex(rotation.new_key)
    sealed.require_signatures(old_key, new_key)
    old, new = peer_id_from_public_key(old_key), peer_id_from_public_key(new_key)
    with journal.transaction() as db:
        row = db.execute("SELECT state FROM node WHERE node = ?", (old,)).fetchone()
        if row is None or row[0] != ACTIVE:
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "no active node of ours")
        if db.execute("SELECT 1 FROM node WHERE node = ?", (new,)).fetchone():
            raise ProtocolError(ErrorCode.EQUIVOCATION, "the new key is enrolled already")
        db.execute(
            "INSERT INTO node SELECT ?, payout, organisation, 0, registered_unix_s, clean_audits,"
            " state, certified_until_unix_s, model, span_millionths, settled_unix_s,"
            " earned_units FROM node WHERE node = ?",
            (new, old),
        )
        db.execute("UPDATE node SET state = ? WHERE node = ?", (REVOKED, old))
        (units,) = db.execute(
            "SELECT COALESCE(SUM(units), 0) FROM lot WHERE node = ?", (old,)
        ).fetchone()
        db.execute("UPDATE lot SET node = ? WHERE node = ?", (new, old))
        db.execute("UPDATE probe SET node = ? WHERE node = ?", (new, old))
        postings = ((escrow(old), -units), (escrow(new), units)) if units else ()
        detail = {"rotation": sealed.to_json()}
        return journal.post(Event("rotate", f"rotate:{old}", now, postings, detail))


def expire_credits(journal: Journal, policy: Policy, now: int) -> int:
    """Credit that nobody spent for a year returns to the public budget; returns the units."""
    since = now - CREDIT_LIFETIME_S
    rows = journal.db.execute(
        "SELECT name, balance, (SELECT COALESCE(SUM(amount), 0) FROM entry WHERE account = name"
        " AND amount > 0 AND unix_s > ?) FROM account WHERE name LIKE 'user:%' AND balance > 0",
        (since,),
    ).fetchall()
    expired = 0
    for name, balance, earned_lately in rows:
        units = expired_credit(balance, earned_lately)
        if units:
            with journal.transaction():
                postings = ((name, -units), (budget(policy.public_budget), units))
                journal.post(Event("expire", f"expire:{name}:{now}", now, postings))
            expired += units
    return expired
