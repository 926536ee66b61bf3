"""Real peers on loopback: what libp2p and hivemind do, and what hostile peers cannot."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

import msgpack
import psutil
import pytest

from swarm.hivemind_network import HivemindNetwork, NetworkSettings
from swarm.hivemind_network.daemon import start_daemon, stop_daemon
from swarm.hivemind_network.directory import BoundedSerializer, SignedRecords, directory_id
from swarm.hivemind_network.relay_daemon import ASKING, relays
from swarm.hivemind_network.relays import reserve
from swarm.hivemind_network.requests import connect
from swarm.ports import Stream
from swarm.protocol.errors import NetworkError, PeerUnreachable
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.records import NodeRecord, NodeState, expected_key, sign_record
from swarm.protocol.tensors import DType
from swarm.record_validation import RecordChecker

# isort: split
# After our own module, which keeps the training half of hivemind out.
from hivemind.dht.crypto import DHTRecord
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2PHandlerError, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.serializer import MSGPackSerializer

LOOPBACK = NetworkSettings(listen_addresses=("/ip4/127.0.0.1/tcp/0",), dial_timeout_s=5)
HONEST_PEER = Path(__file__).with_name("honest_peer.py")


async def echo(stream: Stream) -> None:
    while True:
        size = await stream.receive_exactly(4)
        await stream.send(size, await stream.receive_exactly(int.from_bytes(size)))


async def ask(stream: Stream, content: bytes) -> bytes:
    await stream.send(len(content).to_bytes(4), content)
    size = int.from_bytes(await stream.receive_exactly(4))
    return await stream.receive_exactly(size)


async def full_address(network: HivemindNetwork) -> str:
    return f"{(await network.addresses())[0]}/p2p/{network.peer_id}"


def node_record(identity: Identity, **changes: Any) -> NodeRecord:
    record = NodeRecord(
        peer_id=identity.peer_id,
        model_name="model",
        model_revision=b"r" * 32,
        number_of_blocks=30,
        shards=1,
        first_block=0,
        end_block=10,
        state=NodeState.ONLINE,
        dtype=DType.FLOAT32,
        minimum_version=1,
        maximum_version=1,
        sequence=1,
        expires_unix_s=int(time.time()) + 60,
    )
    return replace(record, **changes)


def nested_tuples(levels: int) -> bytes:
    """What ends a process that decodes it with hivemind's own serializer."""
    packed: bytes = msgpack.packb([])
    for _ in range(levels):
        packed = msgpack.packb([msgpack.ExtType(0x40, packed)])
    return packed


@asynccontextmanager
async def peers(
    folder: Path, count: int, settings: NetworkSettings = LOOPBACK
) -> AsyncIterator[tuple[list[Identity], list[HivemindNetwork]]]:
    """The first is the others' initial peer. Checks that nothing is left when all are closed."""
    tasks_before, children_before = asyncio.all_tasks(), psutil.Process().children()
    identities = [Identity.load_or_create(folder / f"key{number}") for number in range(count)]
    networks: list[HivemindNetwork] = []
    try:
        for number in range(count):
            initial = (await full_address(networks[0]),) if networks else settings.initial_peers
            networks.append(
                await HivemindNetwork.create(
                    folder / f"key{number}", replace(settings, initial_peers=initial)
                )
            )
        yield identities, networks
    finally:
        for network in networks:
            await network.close()
    # Of peers that stay, those that served a stream of one that left end when they hear of it.
    if left := asyncio.all_tasks() - tasks_before:
        await asyncio.wait(left, timeout=5)
    assert asyncio.all_tasks() - tasks_before == set()
    assert psutil.Process().children() == children_before
    gc.collect()  # sockets that were left open complain now


# --- streams and directory -----------------------------------------------------------------------
async def test_three_peers(tmp_path: Path) -> None:
    async with peers(tmp_path, 3) as (identities, (seed, server, client)):
        assert [network.peer_id for network in (seed, server, client)] == [
            identity.peer_id for identity in identities
        ]
        callers: list[PeerId] = []

        async def serve(stream: Stream) -> None:
            callers.append(stream.remote_peer)
            await echo(stream)

        await server.serve("echo", serve)
        stream = await client.open(server.peer_id, "echo")
        assert stream.remote_peer == identities[1].peer_id
        assert await ask(stream, b"content") == b"content"
        assert callers == [identities[2].peer_id]
        big = bytes(range(256)) * 16 * 1024
        assert await ask(stream, big) == big
        await stream.close()
        await stream.close()
        with pytest.raises(NetworkError):
            await stream.send(b"x")

        record = node_record(identities[1])
        key, value = expected_key(record), sign_record(identities[1], record)
        assert await server.store(key, value, record.expires_unix_s)
        for network in (seed, server, client):
            entries = await network.get(key)
            assert {peer: entry.value for peer, entry in entries.items()} == {server.peer_id: value}
            assert entries[server.peer_id].expires_unix_s == record.expires_unix_s
        newer = replace(record, sequence=2, expires_unix_s=record.expires_unix_s + 1)
        newer_value = sign_record(identities[1], newer)
        assert await server.store(key, newer_value, newer.expires_unix_s)
        assert (await client.get(key))[server.peer_id].value == newer_value
        assert await client.get("nothing") == {}
        # a record of somebody else, one without a signature, one that expires in ten years
        for bad, expires_unix_s in (
            (value, record.expires_unix_s),
            (b"unsigned", record.expires_unix_s),
            (value, time.time() + 3e8),
        ):
            assert not await client.store(key, bad, expires_unix_s)
        assert list(await seed.get(key)) == [server.peer_id]


async def test_a_client_reads_and_stores_without_serving(tmp_path: Path) -> None:
    async with peers(tmp_path / "nodes", 2) as (identities, (seed, node)):
        settings = replace(
            LOOPBACK, serve_directory=False, initial_peers=(await full_address(seed),)
        )
        async with peers(tmp_path / "clients", 1, settings) as ((identity,), (client,)):
            for owner, network in ((identities[1], node), (identity, client)):
                record = node_record(owner)
                key, value = expected_key(record), sign_record(owner, record)
                assert await network.store(key, value, record.expires_unix_s)
            assert set(await client.get(key)) == {node.peer_id, client.peer_id}
            assert set(await seed.get(key)) == {node.peer_id, client.peer_id}
            known = set(seed._node.protocol.routing_table.uid_to_peer_id)
            assert known == {directory_id(node._p2p.peer_id)}


async def test_one_that_refuses_everything_spoils_nothing(tmp_path: Path) -> None:
    async with peers(tmp_path, 3) as (identities, (seed, evil, node)):
        evil._node.protocol.record_validator.validate = lambda record: False
        record = node_record(identities[2])
        key, value = expected_key(record), sign_record(identities[2], record)
        for sequence in range(1, 6):
            record = replace(record, sequence=sequence, expires_unix_s=record.expires_unix_s + 1)
            value = sign_record(identities[2], record)
            assert await node.store(key, value, record.expires_unix_s)
            assert (await seed.get(key))[node.peer_id].value == value


async def test_streams_end_as_they_should(tmp_path: Path) -> None:
    async with peers(tmp_path, 2) as (_, (server, client)):
        addresses = await server.addresses()
        ended = asyncio.Event()

        async def watch(stream: Stream) -> None:
            try:
                await echo(stream)
            finally:
                ended.set()

        async def fail(stream: Stream) -> None:
            raise NetworkError("as if the next hop were gone")

        async def silent(stream: Stream) -> None:
            await asyncio.Event().wait()

        await server.serve("watch", watch)
        await server.serve("fail", fail)
        await server.serve("silent", silent)
        with pytest.raises(PeerUnreachable, match="not supported"):
            await client.open(server.peer_id, "unknown")
        with pytest.raises(PeerUnreachable):
            await client.open(Identity.generate().peer_id, "watch")
        with pytest.raises(PeerUnreachable):
            await client.open(PeerId("0OIl"), "watch")

        stream = await client.open(server.peer_id, "watch", addresses)
        await stream.close()
        async with asyncio.timeout(2):
            await ended.wait()
        stream = await client.open(server.peer_id, "fail")
        with pytest.raises(NetworkError):
            async with asyncio.timeout(2):
                await stream.receive_exactly(1)
        await stream.close()

        # nobody reads: the sender is held back, and can still close
        stuck = await client.open(server.peer_id, "silent")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                while True:
                    await stuck.send(bytes(1 << 20))
        async with asyncio.timeout(3):
            await stuck.close()


async def test_address_hints_reach_an_unknown_peer(tmp_path: Path) -> None:
    async with peers(tmp_path / "one", 1) as (_, (server,)):
        await server.serve("echo", echo)
        async with peers(tmp_path / "other", 1) as (_, (client,)):
            with pytest.raises(PeerUnreachable):
                await client.open(server.peer_id, "echo")
            hints = ["no address", "/ip4/127.0.0.1/tcp/1", *await server.addresses()]
            stream = await client.open(server.peer_id, "echo", hints)
            assert await ask(stream, b"x") == b"x"
            await stream.close()


async def test_only_peers_that_were_told_to_relay_give_places(tmp_path: Path) -> None:
    """Every daemon says yes to who asks for a place; those of others end a circuit at 128 KiB."""
    Identity.load_or_create(tmp_path / "relay")
    async with peers(tmp_path, 2) as (_, (asking, other)):
        settings = replace(LOOPBACK, relay_for_others=True)
        relay = await HivemindNetwork.create(tmp_path / "relay", settings)
        try:
            for peer in (relay, other):
                await connect(asking._p2p, peer.peer_id, await peer.addresses())
            place = await reserve(asking._p2p, relay.peer_id)
            assert all(f"/p2p/{relay.peer_id}/p2p-circuit" in way for way in place.addresses)
            with pytest.raises(PeerUnreachable, match="a little only"):
                await reserve(asking._p2p, other.peer_id)
        finally:
            await relay.close()


async def test_daemons_that_relay_do_so_from_their_start(tmp_path: Path) -> None:
    """And not after many attempts: their two relays must not race with each other."""
    for name in ("asking", "relay"):
        Identity.load_or_create(tmp_path / name)
    asking = await start_daemon(tmp_path / "asking", ASKING)
    at_once = 0
    try:
        for _ in range(5):
            daemon = await start_daemon(
                tmp_path / "relay", replace(LOOPBACK, relay_for_others=True)
            )
            at_once += await relays(daemon, asking)
            await stop_daemon(daemon)
    finally:
        await stop_daemon(asking)
    assert at_once >= 3


async def kill_daemon(network: HivemindNetwork) -> None:
    """Wait until it serves again, where it served before."""
    addresses = await network.addresses()
    daemon = network._p2p._child
    daemon.kill()
    await daemon.wait()
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(NetworkError):
                if network._p2p._child is not daemon and set(await network.addresses()):
                    break
            await asyncio.sleep(0.01)
    assert set(await network.addresses()) == set(addresses)


async def test_a_daemon_that_dies_is_started_again(tmp_path: Path) -> None:
    async with peers(tmp_path, 2) as (identities, (server, client)):
        await server.serve("echo", echo)
        stream = await client.open(server.peer_id, "echo")
        record = node_record(identities[1])
        key, value = expected_key(record), sign_record(identities[1], record)
        assert await client.store(key, value, record.expires_unix_s)
        waiting = asyncio.create_task(stream.receive_exactly(1))
        addresses = await server.addresses()
        await kill_daemon(server)
        async with asyncio.timeout(1):
            with pytest.raises(NetworkError):
                await waiting
        await stream.close()

        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(PeerUnreachable):
                    stream = await client.open(server.peer_id, "echo", addresses)
                    break
        assert await ask(stream, b"again") == b"again"
        await stream.close()
        assert set(await server.get(key)) == {client.peer_id}
        # The one that joined through the other finds back by itself.
        await kill_daemon(client)
        async with asyncio.timeout(10):
            while True:
                if await client.get(key):
                    break
                await asyncio.sleep(0.01)


async def test_a_daemon_that_dies_again_and_again_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarm.hivemind_network.network.RESTARTS", 1)
    async with peers(tmp_path, 2) as (_, (server, client)):
        failed = asyncio.create_task(server.wait_failed())
        await kill_daemon(server)
        assert not failed.done()
        server._p2p._child.kill()
        async with asyncio.timeout(5):
            await failed
        with pytest.raises(NetworkError):
            await server.addresses()
        with pytest.raises(PeerUnreachable):
            await server.open(client.peer_id, "echo")


async def test_closing_is_no_failure(tmp_path: Path) -> None:
    async with peers(tmp_path, 1) as (_, (network,)):
        failed = asyncio.create_task(network.wait_failed())
        await network.close()
        await network.close()
        assert not failed.done()
        failed.cancel()
        await asyncio.wait([failed])


async def test_initial_peers_that_do_not_answer(tmp_path: Path) -> None:
    Identity.load_or_create(tmp_path / "key")
    missing = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.generate().peer_id}"
    for address in (missing, "/ip4/127.0.0.1/tcp/1"):
        settings = replace(LOOPBACK, initial_peers=(address,))
        with pytest.raises(NetworkError, match=address):
            await HivemindNetwork.create(tmp_path / "key", settings)
    with pytest.raises(NetworkError, match="did not start"):
        await HivemindNetwork.create(
            tmp_path / "key", replace(LOOPBACK, listen_addresses=("/ip4/1.2.3.4/tcp/1",))
        )
    assert psutil.Process().children() == []


async def test_a_restarted_seed_is_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "seed"
    Identity.load_or_create(folder / "key")
    seed = await HivemindNetwork.create(folder / "key", LOOPBACK)
    address = await full_address(seed)
    listening = address.partition("/p2p/")[0]
    identity = Identity.load_or_create(tmp_path / "key")
    record = node_record(identity)
    key, value = expected_key(record), sign_record(identity, record)
    node = await HivemindNetwork.create(
        tmp_path / "key", replace(LOOPBACK, initial_peers=(address,))
    )

    async def store() -> bool:
        try:
            return await node.store(key, value, record.expires_unix_s)
        except NetworkError:
            return False

    try:
        await seed.close()
        # what a failed call does
        await node._node.protocol.update_routing_table(
            directory_id(seed._p2p.peer_id), seed._p2p.peer_id, responded=False
        )
        seed = await HivemindNetwork.create(
            folder / "key", replace(LOOPBACK, listen_addresses=(listening,))
        )
        async with asyncio.timeout(20):  # libp2p waits for 5 s after a dial that failed
            while not await store():  # noqa: ASYNC110 (only asking tells)
                await asyncio.sleep(0.1)
        assert list(await seed.get(key)) == [identity.peer_id]
    finally:
        await node.close()
        await seed.close()


# --- hostile peers -------------------------------------------------------------------------------
def test_the_bomb_is_real() -> None:
    """It ends a process with hivemind's serializer; if it no longer does, ours can go."""
    program = (
        "import sys, swarm.hivemind_network;"
        "from hivemind.utils.serializer import MSGPackSerializer;"
        "MSGPackSerializer.loads(sys.stdin.buffer.read())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], input=nested_tuples(3000), capture_output=True, timeout=60
    )
    assert ended.returncode < 0


@pytest.mark.parametrize("levels", [1, 2, 300, 3000])
def test_the_serializer_has_no_depth(levels: int) -> None:
    for data in (
        nested_tuples(levels),
        msgpack.packb(msgpack.ExtType(0x50, nested_tuples(levels))),
    ):
        with pytest.raises(ValueError, match=r"not allowed|not nest|unpack"):
            BoundedSerializer.loads(data)


def test_the_serializer_keeps_dictionaries() -> None:
    dictionary = DictionaryDHTValue()
    dictionary.store("peer", b"value", time.time() + 60)
    loaded: Any = BoundedSerializer.loads(MSGPackSerializer.dumps(dictionary))
    assert loaded.data == dictionary.data
    assert BoundedSerializer.loads(BoundedSerializer.dumps(b"value")) == b"value"


@pytest.mark.parametrize(
    "items",
    [[[1, b"", 1.0]], [["a", "b", 1.0]], [["a", b"b", []]], [["a"]], 5, [["", b"", 1]] * 513],
)
def test_malformed_dictionaries_are_refused(items: Any) -> None:
    data = msgpack.packb(msgpack.ExtType(0x50, msgpack.packb([None, 1.0, items])))
    with pytest.raises((ValueError, TypeError)):
        BoundedSerializer.loads(data)


def test_plain_values_and_odd_subkeys_are_refused() -> None:
    identity = Identity.generate()
    record = node_record(identity)
    key = DHTID.generate(expected_key(record)).to_bytes()
    value = MSGPackSerializer.dumps(sign_record(identity, record))
    validator = SignedRecords(RecordChecker())

    def passes(subkey: object, packed: bytes = value) -> bool:
        packed_subkey = subkey if isinstance(subkey, bytes) else MSGPackSerializer.dumps(subkey)
        return validator.validate(DHTRecord(key, packed_subkey, packed, record.expires_unix_s))

    assert passes(identity.peer_id)
    for subkey in (None, b"", b"\xc1", 5, "", "x", Identity.generate().peer_id, [1]):
        assert not passes(subkey)
    for packed in (b"", b"\xc1", MSGPackSerializer.dumps("text"), nested_tuples(300)):
        assert not passes(identity.peer_id, packed)


@asynccontextmanager
async def honest_child(folder: Path) -> AsyncIterator[tuple[str, Callable[[str], Awaitable[str]]]]:
    """An honest peer in a process of its own: its address, and a way to let it read a key."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, str(HONEST_PEER), str(folder), stdin=PIPE, stdout=PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    stdin, stdout = child.stdin, child.stdout

    async def read_key(key: str) -> str:
        stdin.write(key.encode() + b"\n")
        async with asyncio.timeout(10):
            return (await stdout.readline()).decode().strip()

    try:
        yield (await stdout.readline()).decode().strip(), read_key
        stdin.close()
        async with asyncio.timeout(10):
            assert await child.wait() == 0
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def test_a_killed_process_leaves_no_daemon(tmp_path: Path) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable, str(HONEST_PEER), str(tmp_path), stdin=PIPE, stdout=PIPE
    )
    assert child.stdout is not None
    assert await child.stdout.readline()
    daemons = psutil.Process(child.pid).children()
    assert [daemon.name() for daemon in daemons] == ["p2pd"]
    child.kill()
    await child.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, daemons, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


async def test_hostile_requests_and_answers(tmp_path: Path) -> None:
    async with honest_child(tmp_path / "honest") as (address, read_key):
        settings = replace(LOOPBACK, initial_peers=(address,))
        async with peers(tmp_path, 1, settings) as ((identity,), (evil,)):
            protocol = evil._node.protocol
            stub = protocol.get_stub(PeerID.from_base58(address.rpartition("/p2p/")[2]))
            record = node_record(identity)
            key = expected_key(record)
            key_bytes = DHTID.generate(key).to_bytes()
            value = MSGPackSerializer.dumps(sign_record(identity, record))
            subkey = MSGPackSerializer.dumps(identity.peer_id)
            bomb = nested_tuples(3000)

            async def store(tag: bytes, content: bytes, expires: float, count: int = 1) -> object:
                """What the honest peer answers; None for an error."""
                request = dht_pb2.StoreRequest(
                    keys=[key_bytes] * count,
                    subkeys=[tag] * count,
                    values=[content] * count,
                    expiration_time=[expires] * count,
                    in_cache=[False] * count,
                    peer=protocol.node_info,
                )
                try:
                    return list((await stub.rpc_store(request, timeout=5)).store_ok)
                except P2PHandlerError:
                    return None

            expires = float(record.expires_unix_s)
            assert await store(b"", bomb, expires) is None
            assert await store(b"", msgpack.packb(msgpack.ExtType(0x50, bomb)), expires) is None
            assert await store(bomb, value, expires) == [False]
            assert await store(subkey, bomb, expires) == [False]
            assert await store(protocol.IS_REGULAR_VALUE, value, expires) == [False]
            assert await store(MSGPackSerializer.dumps("x"), value, expires) == [False]
            assert await store(subkey, value, expires + 3e8) == [False]
            assert await store(subkey, value, expires, count=600) is None
            assert await store(subkey, bomb, expires, count=2) == [False, False]
            assert await read_key(key) == ""
            assert await store(subkey, value, expires) == [True]
            assert await read_key(key) == identity.peer_id

            # answers: a good entry among forged ones, then a bomb
            with protocol.storage.freeze():
                other = expected_key(replace(record, model_revision=b"s" * 32))
                entries = DictionaryDHTValue()
                foreign = Identity.generate().peer_id
                good = sign_record(identity, replace(record, model_revision=b"s" * 32))
                entries.store(identity.peer_id, MSGPackSerializer.dumps(good), expires)
                entries.store(foreign, MSGPackSerializer.dumps(good), expires)
                protocol.storage.store(DHTID.generate(other), entries, expires + 3e8)
            assert await read_key(other) == identity.peer_id
            protocol.serializer = type("Bomb", (), {"dumps": staticmethod(lambda value: bomb)})
            assert await read_key(other) == ""
            assert await read_key(key) == identity.peer_id


async def test_a_place_in_the_directory_cannot_be_chosen(tmp_path: Path) -> None:
    async with peers(tmp_path, 2) as (_, (honest, evil)):
        table = honest._node.protocol.routing_table
        assert set(table.uid_to_peer_id) == {directory_id(evil._p2p.peer_id)}
        evil._node.protocol.node_info = dht_pb2.NodeInfo(node_id=DHTID.generate("").to_bytes())
        assert await evil._node.protocol.call_ping(honest._p2p.peer_id) is not None
        await honest.get("anything")
        assert set(table.uid_to_peer_id) == {directory_id(evil._p2p.peer_id)}
