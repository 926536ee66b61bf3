"""A SQLite database written by one thread: many small writes share one commit.

WAL with ``synchronous=FULL``: what was awaited is on the disk, also when the power fails. While one
commit runs the next writes gather, so that a busy writer commits often enough and not more often
than the disk can.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from swarm.protocol.errors import ConfigError

Write = Callable[[sqlite3.Connection], None]
MOST_PER_COMMIT = 256


def open_database(path: Path, schema: str) -> sqlite3.Connection:
    """Open or create a database that only its owner can read. Raises ConfigError."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("PRAGMA busy_timeout=5000")
        database.executescript(schema)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"cannot open {path}: {error}") from error
    return database


def read_only(path: Path) -> sqlite3.Connection:
    """Open an existing database to look at it. Raises ConfigError."""
    try:
        if not path.is_file():
            raise ConfigError(f"there is no file {path}: nothing was written there yet")
        database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        database.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return database


class CommitThread:
    """Runs writes in the order in which they were asked for, off the event loop."""

    def __init__(self, path: Path, schema: str) -> None:
        self._database = open_database(path, schema)
        self._queue: queue.SimpleQueue[tuple[Write, asyncio.Future[None]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="swarm-ledger", daemon=True)
        self._thread.start()
        self._closed = False

    async def write(self, write: Write) -> None:
        """Returns when it is on the disk. Cancelling does not undo it. Raises sqlite3.Error."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.put((write, future))
        await asyncio.shield(future)

    async def close(self) -> None:
        """Write what is still waiting, and close; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        self._database.close()

    def _run(self) -> None:
        ended = False
        while not ended:
            batch: list[tuple[Write, asyncio.Future[None]]] = []
            work = self._queue.get()
            while True:
                if work is None:
                    ended = True
                    break
                batch.append(work)
                if len(batch) >= MOST_PER_COMMIT:
                    break
                try:
                    work = self._queue.get_nowait()
                except queue.Empty:
                    break
            if batch:
                self._commit(batch)

    def _commit(self, batch: list[tuple[Write, asyncio.Future[None]]]) -> None:
        """All of a batch, or, when one of them fails, each by itself."""
        try:
            self._transaction([write for write, _ in batch])
        except Exception as error:  # the one place for writes: who asked for it gets it
            if len(batch) == 1:
                _settle(batch[0][1], error)
                return
            for each in batch:
                self._commit([each])
            return
        for _, future in batch:
            _settle(future, None)

    def _transaction(self, writes: list[Write]) -> None:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            for write in writes:
                write(self._database)
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise


class DirectCommits:
    """The same in memory and at once: for simulations, where no other thread may take time."""

    def __init__(self, schema: str) -> None:
        self.database = sqlite3.connect(":memory:", isolation_level=None)
        self.database.executescript(schema)

    async def write(self, write: Write) -> None:
        write(self.database)

    async def close(self) -> None:
        """Nothing: whoever made it may still want to look."""


class Commits(Protocol):
    """Where a ledger is written to."""

    async def write(self, write: Write) -> None:
        """Returns when it is safe."""

    async def close(self) -> None: ...


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    def finish(*_: Any) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    with contextlib.suppress(RuntimeError):  # the loop may be closed by now
        future.get_loop().call_soon_threadsafe(finish)
