"""The p2pd process: how it is started and stopped without leaving anything behind."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hivemind.p2p import P2P, P2PDaemonError

from swarm.gate import Gate
from swarm.protocol.errors import NetworkError

STOP_TIMEOUT_S = 5.0
RELAY_LIMITS = {
    "relayMaxReservations": 1024,
    "relayMaxCircuits": 256,  # of one peer that is relayed for
    "relayBufferSize": 256 * 1024,  # of one direction of a circuit; by default 16 MiB
    "relayTimeLimit": "12h",
    "relayDataLimit": 1 << 40,
}
"""How much a relay does for others, in p2pd's words."""
RELAY_CORES = "1"
"""See ``relay_daemon``."""
OWN_SESSION = """
import ctypes, os, signal, sys
os.setsid()
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if sys.argv[1]:
    os.environ["GOMAXPROCS"] = sys.argv[1]
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Starts p2pd on so many cores (empty: all of them), and out of reach of the terminal's Ctrl-C,
which would end it before we could say that we leave; where the kernel can do it, p2pd ends with us,
even when we are killed."""


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """How this peer takes part in the network."""

    listen_addresses: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1")
    """Multiaddresses to listen on. QUIC beside TCP, since hole punching succeeds over QUIC."""
    initial_peers: tuple[str, ...] = ()
    """Multiaddresses ending in ``/p2p/...`` of peers that are in the swarm; empty for the first."""
    fallback_peers: tuple[str, ...] = ()
    """Tried when none of ``initial_peers`` answers: peers of an earlier run."""
    announce_addresses: tuple[str, ...] = ()
    """What others are told to dial, where it differs from what we listen on."""
    serve_directory: bool = True
    """Keep and serve directory records of others. False for short-lived clients; peers behind a
    router do not either, since few could ask them."""
    relay_for_others: bool = False
    """For seeds and others with an open port: pass on streams of peers behind routers."""
    use_relays: bool = False
    """When nobody can dial us, take places at relays, and let hole punching do the rest."""
    relays: tuple[str, ...] = ()
    """Relays to ask first, as multiaddresses ending in ``/p2p/...``; by default those of
    ``initial_peers``."""
    gate: Gate | None = None
    """Whom we let in, in a swarm with a charter."""
    map_ports: bool = False
    """Ask the router (UPnP, NAT-PMP) to open the port."""
    start_timeout_s: float = 15.0
    dial_timeout_s: float = 10.0


async def start_daemon(
    identity_path: Path, settings: NetworkSettings, *, behind_router: bool = False
) -> P2P:
    """Raises NetworkError when it does not start."""
    started: list[P2P] = []
    relay = {"relayService": int(settings.relay_for_others), **RELAY_LIMITS}
    relay_flags = [f"-{name}={value}" for name, value in relay.items()]
    reachability = "public" if settings.relay_for_others else "private" if behind_router else None

    class Daemon(P2P):  # type: ignore[misc]
        """``P2P.create`` forgets its child process when it fails or is cancelled; this does not."""

        def __init__(self) -> None:
            super().__init__()
            self._daemon_listen_maddr = self._client_listen_maddr = None  # its __del__ wants them
            started.append(self)

        @staticmethod
        def _make_process_args(*arguments: Any, **options: Any) -> list[str]:
            command: list[str] = P2P._make_process_args(*arguments, **options)  # noqa: SLF001
            cores = RELAY_CORES if settings.relay_for_others else ""
            starter = [sys.executable, "-I", "-S", "-c", OWN_SESSION, cores]
            return [*starter, *command, *relay_flags]

    try:
        return await Daemon.create(
            identity_path=str(identity_path),
            check_if_identity_free=False,
            host_maddrs=list(settings.listen_addresses),
            announce_maddrs=list(settings.announce_addresses) or None,
            dht_mode="server" if settings.serve_directory and not behind_router else "client",
            # Relays that are not sure that they can be reached break circuits after 128 KiB; peers
            # that do not know that they cannot be reached do not punch holes.
            force_reachability=reachability,
            nat_port_map=settings.map_ports,
            startup_timeout=settings.start_timeout_s,
        )
    except BaseException as error:
        for p2p in started:
            await stop_daemon(p2p)
        if isinstance(error, (P2PDaemonError, OSError, EOFError, ValueError)):
            raise NetworkError(f"the network daemon did not start: {error}") from error
        raise


async def stop_daemon(p2p: P2P) -> None:
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
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await p2p.shutdown()
    except TimeoutError:
        child.kill()
        await child.wait()
    await cancel_all(task for task in tasks if task is not None)


async def cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel and wait until all are done."""
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending)
