"""The texts of policies that vouchers name by their digest: a table in a node's and a user's books.

A digest convinces nobody who does not know what it is of; whoever opened or took a session knows.
"""

from __future__ import annotations

import sqlite3

from swarm.ledger.feed import BrokenFeed
from swarm.protocol.errors import DecodeError
from swarm.protocol.policy import Policy, policy_digest

SCHEMA = """
CREATE TABLE IF NOT EXISTS policy (
    digest TEXT PRIMARY KEY,
    content TEXT NOT NULL
) STRICT;
"""


def remember(database: sqlite3.Connection, content: bytes) -> None:
    """Keep a policy as it travelled; part of the transaction that is open."""
    if content:
        database.execute(
            "INSERT OR IGNORE INTO policy VALUES (?, ?)",
            (policy_digest(content).hex(), content.decode("ascii")),
        )


def known(database: sqlite3.Connection) -> dict[str, str]:
    """Digest in hexadecimal to text. Raises BrokenFeed for a text that was changed."""
    found = dict(database.execute("SELECT digest, content FROM policy"))
    for digest, content in found.items():
        if policy_digest(content.encode()).hex() != digest:
            raise BrokenFeed(f"the policy {digest[:16]} was changed")
    return found


def described(digest: str, texts: dict[str, str]) -> str:
    """A policy for people: its terms where the text is known."""
    if not digest:
        return "no policy"
    try:
        policy = Policy.from_bytes(texts.get(digest, "").encode())
    except DecodeError:
        policy = None
    return policy.describe() if policy is not None else f"the policy with SHA-256 {digest}"
