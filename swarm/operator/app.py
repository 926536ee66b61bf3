"""One operator's process: books, door, and what happens by the clock, wired together."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
from aiohttp import web

from swarm.ledger.notes import Checkpoint, Note
from swarm.ledger.tiles import TileFiles
from swarm.operator.api import OperatorApi
from swarm.operator.books import Books
from swarm.operator.cosigning import cosignatures
from swarm.operator.doors import OneThread
from swarm.operator.journal import Journal
from swarm.operator.settings import BOOKS_FILE, PUBLIC_FOLDER, OperatorSettings
from swarm.protocol.errors import ConfigError

logger = logging.getLogger(__name__)

DAY_S = 24 * 3600
SALT_BYTES = 32
LEAVE_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Operator:
    """Books with a clock; the door is opened by ``serve``."""

    def __init__(self, settings: OperatorSettings, books: Books, thread: OneThread) -> None:
        self._settings = settings
        self._books = books
        self._thread = thread
        self._tiles = TileFiles(settings.folder / PUBLIC_FOLDER)
        self._known_sizes: dict[bytes, int] = {}
        self._cosigned_at = -float("inf")
        self._expired_at = -float("inf")

    async def publish(self, session: aiohttp.ClientSession) -> None:
        """A checkpoint of what is committed, on disk as static files; cosigned once it is time."""
        note = await self._thread.run(self._publish, None)
        now = time.monotonic()
        due = now - self._cosigned_at >= self._settings.cosign_interval_s
        size = Checkpoint.parse(note.text).size
        if self._settings.witnesses and due and size:

            async def proof(old_size: int) -> list[bytes]:
                return await self._thread.run(
                    self._books.journal.tree.consistency_proof, old_size, size
                )

            signed = await cosignatures(
                session, self._settings.witnesses, self._known_sizes, note, proof
            )
            if signed:
                plain = Note(note.text, note.signatures[:1])
                await self._thread.run(self._publish, plain.with_signatures(signed))
            if len(signed) == len(self._settings.witnesses):
                self._cosigned_at = now

    def _publish(self, cosigned: Note | None) -> Note:
        if cosigned is not None:
            self._books.cosigned(cosigned, int(time.time()))
        note = cosigned or self._books.checkpoint(self._settings.log_key, int(time.time()))
        journal = self._books.journal
        size = Checkpoint.parse(note.text).size
        self._tiles.publish(journal.tree, journal.leaves, size, note)
        return note

    async def upkeep(self) -> None:
        """Give out and back what has waited long enough."""
        now = int(time.time())
        while await self._thread.run(self._books.release_expired, now):
            pass
        await self._thread.run(self._books.vest, now)
        await self._thread.run(self._books.share_uptime, now)
        if time.monotonic() - self._expired_at >= DAY_S:
            await self._thread.run(self._books.expire_credits, now)
            self._expired_at = time.monotonic()

    async def keep_publishing(self, session: aiohttp.ClientSession) -> None:
        while True:
            await self.publish(session)
            await asyncio.sleep(self._settings.checkpoint_interval_s)

    async def keep_up(self) -> None:
        while True:
            await self.upkeep()
            await asyncio.sleep(self._settings.upkeep_interval_s)


async def run_operator(
    settings: OperatorSettings, started: Callable[[str], None], leaving: asyncio.Event
) -> None:
    """Serve until ``leaving``. Raises ConfigError when the folder is in use, or the port."""
    with _only_process(settings.folder):
        thread = OneThread("operator-books")
        try:
            journal = await thread.run(Journal.open, settings.folder / BOOKS_FILE)
            books = Books(journal, settings.policy, settings.operator_key)
            salt = await thread.run(_salt, journal)
            operator = Operator(settings, books, thread)
            application = OperatorApi(settings, books, thread, salt).application()
            async with (
                serve(application, settings.host, settings.port) as url,
                aiohttp.ClientSession() as session,
                asyncio.TaskGroup() as tasks,
            ):
                clocks = [
                    tasks.create_task(operator.keep_publishing(session)),
                    tasks.create_task(operator.keep_up()),
                ]
                started(url)
                await leaving.wait()
                for clock in clocks:
                    clock.cancel()
            await thread.run(journal.close)
        finally:
            thread.close()


@asynccontextmanager
async def serve(application: web.Application, host: str, port: int) -> AsyncIterator[str]:
    """Listen, and give the URL; leaving ends running requests after a moment."""
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=5.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        actual_host, actual_port = runner.addresses[0][:2]
        shown = f"[{actual_host}]" if ":" in actual_host else actual_host
        yield f"http://{shown}:{actual_port}"
    finally:
        await runner.cleanup()


@contextmanager
def leave_on_signals(leaving: asyncio.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set ``leaving``."""
    loop = asyncio.get_running_loop()
    for number in LEAVE_SIGNALS:
        loop.add_signal_handler(number, leaving.set)
    try:
        yield
    finally:
        for number in LEAVE_SIGNALS:
            loop.remove_signal_handler(number)


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Two processes over the same books would each have half of the tree in memory."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"a running operator uses {folder}") from error
        yield
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _salt(journal: Journal) -> bytes:
    """Makes pseudonyms of networks that only this operator can make."""
    salt = journal.meta("network salt")
    if salt is None:
        salt = secrets.token_bytes(SALT_BYTES)
        journal.set_meta("network salt", salt)
    return salt
