"""The operator's books as one object: what the door and the clock may do to them.

Every method is one transaction, is synchronous, and must be called from one thread.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.ledger.notes import Checkpoint, LogProof, Note, sign_note
from swarm.operator import allowances, nodes, registry, settlement, uptime
from swarm.operator.journal import Journal
from swarm.operator.policy import Policy
from swarm.operator.settlement import Outcome
from swarm.protocol.envelope import Envelope
from swarm.protocol.errors import ErrorCode, ProtocolError

HISTORY_ENTRIES = 100
EVIDENCE_ROWS = 100
LEADERS = 100


class Books:
    def __init__(self, journal: Journal, policy: Policy, operator_key: Ed25519PrivateKey) -> None:
        self.journal = journal
        self.policy = policy
        self._operator_key = operator_key

    # --- what others ask for; each raises ProtocolError with the code for them ---
    def issue(self, request: Envelope, networks: tuple[str, str], now: int) -> Envelope:
        return allowances.issue(
            self.journal, self.policy, self._operator_key, request, networks, now
        )

    def settle(self, settled: Envelope, vouchers: Sequence[Envelope], now: int) -> list[Outcome]:
        return settlement.settle(self.journal, self.policy, settled, vouchers, now)

    def enrol(self, enrolment: Envelope, certificate: Envelope | None, now: int) -> int | None:
        return nodes.enrol(self.journal, enrolment, certificate, now)

    def take_order(self, order: Envelope, now: int) -> int:
        return registry.take_order(self.journal, self.policy, order, now)

    def take_verdict(self, verdict: Envelope, now: int) -> str:
        return nodes.take_verdict(self.journal, self.policy, verdict, now)

    def revoke(self, revocation: Envelope, now: int) -> int:
        return nodes.revoke(self.journal, self.policy, revocation, now)

    def rotate(self, rotation: Envelope, now: int) -> int:
        return nodes.rotate(self.journal, rotation, now)

    # --- what time brings ---
    def release_expired(self, now: int) -> int:
        return allowances.release_expired(self.journal, self.policy, now)

    def vest(self, now: int) -> int:
        return nodes.vest(self.journal, now)

    def share_uptime(self, now: int) -> int:
        return uptime.share_uptime(self.journal, self.policy, now)

    def expire_credits(self, now: int) -> int:
        return nodes.expire_credits(self.journal, self.policy, now)

    # --- the log ---
    def checkpoint(self, log_key: Ed25519PrivateKey, now: int) -> Note:
        """The signed state of the log, kept for proofs; the same note while nothing is added."""
        size = self.journal.tree.size
        text = Checkpoint(self.policy.origin, size, self.journal.tree.root()).text
        row = self.journal.db.execute(
            "SELECT note FROM checkpoint WHERE size = ?", (size,)
        ).fetchone()
        if row:
            return Note.parse(row[0])
        note = Note(text, (sign_note(text, log_key, self.policy.origin),))
        with self.journal.transaction() as db:
            db.execute("INSERT INTO checkpoint VALUES (?, ?, ?, NULL)", (size, str(note), now))
        return note

    def cosigned(self, note: Note, now: int) -> None:
        """Keep a checkpoint with the signatures of witnesses; older ones without are dropped."""
        size = Checkpoint.parse(note.text).size
        with self.journal.transaction() as db:
            db.execute(
                "UPDATE checkpoint SET note = ?, cosigned_unix_s = ? WHERE size = ?",
                (str(note), now, size),
            )
            db.execute("DELETE FROM checkpoint WHERE size < ? AND cosigned_unix_s IS NULL", (size,))

    def proof(self, index: int) -> LogProof:
        """That a leaf is in the log: under a cosigned checkpoint if one covers it."""
        row = self.journal.db.execute(
            "SELECT note FROM checkpoint WHERE size > ?"
            " ORDER BY cosigned_unix_s IS NULL, size DESC LIMIT 1",
            (index,),
        ).fetchone()
        if index < 0 or row is None:
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "no checkpoint covers this leaf yet")
        note = Note.parse(row[0])
        size = Checkpoint.parse(note.text).size
        return LogProof(index, tuple(self.journal.tree.inclusion_proof(index, size)), note)

    def index_of(self, event_id: str) -> int:
        index = self.journal.index_of(event_id)
        if index is None:
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "no such event")
        return index

    def leaf(self, index: int) -> bytes:
        leaves = self.journal.leaves(index, index + 1)
        if not leaves:
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "no such leaf")
        return leaves[0]

    # --- what anybody may see ---
    def account(self, name: str, before: int) -> dict[str, Any]:
        """Balance and newest entries of an account, those before an index."""
        entries = self.journal.history(name, before, HISTORY_ENTRIES)
        return {
            "account": name,
            "balance": self.journal.balance(name),
            "entries": [
                {
                    "index": index,
                    "time": unix_s,
                    "amount": amount,
                    "kind": json.loads(self.leaf(index))["kind"],
                }
                for index, unix_s, amount in entries
            ],
        }

    def node(self, node: str) -> dict[str, Any]:
        row = self.journal.db.execute(
            "SELECT payout, organisation, registered_unix_s, clean_audits, state FROM node"
            " WHERE node = ?",
            (node,),
        ).fetchone()
        if row is None:
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "no such node")
        names = ("payout", "organisation", "registered", "clean_audits", "state")
        return {"node": node, **dict(zip(names, row, strict=True))}

    def quarantined(self, after: str) -> list[dict[str, Any]]:
        """Nodes with two failed segments that nobody else has looked at yet; those behind one."""
        return nodes.quarantined(self.journal, after)

    def validators(self) -> list[dict[str, str]]:
        return nodes.validators(self.journal)

    def evidence(self, node: str) -> list[dict[str, Any]]:
        """Contradictory vouchers that a node presented, whole, newest first."""
        rows = self.journal.db.execute(
            "SELECT kind, serial, session, first, second, unix_s FROM evidence WHERE node = ?"
            " ORDER BY unix_s DESC LIMIT ?",
            (node, EVIDENCE_ROWS),
        )
        names = ("kind", "serial", "session", "first", "second", "time")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def totals(self) -> dict[str, Any]:
        """Sums for status pages: no single session can be read from them."""
        balances = self.journal.balances()
        leaders = self.journal.db.execute(
            "SELECT node, organisation, earned_units FROM node WHERE earned_units > 0"
            " ORDER BY earned_units DESC LIMIT ?",
            (LEADERS,),
        ).fetchall()
        (nodes_active,) = self.journal.db.execute(
            "SELECT COUNT(*) FROM node WHERE state = 'active'"
        ).fetchone()
        return {
            "log_size": self.journal.tree.size,
            "minted": -balances.get("mint", 0),
            "reserved": balances.get("holds", 0),
            "fees": balances.get("fee", 0),
            "budgets": {
                name.removeprefix("budget:"): units
                for name, units in balances.items()
                if name.startswith("budget:")
            },
            "nodes": nodes_active,
            "served": {
                name: int(self.journal.meta(name) or b"0")
                for name in ("paid", "block_tokens", "millitokens")
            },
            "leaders": [
                {"node": node, "organisation": organisation, "units": units}
                for node, organisation, units in leaders
            ],
        }
