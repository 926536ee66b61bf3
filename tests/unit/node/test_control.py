"""The owner's socket: who may use it, what it answers, and that nothing remains of it."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.node.control import (
    MAX_CONNECTIONS,
    MAX_REQUEST_BYTES,
    control_path,
    controlled,
    running_node,
)
from swarm.node.view import NodeStatus
from swarm.protocol.errors import UsageError

STATUS = NodeStatus(state="online", model="m", coverage=(1, 2), sessions=3)


@pytest.fixture
def key() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:  # short: a socket's name has 100 bytes
        yield Path(folder, "identity.key")


async def test_status_and_drain(key: Path) -> None:
    drained = asyncio.Event()

    def talk() -> list[NodeStatus | None]:
        with running_node(key) as node:
            return [node.ask("status"), node.ask("drain")]

    async with controlled(control_path(key), lambda: STATUS, drained.set):
        assert stat.S_IMODE(control_path(key).stat().st_mode) == 0o600
        assert await asyncio.to_thread(talk) == [STATUS, STATUS]
        assert drained.is_set()
    assert list(key.parent.iterdir()) == []


async def test_the_end_of_the_node_is_seen(key: Path) -> None:
    asked, ended = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def talk() -> NodeStatus | None:
        with running_node(key) as node:
            node.ask("status")
            loop.call_soon_threadsafe(asked.set)
            asyncio.run_coroutine_threadsafe(ended.wait(), loop).result()
            return node.ask("status")

    async with controlled(control_path(key), lambda: STATUS, asked.set):
        talking = asyncio.create_task(asyncio.to_thread(talk))
        await asked.wait()
    ended.set()
    assert await talking is None


def test_no_running_node_is_said(key: Path) -> None:
    with pytest.raises(UsageError, match="no running node"), running_node(key):
        pass


async def test_a_socket_left_by_a_killed_node_is_replaced(key: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(control_path(key)))
    with pytest.raises(UsageError, match="no running node"), running_node(key):
        pass
    async with controlled(control_path(key), lambda: STATUS, lambda: None):

        def talk() -> NodeStatus | None:
            with running_node(key) as node:
                return node.ask("status")

        assert await asyncio.to_thread(talk) == STATUS


async def test_a_path_that_the_system_refuses_is_no_reason_not_to_serve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / ("long" * 50) / "identity.key.control"
    async with controlled(path, lambda: STATUS, lambda: None):
        assert "no control socket" in caplog.text


@pytest.mark.parametrize(
    "line", [b"{}", b"no json", b'{"command": "fly"}', b"[" * 500, b"\xff\xfe", b'"drain"']
)
async def test_nonsense_is_answered_and_drains_nothing(key: Path, line: bytes) -> None:
    drained = asyncio.Event()
    async with controlled(control_path(key), lambda: STATUS, drained.set):
        reader, writer = await asyncio.open_unix_connection(str(control_path(key)))
        writer.write(line + b"\n")
        assert "unknown command" in json.loads(await reader.readline())["error"]
        writer.close()
        await writer.wait_closed()
    assert not drained.is_set()


async def test_endless_lines_and_crowds_are_turned_away(key: Path) -> None:
    async with controlled(control_path(key), lambda: STATUS, lambda: None):
        reader, writer = await asyncio.open_unix_connection(str(control_path(key)))
        writer.write(b"x" * (4 * MAX_REQUEST_BYTES))
        assert await reader.read() == b""
        writer.close()
        held = []
        for _ in range(MAX_CONNECTIONS):
            held.append(await asyncio.open_unix_connection(str(control_path(key))))
            held[-1][1].write(b'{"command": "status"}\n')
            await held[-1][0].readline()
        reader, writer = await asyncio.open_unix_connection(str(control_path(key)))
        assert await reader.read() == b""
        for _, each in (*held, (reader, writer)):
            each.close()


def test_a_deep_folder_is_reached_by_its_shorter_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("a" * 60) / ("b" * 60)
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)

    async def talk() -> None:
        key = folder / "identity.key"
        async with controlled(control_path(key), lambda: STATUS, lambda: None):

            def ask() -> NodeStatus | None:
                with running_node(key) as node:
                    return node.ask("status")

            assert await asyncio.to_thread(ask) == STATUS

    asyncio.run(talk())
