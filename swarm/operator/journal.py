"""The operator's database: events, the accounts that they move, and the Merkle tree over them.

What holds always: each event sums to zero; no balance but the mint's is negative; the tree has
exactly the leaves that are committed. Everything else of the books is built on `transaction` and
`post`. Synchronous: the operator has one thread for it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path

from swarm.ledger.events import MINT, Event
from swarm.ledger.merkle_tree import MerkleTree
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.merkle import leaf_hash


class Journal:
    """Opens (and makes) the books at ``path``. One process at a time."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.db = connection
        connection.executescript(_schema())
        self.tree = MerkleTree(
            digest for (digest,) in connection.execute("SELECT hash FROM event ORDER BY idx")
        )
        self._pending: list[bytes] = []
        self._pending_size = 0

    @classmethod
    def open(cls, path: Path) -> Journal:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        return cls(connection)

    @classmethod
    def in_memory(cls) -> Journal:
        """For tests and simulations."""
        return cls(sqlite3.connect(":memory:", isolation_level=None))

    def close(self) -> None:
        self.db.close()

    @property
    def size(self) -> int:
        """Leaves so far, those of the open transaction included."""
        return self.tree.size + len(self._pending)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block or nothing; its leaves enter the tree once they are on disk."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield self.db
            self.db.execute("COMMIT")
        except BaseException:
            self._pending.clear()
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise
        for digest in self._pending:
            self.tree.append(digest)
        self._pending.clear()

    def post(self, event: Event) -> int:
        """Move the amounts and add the leaf; returns its index. Inside of a transaction.

        Raises ProtocolError: OVER_LIMIT if an account has not so much, EQUIVOCATION if the same
        cause was posted before.
        """
        leaf = event.encode()
        index, digest = self.size, leaf_hash(leaf)
        try:
            self.db.execute(
                "INSERT INTO event VALUES (?, ?, ?, ?)", (index, event.event_id, leaf, digest)
            )
        except sqlite3.IntegrityError as error:
            raise ProtocolError(ErrorCode.EQUIVOCATION, "this was posted before") from error
        for account, amount in event.postings:
            balance = self.balance(account) + amount
            if balance < 0 and account != MINT:
                raise ProtocolError(ErrorCode.OVER_LIMIT, f"{account} has not so much")
            self.db.execute("INSERT OR REPLACE INTO account VALUES (?, ?)", (account, balance))
            self.db.execute(
                "INSERT INTO entry VALUES (?, ?, ?, ?)", (account, index, event.unix_s, amount)
            )
        self._pending.append(digest)
        return index

    def balance(self, account: str) -> int:
        row = self.db.execute("SELECT balance FROM account WHERE name = ?", (account,)).fetchone()
        return row[0] if row else 0

    def balances(self) -> dict[str, int]:
        return dict(self.db.execute("SELECT name, balance FROM account"))

    def leaves(self, start: int, end: int) -> Sequence[bytes]:
        rows = self.db.execute(
            "SELECT leaf FROM event WHERE idx >= ? AND idx < ? ORDER BY idx", (start, end)
        )
        return [leaf for (leaf,) in rows]

    def index_of(self, event_id: str) -> int | None:
        row = self.db.execute("SELECT idx FROM event WHERE id = ?", (event_id,)).fetchone()
        return row[0] if row else None

    def history(self, account: str, before: int, limit: int) -> list[tuple[int, int, int]]:
        """Index, time and amount of an account's entries before an index, newest first."""
        return self.db.execute(
            "SELECT idx, unix_s, amount FROM entry WHERE account = ? AND idx < ?"
            " ORDER BY idx DESC LIMIT ?",
            (account, before, limit),
        ).fetchall()

    def meta(self, name: str) -> bytes | None:
        row = self.db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def add_to_meta(self, name: str, amount: int) -> None:
        """Counters that would take long to sum up anew, as decimal digits."""
        self.set_meta(name, str(int(self.meta(name) or b"0") + amount).encode())

    def set_meta(self, name: str, value: bytes) -> None:
        self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))


@cache
def _schema() -> str:
    return files(__package__).joinpath("schema.sql").read_text()
