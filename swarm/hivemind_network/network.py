"""One peer: ``Transport`` and ``Directory`` on one daemon, and how it joins the swarm."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hivemind.dht.node as hivemind_node
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import p2pd_pb2
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr

from swarm.hivemind_network.daemon import (
    NetworkSettings,
    cancel_all,
    daemon_request,
    start_daemon,
    stop_daemon,
)
from swarm.hivemind_network.directory import SignedRecords, SwarmDirectory, directory_id
from swarm.hivemind_network.streams import HivemindStream
from swarm.ports import DirectoryEntry, StreamHandler
from swarm.protocol.errors import NetworkError, PeerUnreachable
from swarm.protocol.identity import PeerId
from swarm.record_validation import RecordChecker

logger = logging.getLogger(__name__)

RPC_TIMEOUT_S = 3.0


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
        settings: NetworkSettings,
    ) -> HivemindNetwork:
        """Start the daemon with the identity of ``identity_path`` and join the swarm.

        Raises NetworkError when the daemon does not start or no initial peer answers.
        """
        use_hivemind_log_handler("nowhere")
        hivemind_node.DHTProtocol = SwarmDirectory  # hivemind has no parameter for it
        p2p = await start_daemon(identity_path, settings)
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
            await stop_daemon(p2p)
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
        await cancel_all(self._handler_tasks)
        await stop_daemon(self._p2p)
        while tasks := self._background_tasks():
            await cancel_all(tasks)

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
        async with daemon_request(self._p2p, request) as (_, _, writer):
            writer.close()

    async def _open(self, peer: PeerID, protocol: str) -> HivemindStream:
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_OPEN,
            streamOpen=p2pd_pb2.StreamOpenRequest(peer=peer.to_bytes(), proto=[protocol]),
        )
        async with daemon_request(self._p2p, request) as (response, reader, writer):
            remote = PeerID(response.streamInfo.peer)
            return HivemindStream(PeerId(remote.to_base58()), reader, writer)

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
