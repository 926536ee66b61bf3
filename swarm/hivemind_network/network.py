"""One peer: ``Transport`` and ``Directory`` on one daemon, and how it joins the swarm.

The daemon is a process of its own and may die. It is started again then, with the same identity and
ports; streams that ran through it have ended, handlers and directory entries are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hivemind.dht.protocol import ValidationError
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from swarm.addresses import is_given_by_router, is_global, is_loopback, is_relayed
from swarm.hivemind_network.daemon import NetworkSettings, cancel_all
from swarm.hivemind_network.dht_clock import DHT_CLOCK, agreed_offset_s
from swarm.hivemind_network.introductions import introduce
from swarm.hivemind_network.listening import with_ports, with_quic, with_quic_of_others
from swarm.hivemind_network.node import SwarmNode
from swarm.hivemind_network.peer import LocalPeer
from swarm.hivemind_network.punching import PUNCHING_PROTOCOL, HolePuncher
from swarm.hivemind_network.reachability import DialBack, ask_to_dial_back, is_behind_router
from swarm.hivemind_network.relays import RelayKeeper
from swarm.hivemind_network.requests import (
    connect,
    list_connections,
    open_stream,
    own_addresses,
    parse_peer,
)
from swarm.hivemind_network.streams import HivemindStream
from swarm.ports import DirectoryEntry, StreamHandler
from swarm.protocol.errors import NetworkError, PeerUnreachable, ProtocolError, RemoteError
from swarm.protocol.identity import PeerId
from swarm.protocol.records import with_passport

logger = logging.getLogger(__name__)

RESTARTS = 5
RESTART_WINDOW_S = 600.0
"""A daemon that dies more often than this in this time is given up."""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
ADDRESS_CHECK_S = 5.0
PUNCHING_PORT = "/ip4/0.0.0.0/udp/0/quic-v1"
"""Holes are punched from ports that listen, so peers that nobody dials need one too."""
FIRST_RELAY_TIMEOUT_S = 5.0
DIAL_BACK_TIMEOUT_S = 20.0
NO_PEER = "does not answer as a peer of this network"
DIRECT_CHECK_S = 0.05


class HivemindNetwork:
    """``Transport`` and ``Directory`` of one peer, from ``create`` to ``close``."""

    def __init__(
        self, local: LocalPeer, identity_path: Path, settings: NetworkSettings, behind_router: bool
    ) -> None:
        self._local = local
        self._identity_path = identity_path
        self._settings = settings
        self._behind_router = behind_router
        self._peer_id = PeerId(local.p2p.peer_id.to_base58())
        self._handlers: dict[str, StreamHandler] = {}
        self._handler_tasks: set[asyncio.Task[Any]] = set()
        self._own_tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._given_up = asyncio.Event()
        self._addresses_changed = asyncio.Event()
        self._relays: RelayKeeper | None = None
        self._reached_at = ""
        self._puncher = HolePuncher(lambda: self._p2p, self._peer_id)

    @classmethod
    async def create(cls, identity_path: Path, settings: NetworkSettings) -> HivemindNetwork:
        """Start the daemon with the identity of ``identity_path`` and join the swarm.

        Behind a router it takes a place at a relay first, if there is one. Raises NetworkError when
        the daemon does not start or no initial peer answers.
        """
        behind_router = not (
            settings.relay_for_others or settings.announce_addresses
        ) and is_behind_router(settings.initial_peers or settings.fallback_peers)
        listen = with_quic(settings.listen_addresses)
        if behind_router and all(map(is_loopback, listen)):
            listen = (*listen, PUNCHING_PORT)
        settings = replace(settings, listen_addresses=listen)
        local = await LocalPeer.start(identity_path, settings, behind_router=behind_router)
        network = cls(local, identity_path, settings, behind_router)
        try:
            await network._settle()
        except BaseException:
            await network.close()
            raise
        return network

    async def _settle(self) -> None:
        """Join, and start what keeps us joined."""
        listening = await own_addresses(self._p2p)
        ports = with_ports(self._settings.listen_addresses, listening)
        self._settings = replace(self._settings, listen_addresses=ports)
        await self._join()
        self._own_tasks.add(asyncio.create_task(self._keep_daemon()))
        if self._behind_router:
            await self.serve(PUNCHING_PROTOCOL, self._puncher.answer)
            self._own_tasks.add(asyncio.create_task(self._puncher.run()))
        if self._settings.use_relays and self._behind_router:
            relays = self.take_relays()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_RELAY_TIMEOUT_S):
                    await relays.settled()

    def take_relays(self) -> RelayKeeper:
        """Be reached through relays from now on, if there are any."""
        if self._relays is None:
            settings = self._settings
            known = settings.relays or settings.initial_peers or settings.fallback_peers
            self._relays = RelayKeeper(known, lambda: self._p2p, self._addresses_changed.set)
            self._own_tasks.add(asyncio.create_task(self._relays.run()))
        return self._relays

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    @property
    def behind_router(self) -> bool:
        """Whether we reach the swarm through a router that translates our addresses."""
        return self._behind_router

    @property
    def relays(self) -> Sequence[PeerId]:
        """The relays through which others reach us now."""
        return self._relays.relays if self._relays is not None else ()

    async def addresses(self) -> Sequence[str]:
        """Where others dial us, through relays or not."""
        own = await own_addresses(self._p2p)
        if self._behind_router:
            # As others see us: the router lets nobody in there, and an attempt spoils the hole
            # that is punched later.
            own = [address for address in own if not is_given_by_router(address)]
            own += [self._reached_at] if self._reached_at else []
        return [*own, *(self._relays.addresses if self._relays is not None else ())]

    async def addresses_changed(self, known: Sequence[str]) -> Sequence[str]:
        """Wait until the addresses are others than ``known``, in whatever order."""
        while True:
            self._addresses_changed.clear()
            with contextlib.suppress(PeerUnreachable):
                addresses = await self.addresses()
                if set(addresses) != set(known):
                    return addresses
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ADDRESS_CHECK_S):
                    await self._addresses_changed.wait()

    async def is_direct(self, peer: PeerId) -> bool | None:
        """Whether a stream that is opened now to ``peer`` needs no relay; None when unconnected."""
        connections = await list_connections(self._p2p)
        relayed = [connection.relayed for connection in connections if connection.peer == peer]
        return not all(relayed) if relayed else None

    async def dial_back(self) -> DialBack:
        """Let a peer that we are connected with try to dial us; takes up to 20 s."""
        asked: set[PeerId] = set()
        own = [one for one in await own_addresses(self._p2p) if not is_loopback(one)]
        for connection in await list_connections(self._p2p):
            if connection.relayed or connection.peer in asked or not is_global(connection.address):
                continue
            asked.add(connection.peer)
            with contextlib.suppress(PeerUnreachable, TimeoutError):
                async with asyncio.timeout(DIAL_BACK_TIMEOUT_S):
                    answer = await ask_to_dial_back(self._p2p, connection.peer, self._peer_id, own)
                    if answer.reached is not None:
                        self._reached_at = answer.address
                        self._addresses_changed.set()
                        return answer
        return DialBack(None)

    @property
    def _p2p(self) -> P2P:
        return self._local.p2p

    @property
    def _node(self) -> SwarmNode:
        return self._local.node

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler
        await self._register(protocol, handler)

    async def _register(self, protocol: str, handler: StreamHandler) -> None:
        async def accept(
            info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            stream = HivemindStream(
                PeerId(info.peer_id.to_base58()),
                reader,
                writer,
                relayed=is_relayed(str(info.addr)),
                gate=self._settings.gate,
            )
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
        self,
        peer: PeerId,
        protocol: str,
        addresses: Sequence[str] = (),
        *,
        direct_within_s: float = 0.0,
    ) -> HivemindStream:
        """Dial ``peer``; the hints in ``addresses`` help while the network does not know it yet."""
        try:
            async with asyncio.timeout(self._settings.dial_timeout_s):
                if addresses:
                    # Costs little when connected. Without it an unknown peer is first looked for.
                    with contextlib.suppress(PeerUnreachable):
                        await connect(self._p2p, peer, addresses)
                opened = await open_stream(self._p2p, peer, protocol)
                if opened.connection.relayed and await self._punched(peer, direct_within_s):
                    opened.writer.transport.abort()
                    opened = await open_stream(self._p2p, peer, protocol)
                relayed = opened.connection.relayed
                if relayed:
                    self._puncher.dialled(peer)
                return HivemindStream(
                    peer, opened.reader, opened.writer, relayed=relayed, gate=self._settings.gate
                )
        except TimeoutError as error:
            raise PeerUnreachable(
                f"{peer} did not answer within {self._settings.dial_timeout_s:g} s"
            ) from error

    async def _punched(self, peer: PeerId, patience_s: float) -> bool:
        """Wait until ``peer`` can be reached directly, unless that cannot come."""
        if patience_s <= 0 or not any(map(is_given_by_router, await own_addresses(self._p2p))):
            return False  # without an address that others see the daemon punches no holes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while True:
                    if await self.is_direct(peer):
                        return True
                    await asyncio.sleep(DIRECT_CHECK_S)
        return False

    async def store(self, key: str, value: bytes, expires_unix_s: float) -> bool:
        await self._rejoin_when_alone()
        gate = self._settings.gate
        if gate is not None:
            value = with_passport(value, gate.passport)
        return bool(await self._node.store(key, value, expires_unix_s, subkey=self._peer_id))

    async def get(
        self, key: str, *, until_unix_s: float = math.inf
    ) -> Mapping[PeerId, DirectoryEntry]:
        await self._rejoin_when_alone()
        if until_unix_s < math.inf:
            entries = await self._node.ask_keepers(key, until_unix_s)
            if entries is not None:
                return entries
        found = await self._node.get(key, latest=True)
        if found is None or not isinstance(found.value, dict):
            return {}
        return {
            PeerId(subkey): DirectoryEntry(item.value, item.expiration_time)
            for subkey, item in found.value.items()
        }

    async def wait_failed(self) -> None:
        """Wait until our daemon was given up, which cuts this peer off."""
        await self._given_up.wait()

    async def close(self) -> None:
        """Stop the handlers, the directory and the daemon. Never raises; nothing keeps running."""
        if self._closing:
            return
        self._closing = True
        await cancel_all(self._own_tasks)
        await cancel_all(self._handler_tasks)
        await self._local.stop()

    # --- the daemon's lives ----------------------------------------------------------------------
    async def _keep_daemon(self) -> None:
        """Start the daemon again when it dies, until it dies too often."""
        deaths_s: deque[float] = deque(maxlen=RESTARTS + 1)
        while True:
            await self._local.daemon_ended()
            deaths_s.append(time.monotonic())
            if len(deaths_s) > RESTARTS and deaths_s[-1] - deaths_s[0] < RESTART_WINDOW_S:
                logger.error("the network daemon (p2pd) has ended again; given up")
                self._given_up.set()
                return
            logger.warning("the network daemon (p2pd) has ended; starting it again")
            await self._restart()

    async def _restart(self) -> None:
        before = self._local
        await before.stop()
        for pause_s in (FIRST_PAUSE_S, 1.0, LONGEST_PAUSE_S):
            try:
                self._local = await LocalPeer.start(
                    self._identity_path,
                    self._settings,
                    behind_router=self._behind_router,
                    before=before,
                )
                for protocol, handler in self._handlers.items():
                    await self._register(protocol, handler)
                break
            except NetworkError as error:
                logger.warning("%s", error)
                await asyncio.sleep(pause_s)
        with contextlib.suppress(NetworkError):
            await self._join()
        self._addresses_changed.set()

    # --- joining ---------------------------------------------------------------------------------
    async def _join(self) -> None:
        """Meet the initial peers, or else peers of an earlier run.

        Raises NetworkError when nobody at all answers, unless we may be the first ones: a peer that
        keeps the directory and was given no initial peers.
        """
        failures: list[str] = []
        for peers in (self._settings.initial_peers, self._settings.fallback_peers):
            offsets_s = await asyncio.gather(*(self._reach(address) for address in peers))
            known_s = [offset_s for offset_s in offsets_s if isinstance(offset_s, float)]
            if known_s:
                DHT_CLOCK.offset_s = agreed_offset_s(known_s)
            met = await asyncio.gather(
                *(
                    self._meet(address)
                    for address, offset_s in zip(peers, offsets_s, strict=True)
                    if isinstance(offset_s, float)
                )
            )
            failed = [failure for failure in (*offsets_s, *met) if isinstance(failure, str)]
            for failure in failed:
                logger.warning("initial peer: %s", failure)
            if None in met:
                await self._node.find_nearest_nodes([self._node.node_id])
                return
            failures += failed
        alone = self._settings.serve_directory and not self._settings.initial_peers
        if failures and not alone:
            raise NetworkError("no initial peer answers: " + "; ".join(failures))

    async def _reach(self, address: str) -> float | str:
        """Connect; returns by how much the peer's clock is ahead of ours, or why it failed."""
        base, found, peer = address.rpartition("/p2p/")
        if not found:
            return f"{address} does not end in /p2p/ and a peer id"
        try:
            async with asyncio.timeout(self._settings.dial_timeout_s):
                ways = with_quic_of_others([base]) if base else []
                await connect(self._p2p, PeerId(peer), ways)
                offset_s = await self._node.protocol.clock_offset_s(parse_peer(PeerId(peer)))
        except TimeoutError:
            return f"{address} did not answer within {self._settings.dial_timeout_s:g} s"
        except NetworkError as error:
            return f"{address}: {error}"
        return offset_s if offset_s is not None else f"{address} {NO_PEER}"

    async def _meet(self, address: str) -> str | None:
        """Exchange directory ids; returns why it failed."""
        peer = parse_peer(PeerId(address.rpartition("/p2p/")[2]))
        gate = self._settings.gate
        try:
            await introduce(self._p2p, PeerId(peer.to_base58()), gate)
        except (RemoteError, ProtocolError) as error:
            return f"{address}: {error}"
        except NetworkError as error:
            if gate is not None and gate.enforces:
                return f"{address}: {error}"
        try:
            answer = await self._node.protocol.call_ping(peer, validate=True, strict=True)
        except ValidationError as error:
            return f"{address}: {error}"
        return None if answer is not None else f"{address} {NO_PEER}"

    @property
    def clock_offset_s(self) -> float:
        """By how much the swarm's clock is ahead of this computer's; 0 when they agree."""
        return DHT_CLOCK.offset_s

    def correct_clock(self, offset_s: float) -> None:
        """Let directory entries expire by a clock that is ``offset_s`` ahead of ours."""
        DHT_CLOCK.offset_s = offset_s

    async def _rejoin_when_alone(self) -> None:
        """After all known peers went away (a restarted seed, a cut link), start over."""
        peers = self._settings.initial_peers or self._settings.fallback_peers
        if peers and not self._node.protocol.routing_table.uid_to_peer_id:
            await self._join()
