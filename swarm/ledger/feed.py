"""A hash-chained list of our own events in SQLite: what was appended cannot be changed unseen.

``hash = SHA256(previous || index || kind || 0 || body)``, the index in 8 bytes, big endian.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

GENESIS = bytes(32)

SCHEMA = """
CREATE TABLE IF NOT EXISTS feed (
    position INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    body TEXT NOT NULL,
    hash BLOB NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Event:
    position: int
    kind: str
    body: str
    hash: bytes


class BrokenFeed(Exception):
    """The feed was changed after it was written."""


def event_hash(previous: bytes, position: int, kind: str, body: str) -> bytes:
    text = kind.encode() + b"\0" + body.encode()
    return hashlib.sha256(previous + position.to_bytes(8, "big") + text).digest()


def append(database: sqlite3.Connection, kind: str, body: Mapping[str, object]) -> Event:
    """Add an event; part of the transaction that is open."""
    length, head = head_of(database)
    text = json.dumps(body, separators=(",", ":"), sort_keys=True)
    event = Event(length, kind, text, event_hash(head, length, kind, text))
    database.execute(
        "INSERT INTO feed VALUES (?, ?, ?, ?)", (event.position, kind, text, event.hash)
    )
    return event


def head_of(database: sqlite3.Connection) -> tuple[int, bytes]:
    """Length and head."""
    row = database.execute("SELECT position, hash FROM feed ORDER BY position DESC LIMIT 1")
    latest = row.fetchone()
    return (latest[0] + 1, latest[1]) if latest is not None else (0, GENESIS)


def read(database: sqlite3.Connection) -> Iterator[Event]:
    """All events, oldest first."""
    rows = database.execute("SELECT position, kind, body, hash FROM feed ORDER BY position")
    for row in rows:
        yield Event(*row)


def verify(database: sqlite3.Connection) -> tuple[int, bytes]:
    """Length and head of an unbroken feed. Raises BrokenFeed that names the place."""
    length, head = 0, GENESIS
    for event in read(database):
        if event.position != length:
            raise BrokenFeed(f"event {length} is missing")
        head = event_hash(head, event.position, event.kind, event.body)
        if head != event.hash:
            raise BrokenFeed(f"event {length} was changed")
        length += 1
    return length, head
