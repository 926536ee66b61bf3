"""What a user received from nodes: the table that the client writes and the owner's node reads."""

from __future__ import annotations

from pathlib import Path

from swarm.ledger.commits import read_only

SCHEMA = """
CREATE TABLE IF NOT EXISTS received (
    serial TEXT NOT NULL,
    session TEXT NOT NULL,
    node TEXT NOT NULL,
    model TEXT NOT NULL,
    units INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    voucher TEXT NOT NULL,
    receipt TEXT NOT NULL,
    unix_s INTEGER NOT NULL,
    PRIMARY KEY (serial, session)
) STRICT;
"""


def received_from(path: Path) -> dict[str, int]:
    """Units by the peer id of the node that gave them. Raises ConfigError."""
    database = read_only(path)
    try:
        rows = database.execute("SELECT node, sum(units) FROM received GROUP BY node")
        return dict(rows)
    finally:
        database.close()
