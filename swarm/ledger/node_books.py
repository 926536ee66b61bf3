"""A node's own books in SQLite: the best voucher of each channel, a hash-chained feed, evidence.

The feed has an event for each channel that begins or ends, for evidence, and for what was settled.
It is proof towards ourselves and towards auditors; no prompt and no activation is in it, and its
ids are pseudonyms.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from swarm.ledger import feed, kept_policies
from swarm.ledger.channel import Signed
from swarm.ledger.commits import Commits, CommitThread, read_only
from swarm.protocol import strict_json
from swarm.protocol.errors import ProtocolError
from swarm.protocol.identity import public_key_from_peer_id
from swarm.protocol.ledger_objects import Allowance, Receipt, Voucher

SCHEMA = (
    feed.SCHEMA
    + kept_policies.SCHEMA
    + """
CREATE TABLE IF NOT EXISTS allowance (
    serial TEXT PRIMARY KEY,
    payload BLOB NOT NULL,
    signature BLOB NOT NULL,
    issuer BLOB NOT NULL,
    payer TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS channel (
    serial TEXT NOT NULL,
    session TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    units INTEGER NOT NULL,
    payload BLOB NOT NULL,
    signature BLOB NOT NULL,
    receipt BLOB NOT NULL,
    receipt_signature BLOB NOT NULL,
    unix_s INTEGER NOT NULL,
    closed INTEGER NOT NULL DEFAULT 0,
    settled_units INTEGER NOT NULL DEFAULT 0,
    refused_code INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (serial, session)
) STRICT;
CREATE INDEX IF NOT EXISTS channel_by_time ON channel (unix_s);
CREATE TABLE IF NOT EXISTS evidence (
    position INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    first TEXT NOT NULL,
    second TEXT NOT NULL
) STRICT;
"""
)


@dataclass(frozen=True, slots=True)
class ChannelEntry:
    """A channel as it is kept: the best voucher, and the receipt that was given for it."""

    serial: str
    session: str
    sequence: int
    units: int
    voucher: Signed
    receipt: Signed
    unix_s: int
    closed: bool
    settled_units: int
    policy: str
    """Digest of the policy that was kept; empty for none."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What the books add up to."""

    channels: int
    units: int
    settled_units: int
    evidence: int
    feed_length: int


class LedgerStore:
    """Writes; whoever awaits one may rely on it after a crash."""

    def __init__(self, commits: Commits) -> None:
        self._commits = commits

    @classmethod
    def open(cls, path: Path) -> LedgerStore:
        """Raises ConfigError."""
        return cls(CommitThread(path, SCHEMA))

    async def begin(self, allowance: Signed, serial: str, payer: str, policy: bytes = b"") -> None:
        """Note an allowance, and the policy of a session, before its first voucher counts."""

        def write(database: sqlite3.Connection) -> None:
            kept_policies.remember(database, policy)
            added = database.execute(
                "INSERT OR IGNORE INTO allowance VALUES (?, ?, ?, ?, ?)",
                (serial, allowance.payload, allowance.signature, allowance.public_key, payer),
            )
            if added.rowcount:
                feed.append(database, "allowance", {"serial": serial})

        await self._commits.write(write)

    async def keep(self, voucher: Signed, receipt: Signed, units: int) -> None:
        """Keep the better voucher of a channel, and our receipt for it."""
        fields = strict_json.parse(Voucher, voucher.payload)

        def write(database: sqlite3.Connection) -> None:
            database.execute(
                "INSERT INTO channel (serial, session, sequence, units, payload, signature,"
                " receipt, receipt_signature, unix_s) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (serial, session) DO UPDATE SET sequence = excluded.sequence,"
                " units = excluded.units, payload = excluded.payload,"
                " signature = excluded.signature, receipt = excluded.receipt,"
                " receipt_signature = excluded.receipt_signature, unix_s = excluded.unix_s"
                " WHERE excluded.sequence > channel.sequence OR"
                " (excluded.sequence = channel.sequence AND excluded.units > channel.units)",
                (
                    fields.serial,
                    fields.session,
                    fields.sequence,
                    units,
                    voucher.payload,
                    voucher.signature,
                    receipt.payload,
                    receipt.signature,
                    fields.unix_s,
                ),
            )

        await self._commits.write(write)

    async def end(self, serial: str, session: str) -> None:
        """A session is over: its last voucher goes into the feed."""

        def write(database: sqlite3.Connection) -> None:
            row = database.execute(
                "UPDATE channel SET closed = 1 WHERE serial = ? AND session = ? AND closed = 0"
                " RETURNING sequence, units",
                (serial, session),
            ).fetchone()
            if row is not None:
                body = {"serial": serial, "session": session, "sequence": row[0], "units": row[1]}
                feed.append(database, "channel", body)

        await self._commits.write(write)

    async def keep_evidence(self, kind: str, first: str, second: str) -> None:
        """Keep two envelopes that contradict each other."""

        def write(database: sqlite3.Connection) -> None:
            event = feed.append(database, kind, {"first": first, "second": second})
            database.execute(
                "INSERT INTO evidence VALUES (?, ?, ?, ?)", (event.position, kind, first, second)
            )

        await self._commits.write(write)

    async def settled(self, entries: list[tuple[str, str, int]], unix_s: int) -> None:
        """The operator has paid these channels (serial, session, units)."""

        def write(database: sqlite3.Connection) -> None:
            for serial, session, units in entries:
                database.execute(
                    "UPDATE channel SET settled_units = max(settled_units, ?)"
                    " WHERE serial = ? AND session = ?",
                    (units, serial, session),
                )
            feed.append(database, "settled", {"channels": len(entries), "unix_s": unix_s})

        await self._commits.write(write)

    async def refused(self, entries: list[tuple[str, str, int]]) -> None:
        """The operator will never pay these channels (serial, session, error code)."""

        def write(database: sqlite3.Connection) -> None:
            for serial, session, code in entries:
                database.execute(
                    "UPDATE channel SET refused_code = ? WHERE serial = ? AND session = ?",
                    (code, serial, session),
                )
            feed.append(database, "refused", {"channels": len(entries)})

        await self._commits.write(write)

    async def close(self) -> None:
        await self._commits.close()


class LedgerReader:
    """Looks at the books, also while the node runs. A context for one thread."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    @classmethod
    def open(cls, path: Path) -> LedgerReader:
        """Raises ConfigError when there are none."""
        return cls(read_only(path))

    def close(self) -> None:
        self._database.close()

    def channels(self, *, unsettled: bool = False) -> Iterator[ChannelEntry]:
        """Oldest first."""
        return self._entries(unsettled, None)

    def presentable(self, issuers: Collection[bytes], limit: int) -> Iterator[ChannelEntry]:
        """What these operators have neither paid nor refused for good, oldest first."""
        keys = json.dumps([issuer.hex().upper() for issuer in issuers])
        return itertools.islice(self._entries(True, keys), limit)

    def feed_head(self) -> tuple[int, bytes]:
        """Length and head of the feed."""
        return feed.head_of(self._database)

    def _entries(self, unsettled: bool, issuers: str | None) -> Iterator[ChannelEntry]:
        """``issuers``: only of these keys, a JSON list as SQLite's hex() writes them."""
        rows = self._database.execute(
            "SELECT channel.serial, session, sequence, units, channel.payload, channel.signature,"
            " receipt, receipt_signature, unix_s, closed, settled_units, allowance.payload"
            " FROM channel JOIN allowance USING (serial)"
            " WHERE (units > settled_units OR NOT ?1) AND (?2 IS NULL OR (refused_code = 0"
            " AND hex(issuer) IN (SELECT value FROM json_each(?2))))"
            " ORDER BY unix_s, serial, session",
            (int(unsettled), issuers),
        )
        for row in rows:
            allowance = strict_json.parse(Allowance, row[11])
            receipt = strict_json.parse(Receipt, row[6])
            yield ChannelEntry(
                serial=row[0],
                session=row[1],
                sequence=row[2],
                units=row[3],
                voucher=Signed(row[4], row[5], bytes.fromhex(allowance.voucher_key)),
                receipt=Signed(row[6], row[7], _node_key(receipt)),
                unix_s=row[8],
                closed=bool(row[9]),
                settled_units=row[10],
                policy=receipt.policy,
            )

    def allowances(self) -> Iterator[tuple[Signed, str]]:
        """Each with its payer's pseudonym."""
        rows = self._database.execute("SELECT payload, signature, issuer, payer FROM allowance")
        for payload, signature, issuer, payer in rows:
            yield Signed(payload, signature, issuer), payer

    def policies(self) -> dict[str, str]:
        """Digests of policies to their texts. Raises BrokenFeed for one that was changed."""
        return kept_policies.known(self._database)

    def events(self) -> Iterator[feed.Event]:
        return feed.read(self._database)

    def totals(self) -> Totals:
        channels, units, settled = self._database.execute(
            "SELECT count(*), coalesce(sum(units), 0), coalesce(sum(settled_units), 0) FROM channel"
        ).fetchone()
        (evidence,) = self._database.execute("SELECT count(*) FROM evidence").fetchone()
        return Totals(channels, units, settled, evidence, feed.head_of(self._database)[0])

    def given_to(self) -> dict[str, int]:
        """Units of work done for each payer."""
        return dict(
            self._database.execute(
                "SELECT payer, sum(units) FROM channel JOIN allowance USING (serial) GROUP BY payer"
            )
        )

    def verify(self) -> tuple[int, bytes]:
        """Check the feed's chain and every signature. Raises BrokenFeed or ProtocolError."""
        for allowance, _ in self.allowances():
            allowance.verify(Allowance)
        policies = self.policies()
        for entry in self.channels():
            entry.voucher.verify(Voucher)
            entry.receipt.verify(Receipt)
            self._require_agreement(entry)
            if entry.policy and entry.policy not in policies:
                raise feed.BrokenFeed(f"the policy of session {entry.session} is missing")
        return feed.verify(self._database)

    @staticmethod
    def _require_agreement(entry: ChannelEntry) -> None:
        voucher = strict_json.parse(Voucher, entry.voucher.payload)
        receipt = strict_json.parse(Receipt, entry.receipt.payload)
        same = (
            (voucher.serial, voucher.session, voucher.sequence, voucher.work, voucher.policy)
            == (receipt.serial, receipt.session, receipt.sequence, receipt.work, receipt.policy)
            == (entry.serial, entry.session, entry.sequence, voucher.work, voucher.policy)
        )
        if not same:
            raise feed.BrokenFeed(f"voucher and receipt of session {entry.session} differ")


def _node_key(receipt: Receipt) -> bytes:
    try:
        return public_key_from_peer_id(receipt.node)
    except ProtocolError as error:
        raise feed.BrokenFeed("a receipt of nobody") from error
