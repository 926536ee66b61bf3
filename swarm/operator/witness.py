"""A witness: cosigns the checkpoints of logs that it knows, and never two that contradict.

C2SP tlog-witness. What it has seen last is on disk before anybody gets a signature, so a restored
log or a log with two faces is refused, also after a crash. Whoever runs one needs no more trust in
the operator than anybody else.
"""

from __future__ import annotations

import asyncio
import base64
import os
import sqlite3
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from swarm.ledger.notes import (
    MAX_NOTE_BYTES,
    MAX_PROOF_HASHES,
    Checkpoint,
    KeyType,
    Note,
    VerifierKey,
    cosign,
    decimal,
    parse_hash,
    verified_checkpoint,
)
from swarm.operator.app import serve
from swarm.operator.doors import OneThread, new_application, read_body
from swarm.protocol.errors import ConfigError, ErrorCode, ProtocolError
from swarm.protocol.identity import Identity
from swarm.protocol.merkle import EMPTY_ROOT, check_consistency

WITNESS_SETTINGS_FILE = "witness.toml"
WITNESS_KEY_FILE = "witness.key"
WITNESS_STATE_FILE = "witness.sqlite"
DEFAULT_WITNESS_LISTEN = "127.0.0.1:8441"
MAX_SUBMISSION_BYTES = MAX_NOTE_BYTES + (MAX_PROOF_HASHES + 1) * 64


@dataclass(frozen=True, slots=True)
class Answer:
    """HTTP status and body of add-checkpoint."""

    status: int
    text: str = ""
    content_type: str = "text/plain"


class Witness:
    """Its state, and the one decision that it takes. Not thread-safe."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        identity: Identity,
        name: str,
        logs: Mapping[str, VerifierKey],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._db = connection
        self._identity = identity
        self._name = name
        self._logs = logs
        self._now = now
        connection.execute(
            "CREATE TABLE IF NOT EXISTS seen (origin TEXT PRIMARY KEY, size INTEGER NOT NULL,"
            " root BLOB NOT NULL, note TEXT NOT NULL) WITHOUT ROWID"
        )

    @classmethod
    def open(
        cls, path: Path, identity: Identity, name: str, logs: Mapping[str, VerifierKey]
    ) -> Witness:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        return cls(connection, identity, name, logs)

    def close(self) -> None:
        self._db.close()

    def seen(self, origin: str) -> tuple[int, bytes]:
        """Size and root of the newest checkpoint that we cosigned for a log."""
        row = self._db.execute("SELECT size, root FROM seen WHERE origin = ?", (origin,)).fetchone()
        return row or (0, EMPTY_ROOT)

    def add_checkpoint(self, body: str) -> Answer:
        """Statuses as the specification has them; never raises for what is in ``body``."""
        try:
            old_size, proof, note, origin = _parse_submission(body)
        except ProtocolError:
            return Answer(400)
        log = self._logs.get(origin)
        if log is None:
            return Answer(404)
        try:
            checkpoint = verified_checkpoint(note, log)
        except ProtocolError:
            return Answer(403)
        if old_size > checkpoint.size:
            return Answer(400)
        self._db.execute("BEGIN IMMEDIATE")
        try:
            answer = self._decide(old_size, proof, note, checkpoint)
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        return answer

    def _decide(
        self, old_size: int, proof: list[bytes], note: Note, checkpoint: Checkpoint
    ) -> Answer:
        size, root = self.seen(checkpoint.origin)
        if old_size != size:
            return Answer(409, f"{size}\n", "text/x.tlog.size")
        if size == checkpoint.size and size and root != checkpoint.root:
            return Answer(409, f"{size}\n", "text/x.tlog.size")
        try:
            check_consistency(size, root, checkpoint.size, checkpoint.root, proof)
        except ProtocolError:
            return Answer(422)
        self._db.execute(
            "INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?)",
            (checkpoint.origin, checkpoint.size, checkpoint.root, str(note)),
        )
        signature = cosign(note.text, self._identity.private_key, self._name, int(self._now()))
        return Answer(200, signature.line)


def _parse_submission(body: str) -> tuple[int, list[bytes], Note, str]:
    """Old size, proof, note and the origin in its first line. Raises ProtocolError."""
    head, separator, rest = body.partition("\n\n")
    old, *hashes = head.split("\n")
    if not separator or not old.startswith("old ") or len(hashes) > MAX_PROOF_HASHES:
        raise ProtocolError(ErrorCode.BAD_FIELD, "no submission of a checkpoint")
    note = Note.parse(rest)
    proof = [parse_hash(line) for line in hashes]
    return decimal(old.removeprefix("old ")), proof, note, note.text.split("\n", 1)[0]


@dataclass(frozen=True, slots=True)
class WitnessSettings:
    """Read from a witness's folder."""

    folder: Path
    name: str
    identity: Identity
    host: str
    port: int
    logs: Mapping[str, VerifierKey]

    @property
    def verifier(self) -> VerifierKey:
        return VerifierKey(self.name, KeyType.COSIGNATURE, self.identity.public_key_bytes)


def create_witness(folder: Path, name: str, logs: list[str], listen: str) -> WitnessSettings:
    """Make a key and settings. Raises ConfigError, and overwrites nothing."""
    keys = ", ".join(f'"{text}"' for text in logs)
    try:
        for text in logs:
            VerifierKey.parse(text)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / WITNESS_SETTINGS_FILE).open("x", encoding="utf-8") as file:
            file.write(f'name = "{name}"\nlisten = "{listen}"\nlogs = [{keys}]\n')
        Identity.generate().save(folder / WITNESS_KEY_FILE)
    except FileExistsError as error:
        raise ConfigError(f"{folder} is a witness's folder already") from error
    except OSError as error:
        raise ConfigError(f"cannot make {folder}: {error.strerror}") from error
    except ProtocolError as error:
        raise ConfigError(f"a log is given by its verifier key: {error.detail}") from error
    return load_witness(folder)


def load_witness(folder: Path) -> WitnessSettings:
    path = folder / WITNESS_SETTINGS_FILE
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        if unknown := set(content) - {"name", "listen", "logs"}:
            raise ConfigError(f"{path}: unknown setting {sorted(unknown)[0]!r}")
        keys = [VerifierKey.parse(str(text)) for text in content["logs"]]
        host, _, port = str(content.get("listen", DEFAULT_WITNESS_LISTEN)).rpartition(":")
        settings = WitnessSettings(
            folder,
            str(content["name"]),
            Identity.load(folder / WITNESS_KEY_FILE),
            host.strip("[]"),
            int(port),
            {key.name: key for key in keys},
        )
        str(settings.verifier)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; swarm witness init makes a new folder"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: missing or wrong: {error}") from error
    except ProtocolError as error:
        raise ConfigError(f"{path}: {error.detail}") from error
    return settings


def witness_application(witness: Witness, thread: OneThread) -> web.Application:
    async def add_checkpoint(request: web.Request) -> web.Response:
        body = await read_body(request)
        if len(body) > MAX_SUBMISSION_BYTES:
            raise ProtocolError(ErrorCode.TOO_LARGE)
        try:
            text = body.decode()
        except UnicodeDecodeError:
            return web.Response(status=400)
        answer = await thread.run(witness.add_checkpoint, text)
        return web.Response(
            status=answer.status, text=answer.text, content_type=answer.content_type
        )

    async def latest(request: web.Request) -> web.Response:
        """What we have seen of each log, for whoever compares witnesses."""
        origin = request.query.get("origin", "")
        size, root = await thread.run(witness.seen, origin)
        return web.json_response({"size": size, "root": base64.b64encode(root).decode()})

    application = new_application()
    application.router.add_routes(
        [web.post("/add-checkpoint", add_checkpoint), web.get("/latest", latest)]
    )
    return application


async def run_witness(
    settings: WitnessSettings, started: Callable[[str], None], leaving: asyncio.Event
) -> None:
    """Serve until ``leaving``."""
    thread = OneThread("witness")
    try:
        witness = await thread.run(
            Witness.open,
            settings.folder / WITNESS_STATE_FILE,
            settings.identity,
            settings.name,
            settings.logs,
        )
        async with serve(witness_application(witness, thread), settings.host, settings.port) as url:
            started(url)
            await leaving.wait()
        await thread.run(witness.close)
    finally:
        thread.close()
