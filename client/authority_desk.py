"""The authority as a peer: it exchanges invitations, and brings charter and revocations."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from swarm.authority import Authority
from swarm.client.config import ClientSettings
from swarm.enrolment import Desk
from swarm.gate import Gate
from swarm.hivemind_network import HivemindNetwork, NetworkSettings
from swarm.protocol.errors import NetworkError
from swarm.revocations import RevocationWatch
from swarm.virtual_time import LoopClock

LISTEN = ("/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1")


async def run_desk(
    authority: Authority,
    folder: Path,
    listen: tuple[str, ...],
    peers: tuple[str, ...],
    ready: Callable[[list[str]], None],
) -> None:
    """Answer until SIGINT or SIGTERM. Raises NetworkError."""
    network, watch = await _join(
        authority, folder, NetworkSettings(listen_addresses=listen or LISTEN, initial_peers=peers)
    )
    leaving = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, leaving.set)
    try:
        desk = Desk(authority.redeem, lambda: authority.sealed_charter)
        await desk.open(network)
        ready([f"{address}/p2p/{network.peer_id}" for address in await network.addresses()])
        watching = asyncio.ensure_future(watch.run() if peers else leaving.wait())
        await leaving.wait()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    finally:
        await network.close()


async def bring_revocations(authority: Authority, folder: Path, settings: ClientSettings) -> None:
    """Tell the swarm once; its members pass it on. Raises NetworkError."""
    network, watch = await _join(
        authority,
        folder,
        NetworkSettings(
            listen_addresses=("/ip4/127.0.0.1/tcp/0",),
            initial_peers=settings.peers,
            serve_directory=False,
            start_timeout_s=settings.connect_timeout_s,
        ),
    )
    try:
        await watch.bring()
        if not await watch.is_known():
            raise NetworkError("no peer took the revocation list; try again")
    finally:
        await network.close()


async def _join(
    authority: Authority, folder: Path, settings: NetworkSettings
) -> tuple[HivemindNetwork, RevocationWatch]:
    clock = LoopClock()
    gate = Gate(authority.sealed_charter, b"", authority.identity.peer_id, clock)
    gate.adopt_revocations(authority.revocation_pages())
    network = await HivemindNetwork.create(folder / "authority.key", replace(settings, gate=gate))
    return network, RevocationWatch(authority.identity, network, clock, gate)
