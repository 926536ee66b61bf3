"""What a validator must not forget: sentences that were used, what nodes did, verdicts.

One SQLite file that only its owner can read. A verdict is on the disk before anybody hears of it,
and stays there with the operator's answer.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from swarm.client.validator.docket import Known
from swarm.ledger.commits import Commits, CommitThread, read_only
from swarm.ledger.operator_client import NodeStanding
from swarm.protocol.envelope import Envelope, parse_envelope
from swarm.protocol.errors import ConfigError
from swarm.protocol.identity import PeerId

SCHEMA = """
CREATE TABLE IF NOT EXISTS used (digest BLOB PRIMARY KEY) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS known (node TEXT PRIMARY KEY, body TEXT NOT NULL) STRICT;
-- of nodes in the operator's books
CREATE TABLE IF NOT EXISTS standing (
    node TEXT PRIMARY KEY, organisation TEXT NOT NULL, state TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
-- answer is empty while the operator has not taken it
CREATE TABLE IF NOT EXISTS verdict (
    segment TEXT PRIMARY KEY,
    node TEXT NOT NULL,
    outcome TEXT NOT NULL,
    envelope TEXT NOT NULL,
    unix_s INTEGER NOT NULL,
    answer TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX IF NOT EXISTS waiting ON verdict (unix_s) WHERE answer = '';
"""
REFUSED = "refused: "
"""How an answer begins that was an error; its name follows."""


@dataclass(frozen=True, slots=True)
class KeptVerdict:
    """A verdict that was signed."""

    segment: str
    node: PeerId
    outcome: str
    sealed: Envelope
    unix_s: int


class ValidatorState:
    """The file of one validator, and what is in it in memory."""

    def __init__(self, commits: Commits, reader: sqlite3.Connection) -> None:
        self._commits = commits
        self.used: set[bytes] = {row[0] for row in reader.execute("SELECT digest FROM used")}
        self.known = {
            PeerId(node): Known.from_json(body)
            for node, body in reader.execute("SELECT node, body FROM known")
        }
        self.standings = {
            PeerId(node): NodeStanding(organisation, standing)
            for node, organisation, standing in reader.execute(
                "SELECT node, organisation, state FROM standing"
            )
        }
        """What the operator said last of nodes."""
        self.meta: dict[str, str] = dict(reader.execute("SELECT name, value FROM meta"))
        rows = reader.execute(
            "SELECT segment, node, outcome, envelope, unix_s FROM verdict WHERE answer = ''"
            " ORDER BY unix_s, rowid"
        )
        self._waiting = {row[0]: _verdict(row) for row in rows}

    @classmethod
    def open(cls, path: Path) -> ValidatorState:
        """Raises ConfigError."""
        commits = CommitThread(path, SCHEMA)
        reader = read_only(path)
        try:
            return cls(commits, reader)
        except ValueError as error:
            raise ConfigError(f"{path} is no state of a validator: {error}") from error
        finally:
            reader.close()

    async def close(self) -> None:
        await self._commits.close()

    @property
    def waiting(self) -> list[KeptVerdict]:
        """Verdicts that the operator has not taken, oldest first."""
        return list(self._waiting.values())

    async def use(self, digests: Iterable[bytes]) -> None:
        """These sentences are about to be sent."""
        rows = [(digest,) for digest in digests]
        self.used.update(digest for (digest,) in rows)
        await self._write("INSERT OR IGNORE INTO used VALUES (?)", *rows)

    async def keep(self, nodes: dict[PeerId, Known], verdicts: Iterable[KeptVerdict]) -> None:
        """What one challenge has changed, together. A segment has one verdict, the first."""
        signed = list(verdicts)
        news: dict[str, KeptVerdict] = {}

        def write(database: sqlite3.Connection) -> None:
            news.clear()
            for node, known in nodes.items():
                database.execute(
                    "INSERT OR REPLACE INTO known VALUES (?, ?)", (node, known.to_json())
                )
            for each in signed:
                row = (each.segment, each.node, each.outcome, each.sealed.to_json(), each.unix_s)
                inserted = database.execute(
                    "INSERT OR IGNORE INTO verdict (segment, node, outcome, envelope, unix_s)"
                    " VALUES (?, ?, ?, ?, ?)",
                    row,
                )
                if inserted.rowcount:
                    news[each.segment] = each

        await self._commits.write(write)
        self._waiting |= news

    async def answered(self, segment: str, answer: str) -> None:
        """The operator has taken a verdict, or has refused it for good."""
        await self._write("UPDATE verdict SET answer = ? WHERE segment = ?", (answer, segment))
        self._waiting.pop(segment, None)

    async def heard(self, node: PeerId, standing: NodeStanding | None) -> None:
        """The operator's word about a node; of those that are not in its books nothing is kept."""
        if self.standings.get(node) == standing:
            return
        if standing is None:
            await self._write("DELETE FROM standing WHERE node = ?", (node,))
            del self.standings[node]
            return
        row = (node, standing.organisation, standing.state)
        await self._write("INSERT OR REPLACE INTO standing VALUES (?, ?, ?)", row)
        self.standings[node] = standing

    async def remember(self, name: str, value: str) -> None:
        """Keep a setting of ours."""
        await self._write("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))
        self.meta[name] = value

    async def _write(self, statement: str, *rows: tuple[bytes | str, ...]) -> None:
        def write(database: sqlite3.Connection) -> None:
            database.executemany(statement, rows)

        await self._commits.write(write)


@dataclass(frozen=True, slots=True)
class NodeSummary:
    """What was found of one node, and what the operator answered last."""

    node: str
    outcomes: dict[str, int]
    waiting: int
    answer: str
    case: str


def summaries(path: Path) -> list[NodeSummary]:
    """Of all nodes with a verdict. Raises ConfigError when there is no such file."""
    reader = read_only(path)
    try:
        known = {
            node: Known.from_json(body)
            for node, body in reader.execute("SELECT node, body FROM known")
        }
        found: dict[str, Counter[str]] = {}
        answers: dict[str, str] = {}
        waiting: Counter[str] = Counter()
        rows = reader.execute("SELECT node, outcome, answer FROM verdict ORDER BY unix_s, rowid")
        for node, outcome, answer in rows:
            found.setdefault(node, Counter())[outcome] += 1
            waiting[node] += not answer
            answers[node] = answer or answers.get(node, "")
        return [
            NodeSummary(
                node,
                dict(outcomes),
                waiting[node],
                answers[node],
                known.get(node, Known()).case,
            )
            for node, outcomes in sorted(found.items())
        ]
    except (sqlite3.Error, ValueError) as error:
        raise ConfigError(f"{path} is no state of a validator: {error}") from error
    finally:
        reader.close()


def _verdict(row: tuple[str, str, str, str, int]) -> KeptVerdict:
    segment, node, outcome, envelope, unix_s = row
    return KeptVerdict(segment, PeerId(node), outcome, parse_envelope(envelope), unix_s)
