"""What the page remembers, in one SQLite file, so that a restart loses nothing.

Synchronous: the owner calls it from one thread at a time. Everything of one look at the swarm is
written in one transaction.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict, astuple, fields
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from swarm.protocol.errors import ConfigError
from swarm.status.presence import Interval
from swarm.status.rows import DAY_S, Declared, Look, NodeRow
from swarm.status.snapshot import Incident, Probe, ProbeHop, Work
from swarm.status.work import Counters

BIN_S = 300
"""Samples of history are sums over so long."""
KEPT_DAYS = 400
KEPT_SAMPLES_S = 40 * DAY_S
KEPT_PRESENCE_S = 31 * DAY_S
MOST_NODES = 200_000
"""Remembered; of more, those seen last."""
LATEST_INCIDENTS = 200

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE node (
    peer_id TEXT, revision TEXT, registered_unix_s REAL, seen_unix_s REAL, declared TEXT,
    started_unix_s INTEGER, decode_block_tokens INTEGER, prefill_block_tokens INTEGER,
    energy_counter_j INTEGER,
    generated_tokens REAL, prompt_tokens REAL, energy_j REAL, co2_g REAL, metered_tokens REAL,
    PRIMARY KEY (peer_id, revision)) WITHOUT ROWID;
CREATE TABLE presence (
    peer_id TEXT, from_unix_s REAL, until_unix_s REAL,
    PRIMARY KEY (peer_id, from_unix_s)) WITHOUT ROWID;
CREATE TABLE watched (from_unix_s REAL PRIMARY KEY, until_unix_s REAL);
CREATE TABLE work_day (
    day INTEGER, peer_id TEXT, revision TEXT,
    generated_tokens REAL, prompt_tokens REAL, energy_j REAL, co2_g REAL, metered_tokens REAL,
    PRIMARY KEY (day, peer_id, revision)) WITHOUT ROWID;
CREATE TABLE sample (
    revision TEXT, bin_unix_s INTEGER, looks INTEGER, nodes INTEGER, least_replicas INTEGER,
    generated_tokens REAL, prompt_tokens REAL, energy_j REAL, co2_g REAL,
    PRIMARY KEY (revision, bin_unix_s)) WITHOUT ROWID;
CREATE TABLE probe (
    revision TEXT, at_unix_s REAL, succeeded INTEGER, time_to_first_token_s REAL,
    tokens_per_s REAL, tokens INTEGER, problem TEXT, hops TEXT,
    PRIMARY KEY (revision, at_unix_s)) WITHOUT ROWID;
CREATE TABLE incident (
    number INTEGER PRIMARY KEY, kind TEXT, revision TEXT, model_name TEXT, detail TEXT,
    opened_unix_s REAL, closed_unix_s REAL);
CREATE INDEX incident_opened ON incident (opened_unix_s);
"""


class Database:
    """The file; a context manager that closes it."""

    def __init__(self, path: Path | str) -> None:
        """Open or make it. Raises ConfigError for a file that is none of ours, or of the future."""
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._connection.executescript(
                    f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
                )
        except sqlite3.Error as error:
            raise ConfigError(f"cannot use {path} for the page's memory: {error}") from None
        if version > SCHEMA_VERSION:
            raise ConfigError(f"{path} was written by a newer version of this software")

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    # --- writing ---------------------------------------------------------------------------------
    def write(self, look: Look) -> None:
        """All of one look, or nothing of it."""
        with self._connection as connection:
            self._see_again(look)
            connection.executemany(
                "INSERT OR REPLACE INTO node VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    (
                        row.peer_id,
                        row.revision,
                        row.registered_unix_s,
                        row.seen_unix_s,
                        _declared_text(row.declared),
                        *_counter_columns(row.counters),
                        *_work_columns(row.work),
                    )
                    for row in look.nodes
                ),
            )
            connection.executemany(
                "INSERT OR REPLACE INTO presence VALUES (?,?,?)",
                ((peer, *interval) for peer, interval in look.presence),
            )
            if look.watched is not None:
                connection.execute("INSERT OR REPLACE INTO watched VALUES (?,?)", look.watched)
            self._add_work(look)
            self._add_samples(look)
            self._change_incidents(look)

    def _see_again(self, look: Look) -> None:
        """All that was seen at the look before, but what is gone since."""
        now, previous = look.at_unix_s, look.previous_unix_s
        if previous is None:
            return
        connection = self._connection
        connection.execute("UPDATE node SET seen_unix_s = ? WHERE seen_unix_s = ?", (now, previous))
        connection.executemany(
            "UPDATE node SET seen_unix_s = ? WHERE peer_id = ? AND revision = ?",
            ((previous, *key) for key in look.gone),
        )
        connection.execute(
            "UPDATE presence SET until_unix_s = ? WHERE until_unix_s = ?", (now, previous)
        )
        connection.executemany(
            "UPDATE presence SET until_unix_s = ? WHERE peer_id = ? AND until_unix_s = ?",
            ((previous, peer, now) for peer in look.gone_peers),
        )

    def _add_work(self, look: Look) -> None:
        day = int(look.at_unix_s) // DAY_S
        self._connection.executemany(
            "INSERT INTO work_day VALUES (?,?,?,?,?,?,?,?) ON CONFLICT DO UPDATE SET"
            " generated_tokens = generated_tokens + excluded.generated_tokens,"
            " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
            " energy_j = energy_j + excluded.energy_j, co2_g = co2_g + excluded.co2_g,"
            " metered_tokens = metered_tokens + excluded.metered_tokens",
            ((day, peer, revision, *_work_columns(work)) for peer, revision, work in look.work),
        )

    def _add_samples(self, look: Look) -> None:
        bin_unix_s = int(look.at_unix_s) // BIN_S * BIN_S
        self._connection.executemany(
            "INSERT INTO sample VALUES (?,?,1,?,?,?,?,?,?) ON CONFLICT DO UPDATE SET"
            " looks = looks + 1, nodes = nodes + excluded.nodes,"
            " least_replicas = min(least_replicas, excluded.least_replicas),"
            " generated_tokens = generated_tokens + excluded.generated_tokens,"
            " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
            " energy_j = energy_j + excluded.energy_j, co2_g = co2_g + excluded.co2_g",
            (
                (
                    row.revision,
                    bin_unix_s,
                    row.nodes,
                    row.least_replicas,
                    row.work.generated_tokens,
                    row.work.prompt_tokens,
                    row.work.energy_j,
                    row.work.co2_g,
                )
                for row in look.samples
            ),
        )

    def _change_incidents(self, look: Look) -> None:
        execute = self._connection.execute
        for finding in (*look.opened, *look.closed_at_once):
            closed = look.at_unix_s if finding in look.closed_at_once else None
            execute(
                "INSERT INTO incident (kind, revision, model_name, detail, opened_unix_s,"
                " closed_unix_s) VALUES (?,?,?,?,?,?)",
                (*astuple(finding), look.at_unix_s, closed),
            )
        for incident, finding in look.changed:
            if incident.detail != finding.detail:
                execute(
                    "UPDATE incident SET detail = ? WHERE number = ?",
                    (finding.detail, incident.number),
                )
        for incident in look.closed:
            execute(
                "UPDATE incident SET closed_unix_s = ? WHERE number = ?",
                (look.at_unix_s, incident.number),
            )

    def add_probe(self, probe: Probe) -> None:
        hops = [astuple(hop) for hop in probe.hops]
        with self._connection as connection:
            connection.execute(
                "INSERT OR REPLACE INTO probe VALUES (?,?,?,?,?,?,?,?)",
                (
                    probe.revision,
                    probe.at_unix_s,
                    probe.succeeded,
                    probe.time_to_first_token_s,
                    probe.tokens_per_s,
                    probe.tokens,
                    probe.problem,
                    json.dumps(hops, ensure_ascii=False),
                ),
            )

    def forget(self, now_unix_s: float) -> None:
        """Drop what is older than is kept."""
        oldest_day = int(now_unix_s) // DAY_S - KEPT_DAYS
        with self._connection as connection:
            for statement, bound in (
                ("DELETE FROM presence WHERE until_unix_s < ?", now_unix_s - KEPT_PRESENCE_S),
                ("DELETE FROM watched WHERE until_unix_s < ?", now_unix_s - KEPT_PRESENCE_S),
                ("DELETE FROM work_day WHERE day < ?", oldest_day),
                ("DELETE FROM sample WHERE bin_unix_s < ?", now_unix_s - KEPT_SAMPLES_S),
                ("DELETE FROM probe WHERE at_unix_s < ?", now_unix_s - KEPT_SAMPLES_S),
                ("DELETE FROM incident WHERE closed_unix_s < ?", oldest_day * DAY_S),
                ("DELETE FROM node WHERE seen_unix_s < ?", oldest_day * DAY_S),
                (
                    "DELETE FROM node WHERE (peer_id, revision) IN (SELECT peer_id, revision"
                    " FROM node ORDER BY seen_unix_s DESC LIMIT -1 OFFSET ?)",
                    MOST_NODES,
                ),
            ):
                connection.execute(statement, (bound,))

    # --- reading ---------------------------------------------------------------------------------
    def nodes(self) -> Iterable[NodeRow]:
        """All that are remembered."""
        for row in self._connection.execute("SELECT * FROM node"):
            declared = json.loads(row[4])
            declared["adapters"] = tuple(declared["adapters"])
            peer_id, revision, registered_unix_s, seen_unix_s = row[:4]
            yield NodeRow(
                peer_id,
                revision,
                registered_unix_s,
                seen_unix_s,
                Declared(**declared),
                Counters(*row[5:9]),
                Work(*row[9:]),
            )

    def presence(self) -> dict[str, tuple[Interval, ...]]:
        """The intervals of each peer, in order."""
        found: dict[str, list[Interval]] = {}
        for peer, begin, until in self._connection.execute(
            "SELECT * FROM presence ORDER BY peer_id, from_unix_s"
        ):
            found.setdefault(peer, []).append((begin, until))
        return {peer: tuple(intervals) for peer, intervals in found.items()}

    def watched(self) -> tuple[Interval, ...]:
        return tuple(self._connection.execute("SELECT * FROM watched ORDER BY from_unix_s"))

    def work_by_day(self) -> dict[tuple[int, str], Work]:
        """By day (since 1970, UTC) and model."""
        return {
            (day, revision): Work(*sums)
            for day, revision, *sums in self._connection.execute(
                "SELECT day, revision, sum(generated_tokens), sum(prompt_tokens), sum(energy_j),"
                " sum(co2_g), sum(metered_tokens) FROM work_day GROUP BY day, revision"
            )
        }

    def work_of_peer(self, peer_id: str, first_day: int) -> dict[int, Work]:
        """By day."""
        return {
            day: Work(*sums)
            for day, *sums in self._connection.execute(
                "SELECT day, sum(generated_tokens), sum(prompt_tokens), sum(energy_j), sum(co2_g),"
                " sum(metered_tokens) FROM work_day WHERE peer_id = ? AND day >= ? GROUP BY day",
                (peer_id, first_day),
            )
        }

    def probes(self, revision: str, since_unix_s: float) -> list[Probe]:
        """Latest last."""
        return [
            _probe(row)
            for row in self._connection.execute(
                "SELECT * FROM probe WHERE revision = ? AND at_unix_s >= ? ORDER BY at_unix_s",
                (revision, since_unix_s),
            )
        ]

    def latest_probes(self) -> dict[str, Probe]:
        """By model."""
        rows = self._connection.execute(
            "SELECT * FROM probe WHERE (revision, at_unix_s) IN"
            " (SELECT revision, max(at_unix_s) FROM probe GROUP BY revision)"
        )
        return {row[0]: _probe(row) for row in rows}

    def incidents(self) -> tuple[Incident, ...]:
        """The latest, latest first; open ones are always among them."""
        rows = self._connection.execute(
            "SELECT * FROM incident WHERE closed_unix_s IS NULL OR number IN"
            " (SELECT number FROM incident ORDER BY opened_unix_s DESC, number DESC LIMIT ?)"
            " ORDER BY opened_unix_s DESC, number DESC",
            (LATEST_INCIDENTS,),
        )
        return tuple(Incident(*row) for row in rows)

    def samples(
        self, revision: str, since_unix_s: float, bin_s: int
    ) -> list[tuple[int, float, int, float, float]]:
        """Bin, mean of serving nodes, least replicas, tokens generated, energy in J; bin by bin.

        An empty ``revision`` sums over all models; least replicas then mean nothing.
        """
        return list(
            self._connection.execute(
                "SELECT bin_unix_s / :bin * :bin AS start, sum(mean), min(least), sum(tokens),"
                " sum(energy) FROM (SELECT revision, bin_unix_s,"
                " avg(nodes * 1.0 / looks) AS mean, min(least_replicas) AS least,"
                " sum(generated_tokens) AS tokens, sum(energy_j) AS energy FROM sample"
                " WHERE bin_unix_s >= :since AND (:revision = '' OR revision = :revision)"
                " GROUP BY revision, bin_unix_s / :bin) GROUP BY start ORDER BY start",
                {"bin": bin_s, "since": since_unix_s, "revision": revision},
            )
        )


def _probe(row: tuple[Any, ...]) -> Probe:
    revision, at_unix_s, succeeded, first_token_s, tokens_per_s, tokens, problem, hops = row
    return Probe(
        revision,
        at_unix_s,
        bool(succeeded),
        first_token_s,
        tokens_per_s,
        tokens,
        problem,
        tuple(ProbeHop(*hop) for hop in json.loads(hops)),
    )


# Ten thousand nodes are written in each look: dataclasses' own functions copy deeply.
_counter_columns = attrgetter(*(field.name for field in fields(Counters)))
_work_columns = attrgetter(*(field.name for field in fields(Work)))


@lru_cache(maxsize=1 << 16)
def _declared_text(declared: Declared) -> str:
    """As it is stored; most nodes declare the same look after look."""
    return json.dumps(asdict(declared), ensure_ascii=False)
