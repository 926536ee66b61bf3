"""What a node or seed starts with: the network, what its gate asks for, the model on its disk.

Heavy packages are imported inside of the functions: in threads, while the view lives.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.cached_peers import load_peers
from swarm.gate import Gate
from swarm.node.config import BlockSpan, NodeSettings, PeerSettings, SeedSettings
from swarm.ports import Clock
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.records import NodeRecord
from swarm.revocations import RevocationWatch

if TYPE_CHECKING:
    from swarm.hivemind_network import HivemindNetwork
    from swarm.node.engine.engine import SpanEngine
    from swarm.node.engine.hosting import OpenedModel


async def start_network(settings: PeerSettings, gate: Gate | None) -> HivemindNetwork:
    """Join the swarm. Raises NetworkError when the daemon does not start or nobody answers."""
    module = await asyncio.to_thread(importlib.import_module, "swarm.hivemind_network")
    network: HivemindNetwork = await module.HivemindNetwork.create(
        settings.identity_file,
        module.NetworkSettings(
            listen_addresses=settings.listen_addresses,
            initial_peers=settings.peers,
            fallback_peers=load_peers(settings.peers_file),
            announce_addresses=settings.announce_addresses,
            relay_for_others=isinstance(settings, SeedSettings) and settings.relay,
            use_relays=isinstance(settings, NodeSettings) and settings.use_relay,
            relays=settings.relays if isinstance(settings, NodeSettings) else (),
            gate=gate,
        ),
    )
    return network


def revocation_watch(
    identity: Identity,
    network: HivemindNetwork,
    clock: Clock,
    gate: Gate,
    settings: PeerSettings,
) -> RevocationWatch:
    """Follows the revocations of the swarm's charter; the caller runs it."""
    return RevocationWatch(
        identity,
        network,
        clock,
        gate,
        announce_period_s=settings.announce_period_s,
        keep=settings.membership_files.keep,
    )


def trusted_publishers(gate: Gate | None) -> frozenset[PeerId] | None:
    """Those of the charter; None believes everybody."""
    if gate is None or not gate.charter.publishers:
        return None
    return frozenset(map(PeerId, gate.charter.publishers))


def open_model(settings: NodeSettings, path: Path) -> OpenedModel:
    """Reads the disk: not for use on an event loop. Raises UsageErrors."""
    from swarm.node.engine import hosting

    model = hosting.open_model(settings, path)
    _ = model.checkpoint.revision  # hashed here, and known from now on
    return model


def choose_blocks(
    model: OpenedModel, settings: NodeSettings, others: list[NodeRecord], *, now_unix_s: float
) -> BlockSpan:
    """Those of the settings, or where the swarm needs us most. Raises UsageErrors."""
    from swarm.block_vectors import placed_nodes
    from swarm.node.engine import hosting

    return hosting.choose_blocks(model, settings, placed_nodes(others, now_unix_s=now_unix_s))


def load_blocks(
    model: OpenedModel,
    settings: NodeSettings,
    span: BlockSpan,
    progress: Callable[[int, int], None],
) -> SpanEngine:
    """Takes seconds to minutes: for a thread of its own. Raises UsageErrors.

    ``progress`` is called with parts loaded and parts in all; what it raises ends the loading.
    """
    from swarm.node.engine import hosting

    return hosting.load_blocks(model, settings, span, progress)


def fit_together(model: OpenedModel, settings: NodeSettings, spans: list[BlockSpan]) -> bool:
    """Whether the memory takes the blocks of all spans at once."""
    from swarm.node.engine import hosting

    return hosting.fit_together(model, settings, spans)
