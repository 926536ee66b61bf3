"""Finding the swarm again without a seed, or with a clock that is wrong; real peers."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import pytest

from swarm.cached_peers import load_peers, save_peers, worth_keeping
from swarm.clock_offset import ClockOffsets, CorrectedClock, describe_offset
from swarm.hivemind_network import HivemindNetwork, NetworkSettings
from swarm.hivemind_network.dht_clock import DHT_CLOCK
from swarm.membership import Announcer, read_nodes
from swarm.nodes_view import NodesView
from swarm.ports import Clock
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import Identity
from swarm.protocol.records import NodeRecord, NodeState, shard_key
from swarm.protocol.tensors import DType
from swarm.virtual_time import LoopClock

LOOPBACK = NetworkSettings(listen_addresses=("/ip4/127.0.0.1/tcp/0",), dial_timeout_s=5)
HONEST_PEER = Path(__file__).with_name("honest_peer.py")
REVISION = b"r" * 32


@pytest.fixture(autouse=True)
def own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DHT_CLOCK, "offset_s", 0.0)


@asynccontextmanager
async def running(
    folder: Path, name: str, settings: NetworkSettings = LOOPBACK
) -> AsyncIterator[HivemindNetwork]:
    Identity.load_or_create(folder / name)
    network = await HivemindNetwork.create(folder / name, settings)
    try:
        yield network
    finally:
        await network.close()


@asynccontextmanager
async def announcing(
    folder: Path, name: str, network: HivemindNetwork, clock: Clock
) -> AsyncIterator[Announcer]:
    identity = Identity.load_or_create(folder / name)
    record = NodeRecord(
        peer_id=identity.peer_id,
        model_name="model",
        model_revision=REVISION,
        number_of_blocks=30,
        shards=1,
        first_block=0,
        end_block=10,
        state=NodeState.ONLINE,
        dtype=DType.FLOAT32,
        minimum_version=1,
        maximum_version=1,
        sequence=0,
        expires_unix_s=0,
        addresses=tuple(await network.addresses()),
    )
    announcer = Announcer(identity, network, clock, record, hidden_size=576)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(announcer.run())
        await announcer.announced()
        yield announcer
        task.cancel()


async def test_a_restart_needs_no_seed(tmp_path: Path) -> None:
    peers_file = tmp_path / "b.peers"
    async with AsyncExitStack() as stack:
        seed = await stack.enter_async_context(running(tmp_path, "seed"))
        address = f"{(await seed.addresses())[0]}/p2p/{seed.peer_id}"
        joining = replace(LOOPBACK, initial_peers=(address,))
        async with (
            running(tmp_path, "a", joining) as a,
            announcing(tmp_path, "a", a, LoopClock()),
        ):
            async with running(tmp_path, "b", joining) as b:
                records = await read_nodes(b, REVISION, LoopClock())
                assert [record.peer_id for record in records] == [a.peer_id]
                save_peers(peers_file, worth_keeping(records, own=b.peer_id))
            await seed.close()
            with pytest.raises(NetworkError, match="no initial peer answers"):
                await HivemindNetwork.create(tmp_path / "b", joining)
            for initial in ((address,), ()):
                again = replace(
                    LOOPBACK, initial_peers=initial, fallback_peers=load_peers(peers_file)
                )
                async with running(tmp_path, "b", again) as b:
                    view = NodesView(b, LoopClock(), REVISION)
                    await view.read()
                    assert [record.peer_id for record in view.records()] == [a.peer_id]


async def test_dead_cached_peers_do_not_keep_a_node_from_starting(tmp_path: Path) -> None:
    dead = Identity.generate().peer_id
    settings = replace(LOOPBACK, fallback_peers=(f"/ip4/127.0.0.1/tcp/9/p2p/{dead}",))
    async with running(tmp_path, "alone", settings) as alone:
        with pytest.raises(NetworkError):
            await HivemindNetwork.create(
                tmp_path / "alone", replace(settings, initial_peers=settings.fallback_peers)
            )
        assert await read_nodes(alone, REVISION, LoopClock()) == []


@pytest.mark.parametrize("error_s", [600.0, -600.0])
async def test_a_clock_that_is_ten_minutes_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_s: float
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(HONEST_PEER), str(tmp_path), stdin=PIPE, stdout=PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = (await process.stdout.readline()).decode().strip()
        right = time.time
        monkeypatch.setattr(time, "time", lambda: right() + error_s)
        joining = replace(LOOPBACK, initial_peers=(address,))
        async with running(tmp_path, "wrong", joining) as network:
            assert network.clock_offset_s == pytest.approx(-error_s, abs=2)
            offsets = ClockOffsets(LoopClock())
            offsets.believe(network.clock_offset_s)
            words = "fast" if error_s > 0 else "slow"
            assert words in describe_offset(offsets.offset_s)
            clock = CorrectedClock(LoopClock(), offsets)
            async with announcing(tmp_path, "wrong", network, clock):
                assert len(await read_nodes(network, REVISION, clock)) == 1
                process.stdin.write(f"{shard_key(REVISION, 0)}\n".encode())
                read_by_other = (await process.stdout.readline()).decode().split()
                assert read_by_other == [network.peer_id]
    finally:
        process.stdin.close()
        await process.wait()
