"""What killed clients leave in the folder for temporary files, and what the next one does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from swarm.client.app import SwarmClient
from swarm.client.config import ClientSettings
from swarm.client.temporary_folder import LOCK_FILE, PREFIX, temporary_folder
from swarm.hivemind_network import HivemindNetwork, NetworkSettings

LOOPBACK = NetworkSettings(listen_addresses=("/ip4/127.0.0.1/tcp/0",))
CLIENT = """
import asyncio, sys
from swarm.client.app import SwarmClient
from swarm.client.config import ClientSettings

async def main():
    async with await SwarmClient.connect(ClientSettings(peers=(sys.argv[1],))):
        print("connected", flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


@asynccontextmanager
async def client_process(peer: str, temporary: Path) -> AsyncIterator[Process]:
    """A connected client; it leaves when its standard input ends."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CLIENT, peer),
        env={**os.environ, "TMPDIR": str(temporary)},
        stdin=PIPE,
        stdout=PIPE,
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"connected\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def folders(temporary: Path) -> set[Path]:
    return set(temporary.glob(f"{PREFIX}*"))


async def test_a_killed_client_is_cleaned_up_after_and_a_living_one_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    # Not ours to remove: without a lock, and with something else in its place.
    strange = [temporary / f"{PREFIX}{name}" for name in ("older", "pipe", "link")]
    for folder in strange:
        folder.mkdir()
    os.mkfifo(strange[1] / LOCK_FILE)
    (strange[2] / LOCK_FILE).symlink_to(tmp_path)
    seed = await HivemindNetwork.create(tmp_path / "seed.key", LOOPBACK)
    try:
        peer = f"{(await seed.addresses())[0]}/p2p/{seed.peer_id}"
        async with client_process(peer, temporary) as killed:
            (left,) = folders(temporary) - set(strange)
            async with client_process(peer, temporary) as living:
                (other,) = folders(temporary) - {left, *strange}
                killed.kill()
                await killed.wait()
                assert (left / "identity.key").exists()
                async with await SwarmClient.connect(ClientSettings(peers=(peer,))):
                    assert not left.exists()
                    assert (other / "identity.key").exists()
                    (own,) = folders(temporary) - {other, *strange}
                    # Nor does a client remove those of its own process.
                    async with await SwarmClient.connect(ClientSettings(peers=(peer,))):
                        assert own.exists()
                assert not own.exists()
                assert living.stdin is not None
                living.stdin.close()
                assert await living.wait() == 0
        assert folders(temporary) == set(strange)
    finally:
        await seed.close()


def test_a_client_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RuntimeError), temporary_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        raise RuntimeError
    assert folders(tmp_path) == set()
