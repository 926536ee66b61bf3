"""One process for a key; the first signal leaves, the second one ends."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from pathlib import Path

import pytest

from swarm.node.process import held_identity, leave_on_signals
from swarm.protocol.errors import ConfigError


def test_a_key_is_made_once_and_only_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "identity.key"
    with held_identity(path) as first:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with held_identity(path) as second:
        assert second.peer_id == first.peer_id


def test_a_key_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    with (
        held_identity(path),
        pytest.raises(ConfigError, match="give each node its own"),
        held_identity(path),
    ):
        pass


def test_a_key_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"cannot (use|read) the key file"),
        held_identity(tmp_path / "file" / "identity.key"),
    ):
        pass


async def test_the_first_signal_asks_to_leave_and_the_second_cancels() -> None:
    leaving = asyncio.Event()
    seen: list[str] = []

    async def live() -> None:
        with leave_on_signals(leaving):
            os.kill(os.getpid(), signal.SIGTERM)
            await leaving.wait()
            seen.append("leaving")
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()

    task = asyncio.create_task(live())
    await asyncio.wait((task,))
    assert task.cancelled()
    assert seen == ["leaving"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
