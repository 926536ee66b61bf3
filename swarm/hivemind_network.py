"""The ports ``Transport`` and ``Directory`` over hivemind: libp2p streams and its Kademlia DHT.

The only file that imports hivemind. One p2pd daemon (a child process) carries the bytes; the DHT
node runs in our own event loop on the same daemon. hivemind trusts its peers more than we do, so
its DHT protocol is replaced by :class:`SwarmDirectory`, where everything that hivemind leaves open
is bounded or checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgpack

if "hivemind" not in sys.modules and (_spec := importlib.util.find_spec("hivemind")) is not None:
    # hivemind's __init__ imports its training half with scipy: 49 MB and 0.4 s that a node has
    # better uses for. An empty parent package lets its parts be imported alone.
    sys.modules["hivemind"] = importlib.util.module_from_spec(_spec)

import hivemind.dht.node as hivemind_node
from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol, ValidationError
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import P2P, P2PContext, P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
from hivemind.proto import dht_pb2, p2pd_pb2
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.serializer import MSGPackSerializer, SerializerBase
from hivemind.utils.timed_storage import ValueWithExpiration

from swarm.ports import Buffer, DirectoryEntry, StreamHandler
from swarm.protocol.errors import NetworkError, PeerUnreachable, RecordError
from swarm.protocol.identity import PeerId
from swarm.record_validation import MAX_ENTRIES_PER_KEY, MAX_KEYS, RecordChecker

logger = logging.getLogger(__name__)

JOIN_BELOW_ONE_BYTES = 32 * 1024
"""Buffers up to this size in total are joined before they are written: one system call, not two."""
WRITE_CHUNK_BYTES = 256 * 1024
CLOSE_TIMEOUT_S = 1.0
DAEMON_STOP_TIMEOUT_S = 5.0
RPC_TIMEOUT_S = 3.0
OWN_SESSION = """
import ctypes, os, signal, sys
os.setsid()
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Starts p2pd out of reach of the terminal's Ctrl-C, which would end it before we could say that we
leave; where the kernel can do it, p2pd ends with us, even when we are killed."""


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """How this peer takes part in the network."""

    listen_addresses: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1")
    """Multiaddresses to listen on. QUIC beside TCP, since hole punching succeeds over QUIC."""
    initial_peers: tuple[str, ...] = ()
    """Multiaddresses ending in ``/p2p/...`` of peers that are in the swarm; empty for the first."""
    announce_addresses: tuple[str, ...] = ()
    """What others are told to dial, where it differs from what we listen on."""
    serve_directory: bool = True
    """Keep and serve directory records of others. False for short-lived clients."""
    use_relay: bool = True
    use_auto_relay: bool = False
    """Look for a relay when behind NAT."""
    trusted_relays: tuple[str, ...] = ()
    reachability: Literal["detect", "public", "private"] = "detect"
    """``public`` for relays and seeds with an open port; otherwise libp2p finds out."""
    map_ports: bool = False
    """Ask the router (UPnP, NAT-PMP) to open the port."""
    start_timeout_s: float = 15.0
    dial_timeout_s: float = 10.0


# --- directory -----------------------------------------------------------------------------------
class BoundedSerializer(SerializerBase):  # type: ignore[misc]
    """hivemind's serializer without recursion.

    The original decodes nested tuple extensions recursively in C: 1,437 bytes from a peer end the
    process. Here the only extension is the dictionary of subkeys, and nothing nests inside of it.
    """

    DICTIONARY_CODE = 0x50
    dumps = MSGPackSerializer.dumps  # only ever sees our own objects

    @classmethod
    def loads(cls, buf: bytes) -> object:
        return msgpack.unpackb(buf, raw=False, ext_hook=cls._load_dictionary)

    @classmethod
    def _load_dictionary(cls, code: int, data: bytes) -> DictionaryDHTValue:
        if code != cls.DICTIONARY_CODE:
            raise ValueError(f"extension {code} is not allowed")
        _, _, items = msgpack.unpackb(data, raw=False, ext_hook=_refuse_extension)
        if not isinstance(items, list) or len(items) > MAX_ENTRIES_PER_KEY:
            raise ValueError("not a list of subkeys, or too many of them")
        dictionary = DictionaryDHTValue(MAX_ENTRIES_PER_KEY)
        with dictionary.freeze():
            for subkey, value, expires_unix_s in items:
                if not isinstance(subkey, str) or not isinstance(value, bytes):
                    raise ValueError("a subkey is no text or its value no bytes")
                dictionary.store(subkey, value, float(expires_unix_s))
        return dictionary


def _refuse_extension(code: int, data: bytes) -> object:
    raise ValueError("extensions do not nest")


class SignedRecords(RecordValidatorBase):  # type: ignore[misc]
    """Wires our record checks to hivemind: plain values and foreign subkeys never pass."""

    def __init__(self, checker: RecordChecker) -> None:
        self._checker = checker

    def validate(self, record: DHTRecord) -> bool:
        """Whether ``record`` may be kept; any bytes give an answer, never an exception."""
        if record.subkey in DHTProtocol.RESERVED_SUBKEYS:
            return False
        try:
            subkey, value = (
                BoundedSerializer.loads(record.subkey),
                BoundedSerializer.loads(record.value),
            )
        except (ValueError, TypeError, msgpack.UnpackException):
            return False
        if not isinstance(subkey, str) or not isinstance(value, bytes):
            return False
        try:
            self._checker.check(
                lambda key: bool(DHTID.generate(key).to_bytes() == record.key),
                PeerId(subkey),
                value,
                record.expiration_time,
                now_unix_s=time.time(),
            )
        except RecordError as error:
            logger.debug("dropped a record of %s: %s", subkey[:64], error.detail)
            return False
        return True


class BoundedStorage(DHTLocalStorage):  # type: ignore[misc]
    """hivemind's storage, bounded in keys and in subkeys per key.

    What a peer repeats is refused before hivemind pushes it on a heap that only time empties.
    """

    def __init__(self) -> None:
        super().__init__(maxsize=MAX_KEYS)

    def store_subkey(self, key: DHTID, subkey: str, value: bytes, expires_unix_s: float) -> bool:
        known = self.get(key)
        if known is not None:
            entry = known.value.get(subkey)
            if entry is None and len(known.value) >= MAX_ENTRIES_PER_KEY:
                return False
            if entry is not None and entry.expiration_time >= expires_unix_s:
                return bool(entry.value == value)
        return bool(super().store_subkey(key, subkey, value, expires_unix_s))


def directory_id(peer: PeerID) -> DHTID:
    """A peer's place in the DHT follows from its key; nobody chooses where to sit."""
    return DHTID.generate(peer.to_bytes())


class SwarmDirectory(DHTProtocol):  # type: ignore[misc]
    """hivemind's DHT protocol with its gaps closed; its class name is part of the wire names."""

    serializer = BoundedSerializer
    _rpc_handlers = None  # not those that were collected for the base class
    _stub_type = None
    closed = False

    @classmethod
    async def create(cls, *arguments: Any, **keywords: Any) -> SwarmDirectory:
        protocol: SwarmDirectory = await super().create(*arguments, **keywords)
        # One storage for both purposes: entries that peers push "into the cache" would otherwise
        # hide what the storage holds.
        protocol.storage = protocol.cache = BoundedStorage()
        return protocol

    def get_stub(self, peer: PeerID) -> Any:
        if self.closed:
            raise P2PDaemonError("the network is closed")
        return super().get_stub(peer)

    def _validate_dictionary(self, key_bytes: bytes, dictionary: DictionaryDHTValue) -> bool:
        """Drop the bad entries, where hivemind drops all entries because of a bad one."""
        with dictionary.freeze():
            for subkey, (value, expires_unix_s) in list(dictionary.items()):
                record = DHTRecord(key_bytes, self.serializer.dumps(subkey), value, expires_unix_s)
                if not self.record_validator.validate(record):
                    del dictionary[subkey]
            return bool(dictionary)

    async def call_find(self, peer: PeerID, keys: Iterable[DHTID]) -> dict[DHTID, Any] | None:
        """As hivemind's, but what the peer says of ages and of others' ids is not believed."""
        found = await super().call_find(peer, keys)
        if found is None:
            return None
        checked = {}
        for key, (entry, nearest) in found.items():
            if entry is not None:
                latest = max(item.expiration_time for _, item in entry.value.items())
                entry = ValueWithExpiration(entry.value, latest)
            checked[key] = (
                entry,
                {node: peer for node, peer in nearest.items() if node == directory_id(peer)},
            )
        return checked

    async def update_routing_table(
        self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True
    ) -> None:
        if node_id is not None and node_id != directory_id(peer_id):
            logger.debug("%s claims a place in the directory that is not its own", peer_id)
            return
        await super().update_routing_table(node_id, peer_id, responded)

    async def rpc_store(
        self, request: dht_pb2.StoreRequest, context: P2PContext
    ) -> dht_pb2.StoreResponse:
        if len(request.keys) > MAX_ENTRIES_PER_KEY:
            raise ValueError("too many records in one request")
        return await super().rpc_store(request, context)


# --- streams -------------------------------------------------------------------------------------
class HivemindStream:
    """``ports.Stream`` over one libp2p stream, which p2pd hands us as a unix socket."""

    def __init__(
        self, remote_peer: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._remote_peer = remote_peer
        self._reader = reader
        self._writer = writer

    @property
    def remote_peer(self) -> PeerId:
        return self._remote_peer

    async def send(self, *buffers: Buffer) -> None:
        total_bytes = sum(len(buffer) for buffer in buffers)
        if len(buffers) > 1 and total_bytes <= JOIN_BELOW_ONE_BYTES:
            buffers = (b"".join(buffers),)
        try:
            for buffer in buffers:
                # In chunks, since asyncio copies and moves whatever the socket does not take.
                for start in range(0, len(buffer), WRITE_CHUNK_BYTES):
                    if self._writer.is_closing():
                        raise NetworkError(f"the stream to {self._remote_peer} is closed")
                    whole = len(buffer) <= WRITE_CHUNK_BYTES
                    self._writer.write(
                        buffer if whole else memoryview(buffer)[start : start + WRITE_CHUNK_BYTES]
                    )
                    await self._writer.drain()
        except OSError as error:
            raise NetworkError(f"the stream to {self._remote_peer} broke: {error}") from error

    async def receive_exactly(self, size_bytes: int) -> bytes:
        try:
            return await self._reader.readexactly(size_bytes)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise NetworkError(f"the stream from {self._remote_peer} ended") from error

    async def close(self) -> None:
        self._writer.close()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            pass
        finally:
            # A peer that does not read would hold the socket open forever.
            self._writer.transport.abort()


# --- network -------------------------------------------------------------------------------------
class HivemindNetwork:
    """``Transport`` and ``Directory`` of one peer, from ``create`` to ``close``."""

    def __init__(self, p2p: P2P, node: DHTNode, settings: NetworkSettings) -> None:
        self._p2p = p2p
        self._node = node
        self._settings = settings
        self._peer_id = PeerId(p2p.peer_id.to_base58())
        self._handler_tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    @classmethod
    async def create(
        cls,
        identity_path: Path,
        settings: NetworkSettings = NetworkSettings(),
    ) -> HivemindNetwork:
        """Start the daemon with the identity of ``identity_path`` and join the swarm.

        Raises NetworkError when the daemon does not start or no initial peer answers.
        """
        use_hivemind_log_handler("nowhere")
        hivemind_node.DHTProtocol = SwarmDirectory  # hivemind has no parameter for it
        p2p = await _start_daemon(identity_path, settings)
        try:
            node = await DHTNode.create(
                p2p=p2p,
                node_id=directory_id(p2p.peer_id),
                client_mode=not settings.serve_directory,
                record_validator=SignedRecords(RecordChecker()),
                wait_timeout=RPC_TIMEOUT_S,
                # Announcements change every few seconds and carry load: only fresh ones are of use.
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                cache_refresh_before_expiry=0,
            )
            network = cls(p2p, node, settings)
        except BaseException:
            await _stop_daemon(p2p)
            raise
        try:
            await network._join()
        except BaseException:
            await network.close()
            raise
        return network

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    async def addresses(self) -> Sequence[str]:
        try:
            _, addresses = await self._p2p._client.identify()  # noqa: SLF001
        except (OSError, EOFError, P2PDaemonError) as error:
            raise NetworkError(f"the network daemon does not answer: {error}") from error
        return [str(address) for address in addresses]

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        async def accept(
            info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            stream = HivemindStream(PeerId(info.peer_id.to_base58()), reader, writer)
            task = asyncio.current_task()
            if task is None or self._closing:
                writer.transport.abort()
                return
            self._handler_tasks.add(task)
            try:
                await handler(stream)
            except asyncio.CancelledError:
                # asyncio's server reports a handler that ends as cancelled as a failure.
                if not self._closing:
                    raise
            except NetworkError as error:
                logger.debug("stream of %s: %s", stream.remote_peer, error)
            except Exception:
                logger.exception("the handler of %s failed for %s", protocol, stream.remote_peer)
            finally:
                self._handler_tasks.discard(task)
                await stream.close()

        await self._p2p.add_binary_stream_handler(protocol, accept)

    async def open(
        self, peer: PeerId, protocol: str, addresses: Sequence[str] = ()
    ) -> HivemindStream:
        """Dial ``peer``; the hints in ``addresses`` help while the network does not know it yet."""
        remote = _parse_peer(peer)
        try:
            async with asyncio.timeout(self._settings.dial_timeout_s):
                if addresses:
                    # Costs little when connected. Without it an unknown peer is first looked for.
                    with contextlib.suppress(PeerUnreachable):
                        await self._connect(remote, addresses)
                return await self._open(remote, protocol)
        except TimeoutError as error:
            raise PeerUnreachable(
                f"{peer} did not answer within {self._settings.dial_timeout_s:g} s"
            ) from error

    async def store(self, key: str, value: bytes, expires_unix_s: float) -> bool:
        await self._rejoin_when_alone()
        return bool(await self._node.store(key, value, expires_unix_s, subkey=self._peer_id))

    async def get(self, key: str) -> Mapping[PeerId, DirectoryEntry]:
        await self._rejoin_when_alone()
        found = await self._node.get(key, latest=True)
        if found is None or not isinstance(found.value, dict):
            return {}
        return {
            PeerId(subkey): DirectoryEntry(item.value, item.expiration_time)
            for subkey, item in found.value.items()
        }

    async def wait_failed(self) -> None:
        """Wait until our daemon ends though nobody closed it; the peer is cut off then."""
        await self._p2p._child.wait()  # noqa: SLF001
        if self._closing:
            await asyncio.Event().wait()

    async def close(self) -> None:
        """Stop the handlers, the directory and the daemon. Never raises; nothing keeps running."""
        if self._closing:
            return
        self._closing = True
        self._node.is_alive = False
        self._node.protocol.closed = True
        await _cancel(self._handler_tasks)
        await _stop_daemon(self._p2p)
        while tasks := self._background_tasks():
            await _cancel(tasks)

    # --- joining ---------------------------------------------------------------------------------
    async def _join(self) -> None:
        """Meet the initial peers. Raises NetworkError when all of them fail."""
        peers = self._settings.initial_peers
        if not peers:
            return
        failures = await asyncio.gather(*(self._meet(address) for address in peers))
        for failure in failures:
            if failure is not None:
                logger.warning("initial peer: %s", failure)
        if None not in failures:
            raise NetworkError("no initial peer answers: " + "; ".join(filter(None, failures)))
        await self._node.find_nearest_nodes([self._node.node_id])

    async def _meet(self, address: str) -> str | None:
        """Connect and exchange directory ids; returns why it failed."""
        base, found, peer = address.rpartition("/p2p/")
        if not found:
            return f"{address} does not end in /p2p/ and a peer id"
        try:
            remote = _parse_peer(PeerId(peer))
            async with asyncio.timeout(self._settings.dial_timeout_s):
                await self._connect(remote, [base] if base else [])
                answer = await self._node.protocol.call_ping(remote, validate=True, strict=True)
        except TimeoutError:
            return f"{address} did not answer within {self._settings.dial_timeout_s:g} s"
        except (NetworkError, ValidationError) as error:
            return f"{address}: {error}"
        return None if answer is not None else f"{address} is no peer of this network"

    async def _rejoin_when_alone(self) -> None:
        """After all known peers went away (a restarted seed, a cut link), start over."""
        if self._settings.initial_peers and not self._node.protocol.routing_table.uid_to_peer_id:
            await self._join()

    # --- daemon requests -------------------------------------------------------------------------
    async def _connect(self, peer: PeerID, addresses: Sequence[str]) -> None:
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.CONNECT,
            connect=p2pd_pb2.ConnectRequest(
                peer=peer.to_bytes(), addrs=_parse_addresses(addresses)
            ),
        )
        async with self._daemon_request(request) as (_, _, writer):
            writer.close()

    async def _open(self, peer: PeerID, protocol: str) -> HivemindStream:
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_OPEN,
            streamOpen=p2pd_pb2.StreamOpenRequest(peer=peer.to_bytes(), proto=[protocol]),
        )
        async with self._daemon_request(request) as (response, reader, writer):
            remote = PeerID(response.streamInfo.peer)
            return HivemindStream(PeerId(remote.to_base58()), reader, writer)

    @contextlib.asynccontextmanager
    async def _daemon_request(
        self, request: p2pd_pb2.Request
    ) -> AsyncIterator[tuple[p2pd_pb2.Response, asyncio.StreamReader, asyncio.StreamWriter]]:
        """One request on a socket of its own; hivemind's own calls leak it when they fail."""
        writer = None
        try:
            connector = self._p2p._client.control.daemon_connector  # noqa: SLF001
            reader, writer = await connector.open_connection()
            await write_pbmsg(writer, request)
            response = p2pd_pb2.Response()
            await read_pbmsg_safe(reader, response)
            if response.type == p2pd_pb2.Response.ERROR:
                raise PeerUnreachable(_one_line(response.error.msg))
            yield response, reader, writer
        except (OSError, EOFError) as error:
            _abort(writer)
            raise PeerUnreachable(f"the network daemon does not answer: {error}") from error
        except BaseException:
            _abort(writer)
            raise

    def _background_tasks(self) -> set[asyncio.Task[Any]]:
        """What hivemind started on our behalf and nobody owns: pings, stores, searches."""
        client = self._p2p._client  # noqa: SLF001
        owners = (self._node, self._node.protocol, self._p2p, client.control)
        return {
            task
            for task in asyncio.all_tasks()
            if (frame := getattr(task.get_coro(), "cr_frame", None)) is not None
            and any(frame.f_locals.get("self") is owner for owner in owners)
        }


def _abort(writer: asyncio.StreamWriter | None) -> None:
    if writer is not None:
        writer.transport.abort()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _parse_peer(peer: PeerId) -> PeerID:
    try:
        return PeerID.from_base58(peer)
    except ValueError as error:
        raise PeerUnreachable(f"{peer!r} is no peer id") from error


def _parse_addresses(addresses: Iterable[str]) -> list[bytes]:
    """Addresses as the daemon wants them; what is no address is left out (peers announce them)."""
    parsed = []
    for address in addresses:
        try:
            parsed.append(Multiaddr(address).to_bytes())
        except Exception as error:  # its parser raises whatever its parts raise
            logger.debug("no address: %s", error)
    return parsed


async def _start_daemon(identity_path: Path, settings: NetworkSettings) -> P2P:
    started: list[P2P] = []

    class Daemon(P2P):  # type: ignore[misc]
        """``P2P.create`` forgets its child process when it fails or is cancelled; this does not."""

        def __init__(self) -> None:
            super().__init__()
            started.append(self)

        @staticmethod
        def _make_process_args(*arguments: Any, **options: Any) -> list[str]:
            command: list[str] = P2P._make_process_args(*arguments, **options)  # noqa: SLF001
            return [sys.executable, "-I", "-S", "-c", OWN_SESSION, *command]

    try:
        return await Daemon.create(
            identity_path=str(identity_path),
            check_if_identity_free=False,
            host_maddrs=list(settings.listen_addresses),
            announce_maddrs=list(settings.announce_addresses) or None,
            dht_mode="server" if settings.serve_directory else "client",
            use_relay=settings.use_relay,
            use_auto_relay=settings.use_auto_relay,
            trusted_relays=list(settings.trusted_relays) or None,
            force_reachability=None if settings.reachability == "detect" else settings.reachability,
            nat_port_map=settings.map_ports,
            startup_timeout=settings.start_timeout_s,
        )
    except BaseException as error:
        for p2p in started:
            await _stop_daemon(p2p)
        if isinstance(error, (P2PDaemonError, OSError, EOFError, ValueError)):
            raise NetworkError(f"the network daemon did not start: {error}") from error
        raise


async def _stop_daemon(p2p: P2P) -> None:
    """Stop p2pd and everything that reads from it."""
    tasks = {p2p._listen_task, p2p._reader_task}  # noqa: SLF001
    if p2p._client is not None:  # noqa: SLF001
        control = p2p._client.control  # noqa: SLF001
        tasks |= {control._read_task, control._write_task, *control._handler_tasks.values()}  # noqa: SLF001
        for call in control._pending_calls.values():  # noqa: SLF001
            if not call.done():
                call.set_exception(P2PDaemonError("the network is closed"))
    child = p2p._child  # noqa: SLF001
    try:
        async with asyncio.timeout(DAEMON_STOP_TIMEOUT_S):
            await p2p.shutdown()
    except TimeoutError:
        child.kill()
        await child.wait()
    await _cancel(task for task in tasks if task is not None)


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel and wait until all are done."""
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending)
