"""One life of the p2pd daemon and of the DHT node on it; a restart makes another."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import hivemind.dht.node as hivemind_node
from hivemind.p2p import P2P
from hivemind.utils.logging import use_hivemind_log_handler

from swarm.hivemind_network.daemon import NetworkSettings, cancel_all, start_daemon, stop_daemon
from swarm.hivemind_network.dht_clock import DHT_CLOCK
from swarm.hivemind_network.directory import SignedRecords, SwarmDirectory, directory_id
from swarm.hivemind_network.introductions import answer_introductions
from swarm.hivemind_network.node import SwarmNode
from swarm.hivemind_network.relay_daemon import start_relay_daemon
from swarm.record_validation import RecordChecker

RPC_TIMEOUT_S = 3.0


class LocalPeer:
    """Our daemon and DHT node, from ``start`` to ``stop``."""

    def __init__(self, p2p: P2P, node: SwarmNode) -> None:
        self.p2p = p2p
        self.node = node

    @classmethod
    async def start(
        cls,
        identity_path: Path,
        settings: NetworkSettings,
        *,
        behind_router: bool,
        before: LocalPeer | None = None,
    ) -> LocalPeer:
        """``before`` leaves its directory entries to us. Raises NetworkError."""
        use_hivemind_log_handler("nowhere")
        hivemind_node.DHTProtocol = SwarmDirectory  # hivemind has no parameter for it
        DHT_CLOCK.install()
        if settings.relay_for_others:
            p2p = await start_relay_daemon(identity_path, settings)
        else:
            p2p = await start_daemon(identity_path, settings, behind_router=behind_router)
        try:
            await answer_introductions(p2p, settings.gate)
            node = await SwarmNode.create(
                p2p=p2p,
                node_id=directory_id(p2p.peer_id),
                client_mode=behind_router or not settings.serve_directory,
                record_validator=SignedRecords(RecordChecker(settings.gate), settings.gate),
                wait_timeout=RPC_TIMEOUT_S,
                # Announcements change every few seconds and carry load: only fresh ones are of use.
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                cache_refresh_before_expiry=0,
            )
        except BaseException:
            await stop_daemon(p2p)
            raise
        if before is not None:
            node.protocol.storage = node.protocol.cache = before.node.protocol.storage
        return cls(p2p, node)

    async def daemon_ended(self) -> None:
        """Wait until the daemon has ended, for whatever reason."""
        await self.p2p._child.wait()  # noqa: SLF001

    async def stop(self) -> None:
        """Never raises; nothing keeps running."""
        self.node.is_alive = False
        self.node.protocol.closed = True
        await stop_daemon(self.p2p)
        while tasks := self._background_tasks():
            await cancel_all(tasks)

    def _background_tasks(self) -> set[asyncio.Task[Any]]:
        """What hivemind started on our behalf and nobody owns: pings, stores, searches."""
        client = self.p2p._client  # noqa: SLF001
        owners = (self.node, self.node.protocol, self.p2p, client.control)
        return {
            task
            for task in asyncio.all_tasks()
            if (frame := getattr(task.get_coro(), "cr_frame", None)) is not None
            and any(frame.f_locals.get("self") is owner for owner in owners)
        }
