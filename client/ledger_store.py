"""A user's own books in SQLite: what was received from whom, evidence, and what audits found.

Written off the event loop when sessions end; nothing waits for it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from swarm.client.vouchers import HopAccount
from swarm.ledger import feed, kept_policies, received
from swarm.ledger.channel import Signed
from swarm.ledger.commits import Commits, CommitThread, read_only
from swarm.ledger.reputation import NodeReputation, Reputations
from swarm.protocol import strict_json
from swarm.protocol.envelope import parse_envelope
from swarm.protocol.identity import PeerId
from swarm.protocol.ledger_objects import Receipt, Voucher
from swarm.protocol.prices import price_table

SCHEMA = (
    feed.SCHEMA
    + received.SCHEMA
    + kept_policies.SCHEMA
    + """
CREATE TABLE IF NOT EXISTS allowance (
    serial TEXT PRIMARY KEY,
    payload BLOB NOT NULL,
    signature BLOB NOT NULL,
    issuer BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS reputation (
    node TEXT PRIMARY KEY,
    body TEXT NOT NULL
) STRICT;
"""
)


@dataclass(frozen=True, slots=True)
class ReceivedEntry:
    """One session at one node. ``receipt`` is empty when the node never gave one."""

    session: str
    node: str
    model: str
    units: int
    tokens: int
    voucher: str
    receipt: str
    unix_s: int

    @property
    def terms(self) -> Voucher:
        """What was vouched for. Raises DecodeError."""
        return strict_json.parse(Voucher, parse_envelope(self.voucher).payload)


class ClientLedger:
    """Writes of one client."""

    def __init__(self, commits: Commits) -> None:
        self._commits = commits

    @classmethod
    def open(cls, path: Path) -> ClientLedger:
        """Raises ConfigError."""
        return cls(CommitThread(path, SCHEMA))

    async def keep(self, accounts: list[HopAccount]) -> None:
        """The sessions at these hops are over."""
        vouched = [account for account in accounts if account.voucher is not None]
        rows = [row for row in map(_row, vouched) if row is not None]
        if not rows:
            return
        allowances = {account.grant.allowance.serial: account.grant.signed for account in vouched}
        policies = {account.policy for account in vouched}

        def write(database: sqlite3.Connection) -> None:
            for row in rows:
                database.execute(
                    "INSERT OR REPLACE INTO received VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row
                )
                body = {"serial": row[0], "session": row[1], "node": row[2], "units": row[4]}
                feed.append(database, "received", body)
            for serial, signed in allowances.items():
                database.execute(
                    "INSERT OR IGNORE INTO allowance VALUES (?, ?, ?, ?)",
                    (serial, signed.payload, signed.signature, signed.public_key),
                )
            for policy in policies:
                kept_policies.remember(database, policy)

        await self._commits.write(write)

    async def keep_evidence(self, kind: str, first: str, second: str) -> None:
        """Keep two envelopes that contradict each other."""

        def write(database: sqlite3.Connection) -> None:
            feed.append(database, kind, {"first": first, "second": second})

        await self._commits.write(write)

    async def keep_reputation(self, node: str, body: str) -> None:
        """Keep what audits of a node have found so far."""

        def write(database: sqlite3.Connection) -> None:
            database.execute("INSERT OR REPLACE INTO reputation VALUES (?, ?)", (node, body))

        await self._commits.write(write)

    async def close(self) -> None:
        await self._commits.close()


class ClientLedgerReader:
    """Looks at a user's books."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    @classmethod
    def open(cls, path: Path) -> ClientLedgerReader:
        """Raises ConfigError when there are none."""
        return cls(read_only(path))

    def close(self) -> None:
        self._database.close()

    def received(self) -> Iterator[ReceivedEntry]:
        """Latest first."""
        rows = self._database.execute(
            "SELECT session, node, model, units, tokens, voucher, receipt, unix_s FROM received"
            " ORDER BY unix_s DESC, session"
        )
        for row in rows:
            yield ReceivedEntry(*row)

    def allowances(self) -> dict[str, Signed]:
        """By their serials."""
        rows = self._database.execute("SELECT serial, payload, signature, issuer FROM allowance")
        return {serial: Signed(*signed) for serial, *signed in rows}

    def policies(self) -> dict[str, str]:
        """Digests of policies to their texts. Raises BrokenFeed for one that was changed."""
        return kept_policies.known(self._database)

    def received_from(self) -> dict[str, int]:
        """Units by node."""
        return dict(self._database.execute("SELECT node, sum(units) FROM received GROUP BY node"))

    def reputations(self) -> dict[str, str]:
        """Node to what audits have found."""
        return dict(self._database.execute("SELECT node, body FROM reputation"))

    def verify(self) -> tuple[int, bytes]:
        """Check the feed and the texts of policies. Raises BrokenFeed."""
        self.policies()
        return feed.verify(self._database)


def known_reputations(path: Path) -> Reputations:
    """What audits of earlier runs have found. Raises ConfigError."""
    reader = ClientLedgerReader.open(path)
    try:
        return Reputations(
            {
                PeerId(node): NodeReputation.from_json(body)
                for node, body in reader.reputations().items()
            }
        )
    finally:
        reader.close()


def _row(account: HopAccount) -> tuple[str | int, ...] | None:
    voucher, signed = account.voucher, account.voucher_signed
    if voucher is None or signed is None:
        return None
    units = price_table(account.grant.allowance.price_epoch).units(
        voucher.work,
        blocks=account.blocks,
        mflop_per_block_token=account.mflop_per_block_token,
    )
    receipt = account.receipt_signed
    return (
        voucher.serial,
        voucher.session,
        voucher.node,
        voucher.model,
        units,
        voucher.prefill_tokens + voucher.decode_tokens,
        signed.envelope(Voucher).to_json(),
        receipt.envelope(Receipt).to_json() if receipt is not None else "",
        voucher.unix_s,
    )
