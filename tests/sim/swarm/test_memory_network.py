from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swarm.memory_network import (
    LinkSettings,
    MemoryNetwork,
    MemoryPeer,
    MemorySettings,
    MemoryStream,
)
from swarm.ports import DirectoryEntry, Stream
from swarm.protocol.errors import NetworkError, PeerUnreachable
from swarm.protocol.identity import Identity
from swarm.protocol.records import NodeRecord, expected_key, sign_record
from swarm.virtual_time import LoopClock, run

MakeIdentity = Callable[[int], Identity]
MakeRecord = Callable[..., NodeRecord]
Simulate = Callable[..., None]


async def echo(stream: Stream) -> None:
    while True:
        size = await stream.receive_exactly(4)
        content = await stream.receive_exactly(int.from_bytes(size))
        await stream.send(size, content)


async def ask(stream: Stream, content: bytes) -> bytes:
    await stream.send(len(content).to_bytes(4), content)
    return await stream.receive_exactly(4 + len(content))


@pytest.fixture
def simulate(identity: MakeIdentity) -> Simulate:
    """Run ``story(network, client, server)`` in virtual time; the server echoes."""

    def simulation(
        story: Callable[[MemoryNetwork, MemoryPeer, MemoryPeer], Awaitable[None]],
        *,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        async def main() -> None:
            network = MemoryNetwork(seed, replace(MemorySettings(), **settings))
            client, server = network.join(identity(1)), network.join(identity(2))
            await server.serve("echo", echo)
            await story(network, client, server)
            for peer in (client, server):
                await peer.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}

        run(main())

    return simulation


def test_echo_and_identity(simulate: Simulate) -> None:
    async def story(network: MemoryNetwork, client: MemoryPeer, server: MemoryPeer) -> None:
        stream = await client.open(server.peer_id, "echo")
        assert stream.remote_peer == server.peer_id
        assert await ask(stream, b"content") == b"\0\0\0\7content"
        big = bytes(range(256)) * 4 * 4096  # 4 MiB, more than the window
        assert (await ask(stream, big))[4:] == big

    simulate(story)


def test_latency_is_paid_once_each_way(simulate: Simulate) -> None:
    async def story(network: MemoryNetwork, client: MemoryPeer, server: MemoryPeer) -> None:
        clock = LoopClock()
        stream = await client.open(server.peer_id, "echo")
        began_s = clock.monotonic_s()
        await ask(stream, b"x")
        assert clock.monotonic_s() - began_s == pytest.approx(0.1)

    simulate(story, link=LinkSettings(latency_s=0.05))


def test_streams_share_the_rate_of_a_link(simulate: Simulate) -> None:
    async def story(network: MemoryNetwork, client: MemoryPeer, server: MemoryPeer) -> None:
        clock = LoopClock()
        streams = [await client.open(server.peer_id, "echo") for _ in range(2)]
        began_s = clock.monotonic_s()
        await asyncio.gather(*(ask(stream, bytes(500_000)) for stream in streams))
        # 1 MB one way, and the second half of it back.
        assert clock.monotonic_s() - began_s == pytest.approx(1.5, rel=0.01)

    simulate(story, link=LinkSettings(rate_bytes_per_s=1e6))


def test_jitter_and_loss_delay_but_keep_the_order(simulate: Simulate) -> None:
    async def story(network: MemoryNetwork, client: MemoryPeer, server: MemoryPeer) -> None:
        clock = LoopClock()
        stream = await client.open(server.peer_id, "echo")
        began_s = clock.monotonic_s()
        for number in range(100):
            await stream.send(b"\0\0\0\2", number.to_bytes(2))
        for number in range(100):
            assert await stream.receive_exactly(6) == b"\0\0\0\2" + number.to_bytes(2)
        assert clock.monotonic_s() - began_s > 0.4

    simulate(story, seed=7, link=LinkSettings(latency_s=0.01, jitter_s=0.02, loss=0.3))


def test_a_sender_waits_for_a_reader(simulate: Simulate) -> None:
    async def story(network: MemoryNetwork, client: MemoryPeer, server: MemoryPeer) -> None:
        sent = 0

        async def silent(stream: Stream) -> None:
            await asyncio.sleep(100)
            await stream.receive_exactly(10 * 65536)

        await server.serve("silent", silent)
        stream = await client.open(server.peer_id, "silent")

        async def flood() -> None:
            nonlocal sent
            for _ in range(10):
                await stream.send(bytes(65536))
                sent += 1

        task = asyncio.create_task(flood())
        await asyncio.sleep(50)
        assert sent == 4
        await task

    simulate(story, window_bytes=4 * 65536)


def test_a_cancelled_read_loses_nothing(simulate: Simulate) -> None:
    async def story(network: MemoryNetwork, client: MemoryPeer, server: MemoryPeer) -> None:
        stream = await client.open(server.peer_id, "echo")
        await stream.send(b"\0\0\0\4", b"abcd")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await stream.receive_exactly(9)
        assert await stream.receive_exactly(8) == b"\0\0\0\4abcd"

    simulate(story)


def test_closing_delivers_what_was_sent_before(simulate: Simulate) -> None:
    async def story(network: MemoryNetwork, client: MemoryPeer, server: MemoryPeer) -> None:
        received = asyncio.get_running_loop().create_future()

        async def collect(stream: Stream) -> None:
            await asyncio.sleep(1)
            received.set_result(await stream.receive_exactly(5))
            with pytest.raises(NetworkError, match="closed"):
                await stream.receive_exactly(1)
            with pytest.raises(NetworkError, match="closed"):
                await stream.send(b"too late")

        await server.serve("collect", collect)
        stream = await client.open(server.peer_id, "collect")
        await stream.send(b"12345")
        await stream.close()
        await stream.close()
        assert await received == b"12345"

    simulate(story, link=LinkSettings(latency_s=0.05))


def test_a_crash_breaks_streams_after_the_latency(simulate: Simulate) -> None:
    async def story(network: MemoryNetwork, client: MemoryPeer, server: MemoryPeer) -> None:
        clock = LoopClock()
        stream = await client.open(server.peer_id, "echo")
        network.crash(server.peer_id)
        began_s = clock.monotonic_s()
        with pytest.raises(NetworkError, match="gone"):
            await stream.receive_exactly(1)
        assert clock.monotonic_s() - began_s == pytest.approx(0.05)
        with pytest.raises(NetworkError):
            await stream.send(b"x")
        with pytest.raises(PeerUnreachable):
            await client.open(server.peer_id, "echo")
        with pytest.raises(PeerUnreachable):
            await server.open(client.peer_id, "echo")

    simulate(story, link=LinkSettings(latency_s=0.05))


def test_a_cut_is_silent_and_heals(simulate: Simulate) -> None:
    async def story(network: MemoryNetwork, client: MemoryPeer, server: MemoryPeer) -> None:
        clock = LoopClock()
        stream = await client.open(server.peer_id, "echo")
        network.partition([server.peer_id])
        asyncio.get_running_loop().call_later(20, network.heal)
        assert (await ask(stream, b"x"))[4:] == b"x"
        assert clock.monotonic_s() == pytest.approx(20)

    simulate(story)


def test_a_long_cut_ends_streams_and_dials(simulate: Simulate) -> None:
    async def story(network: MemoryNetwork, client: MemoryPeer, server: MemoryPeer) -> None:
        clock = LoopClock()
        stream = await client.open(server.peer_id, "echo")
        network.cut(client.peer_id, server.peer_id)
        with pytest.raises(NetworkError, match="silent"):
            await ask(stream, b"x")
        assert clock.monotonic_s() == pytest.approx(30)
        with pytest.raises(PeerUnreachable):
            await client.open(server.peer_id, "echo")
        assert clock.monotonic_s() == pytest.approx(40)

    simulate(story)


def test_unknown_protocols_and_peers_are_refused(
    simulate: Simulate, identity: MakeIdentity
) -> None:
    async def story(network: MemoryNetwork, client: MemoryPeer, server: MemoryPeer) -> None:
        with pytest.raises(PeerUnreachable, match="nothing"):
            await client.open(server.peer_id, "nothing")
        with pytest.raises(PeerUnreachable):
            await client.open(identity(99).peer_id, "echo")

    simulate(story)


def test_a_failing_handler_only_ends_its_stream(
    simulate: Simulate, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(network: MemoryNetwork, client: MemoryPeer, server: MemoryPeer) -> None:
        async def fail(stream: Stream) -> None:
            raise RuntimeError("a bug")

        await server.serve("fail", fail)
        stream = await client.open(server.peer_id, "fail")
        with pytest.raises(NetworkError):
            await stream.receive_exactly(1)
        assert await ask(await client.open(server.peer_id, "echo"), b"x")

    simulate(story)
    assert "a bug" in caplog.text


# --- directory -----------------------------------------------------------------------------------
def test_records_are_found_until_they_expire(
    simulate: Simulate, identity: MakeIdentity, node_record: MakeRecord
) -> None:
    async def story(network: MemoryNetwork, client: MemoryPeer, server: MemoryPeer) -> None:
        clock = LoopClock()
        record = node_record(identity(2), expires_unix_s=int(clock.unix_s()) + 60)
        key, value = expected_key(record), sign_record(identity(2), record)
        assert await server.store(key, value, record.expires_unix_s)
        assert await client.get(key) == {
            server.peer_id: DirectoryEntry(value, record.expires_unix_s)
        }
        await asyncio.sleep(61)
        assert await client.get(key) == {}

    simulate(story)


def test_forged_records_are_dropped_where_they_are_stored_and_where_they_are_read(
    simulate: Simulate, identity: MakeIdentity, node_record: MakeRecord
) -> None:
    async def story(network: MemoryNetwork, client: MemoryPeer, server: MemoryPeer) -> None:
        record = node_record(identity(2), expires_unix_s=int(LoopClock().unix_s()) + 60)
        key, value = expected_key(record), sign_record(identity(2), record)
        assert not await client.store(key, value, record.expires_unix_s)
        assert not await server.store("elsewhere", value, record.expires_unix_s)
        evil = {client.peer_id: DirectoryEntry(value, record.expires_unix_s)}
        server.entries[key] = evil
        assert await client.get(key) == {}

    simulate(story)


def test_an_old_record_never_replaces_a_newer_one(
    simulate: Simulate, identity: MakeIdentity, node_record: MakeRecord
) -> None:
    async def story(network: MemoryNetwork, client: MemoryPeer, server: MemoryPeer) -> None:
        now = int(LoopClock().unix_s())
        old = node_record(identity(2), sequence=1, expires_unix_s=now + 60)
        new = node_record(identity(2), sequence=2, expires_unix_s=now + 61)
        key = expected_key(old)
        for record in (new, old):
            taken = await server.store(key, sign_record(identity(2), record), record.expires_unix_s)
            assert taken is (record is new)
        assert (await client.get(key))[server.peer_id].expires_unix_s == now + 61

    simulate(story)


def test_records_survive_some_of_their_keepers(
    identity: MakeIdentity, node_record: MakeRecord
) -> None:
    async def main() -> None:
        network = MemoryNetwork(3)
        peers = [network.join(identity(number)) for number in range(1, 21)]
        record = node_record(identity(1), expires_unix_s=int(LoopClock().unix_s()) + 60)
        key = expected_key(record)
        assert await peers[0].store(key, sign_record(identity(1), record), record.expires_unix_s)
        keepers = [peer for peer in peers if peer.entries]
        assert len(keepers) == 5
        for keeper in keepers[:4]:
            network.crash(keeper.peer_id)
        reader = next(peer for peer in peers if network.peer(peer.peer_id) and not peer.entries)
        assert list(await reader.get(key)) == [record.peer_id]
        network.crash(keepers[4].peer_id)
        assert await reader.get(key) == {}

    run(main())


# --- determinism ---------------------------------------------------------------------------------
STORY = Path(__file__).with_name("busy_network.py")


def trace(seed: int, hash_seed: str) -> str:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, str(STORY), str(seed)]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=60
    ).stdout


def test_a_seed_fixes_every_event() -> None:
    first = trace(1, "0")
    assert first.count("\n") > 150
    assert first == trace(1, "1") == trace(1, "12345")
    assert first != trace(2, "0")


def test_streams_do_not_pile_up(simulate: Simulate) -> None:
    async def story(network: MemoryNetwork, client: MemoryPeer, server: MemoryPeer) -> None:
        for _ in range(10):
            stream: MemoryStream = await client.open(server.peer_id, "echo")
            await stream.close()
        await asyncio.sleep(1)
        assert not client.streams
        assert not server.streams

    simulate(story)
