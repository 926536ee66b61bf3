"""How the owner talks to a running node: a Unix socket beside its key, for its user alone.

One JSON object per line, either way. ``{"command": "status"}`` and ``drain`` are answered by the
node's status; ``owner``, ``pause`` (``for_s``: seconds, or null until ``resume``), ``resume`` and
``limits`` (``changes``: an object) by what the owner's page shows, with the status in it. Errors
are ``{"error": ...}``. The socket's end tells that the node has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swarm.catalogue.download import Progress
from swarm.node.donor.guard import Guard
from swarm.node.view import NodeStatus
from swarm.protocol.errors import ConfigError, UsageError

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 8 * 1024
MAX_ANSWER_BYTES = 256 * 1024
MAX_CONNECTIONS = 16
ANSWER_TIMEOUT_S = 10.0
POLL_PERIOD_S = 1.0
UNKNOWN_COMMAND = "unknown command; update this program or the node"


def control_path(identity_file: Path) -> Path:
    """The socket of the node with this key."""
    return identity_file.with_name(identity_file.name + ".control")


# --- the node's side -----------------------------------------------------------------------------
@asynccontextmanager
async def controlled(
    path: Path,
    status: Callable[[], NodeStatus],
    drain: Callable[[], None],
    guard: Guard | None = None,
) -> AsyncIterator[None]:
    """Answer the owner meanwhile. For who holds the key: a socket found at ``path`` is a dead one.

    A path that the system refuses is logged, and the node works without: signals still reach it.
    """
    try:
        listener = _listen(path)
    except OSError as error:
        log.warning("no control socket at %s: %s", path, error)
        yield
        return
    desk = _Desk(status, drain, guard)
    server = await asyncio.start_unix_server(desk.serve, sock=listener, limit=MAX_REQUEST_BYTES)
    try:
        yield
    finally:
        server.close()
        _remove(path)
        await desk.close()


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _listen(path: Path) -> socket.socket:
    _remove(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(_short(path))
        # Nobody can connect before listen(): the mode is in force in time.
        path.chmod(0o600)
        listener.listen(MAX_CONNECTIONS)
    except OSError:
        listener.close()
        raise
    return listener


def _short(path: Path) -> str:
    """The shorter of two names: the system takes about 100 bytes."""
    return min(str(path.absolute()), os.path.relpath(path), key=len)


class _Desk:
    """Serves the connections and closes what is left of them at the end."""

    def __init__(
        self, status: Callable[[], NodeStatus], drain: Callable[[], None], guard: Guard | None
    ) -> None:
        self._status = status
        self._drain = drain
        self._guard = guard
        self._tasks: set[asyncio.Task[Any]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._tasks) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._tasks.add(task)
        try:
            while line := await reader.readline():
                writer.write(json.dumps(self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError) as error:  # ValueError: a line that never ends
            log.info("control connection: %s", error)
        except asyncio.CancelledError:
            pass  # only close() cancels, and waits for the end: nobody is left to be told
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self._tasks.discard(task)

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        match request:
            case {"command": "status"}:
                pass
            case {"command": "drain"}:
                self._drain()
            case {"command": str()} if self._guard is not None:
                try:
                    return self._owner(self._guard, request)
                except ConfigError as error:
                    return {"error": str(error)}
            case _:
                return {"error": UNKNOWN_COMMAND}
        return asdict(self._status())

    def _owner(self, guard: Guard, request: dict[str, Any]) -> dict[str, Any]:
        match request:
            case {"command": "owner"}:
                pass
            case {"command": "pause", "for_s": None | int() | float() as duration_s}:
                guard.pause(duration_s)
            case {"command": "resume"}:
                guard.resume()
            case {"command": "limits", "changes": dict() as changes}:
                guard.change_limits(changes)
            case _:
                return {"error": UNKNOWN_COMMAND}
        return {**guard.to_json(), "status": asdict(self._status())}

    async def close(self) -> None:
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


# --- the owner's side ----------------------------------------------------------------------------
class NodeControl:
    """A connection to the running node; blocking, for short commands."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")

    def ask(self, command: str) -> NodeStatus | None:
        """The node's status after the command; None when the node has ended meanwhile."""
        answer = self.ask_owner(command)
        if answer is None:
            return None
        known = {name: answer[name] for name in NodeStatus.__slots__ if name in answer}
        known = {name: tuple(v) if isinstance(v, list) else v for name, v in known.items()}
        if isinstance(known.get("fetching"), dict):
            known["fetching"] = Progress(**known["fetching"])
        return NodeStatus(**known)

    def ask_owner(self, command: str, **details: Any) -> dict[str, Any] | None:
        """The node's answer as it is; None when the node has ended. Raises UsageError."""
        try:
            request = {"command": command, **details}
            self._connection.sendall(json.dumps(request).encode() + b"\n")
            line = self._lines.readline(MAX_ANSWER_BYTES)
        except (BrokenPipeError, ConnectionError):
            return None
        except TimeoutError:
            raise UsageError("the node does not answer; is it stopped (Ctrl-Z)?") from None
        if not line:
            return None
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UsageError(f"the node refuses: {answer['error']}")
        return answer

    def close(self) -> None:
        self._lines.close()
        self._connection.close()


@contextlib.contextmanager
def running_node(identity_file: Path) -> Iterator[NodeControl]:
    """Connect to the node with this key. Raises UsageError when none is running."""
    path = control_path(identity_file)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(ANSWER_TIMEOUT_S)
    try:
        connection.connect(_short(path))
    except OSError as error:
        connection.close()
        raise UsageError(
            f"no running node with the key {identity_file} ({error.strerror}); "
            "name its key with --identity or its settings with --config"
        ) from None
    control = NodeControl(connection)
    try:
        yield control
    finally:
        control.close()
