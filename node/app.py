"""What nodes and seeds are as processes: key, signals, metrics, view, the owner's limits.

The life of ``swarm-node join`` (``life``): the network starts and the checkpoint is opened at the
same time; the blocks are chosen, announced as JOINING and loaded; the service answers peers and the
announcement says ONLINE; Ctrl-C announces that the node drains, waits until its sessions are handed
over, says goodbye and ends. Whenever the owner's limits (``donor``) do not hold, it leaves in the
same way, rests, and lives again when they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime

from swarm.node.addresses import for_people
from swarm.node.board import Board
from swarm.node.config import NodeSettings, PeerSettings, SeedSettings
from swarm.node.control import control_path, controlled
from swarm.node.donor.diary import Diary, Totals
from swarm.node.donor.guard import Guard
from swarm.node.donor.limits import LimitsFile
from swarm.node.donor.sensors import SystemSensors
from swarm.node.life import NodeLife
from swarm.node.metrics import NodeMetrics
from swarm.node.model_holder import ModelHolder
from swarm.node.owned_tasks import (
    Left,
    alone,
    guarded_by,
    only_error,
    served_metrics,
    unless_left,
)
from swarm.node.process import held_identity, leave_on_signals
from swarm.node.starting import revocation_watch, start_network, trusted_publishers
from swarm.node.surroundings import remember_peers
from swarm.node.view import NodeStatus, View
from swarm.protocol.identity import Identity
from swarm.virtual_time import LoopClock

Life = Callable[[Identity, Board, asyncio.Event], Awaitable[None]]


async def run_node(settings: NodeSettings, view: View) -> None:
    """Host blocks until SIGINT or SIGTERM. Raises SwarmErrors that say what to do."""
    status = NodeStatus(display_name=settings.display_name, model=settings.model)

    async def life(identity: Identity, board: Board, leaving: asyncio.Event) -> None:
        guard = board.guard
        if guard is None:
            raise RuntimeError("a node has an owner")
        async with _watching(guard):
            while await guard.rested(leaving, board.rest):
                async with guard.shift(leaving) as over:
                    with contextlib.suppress(Left):
                        await alone(NodeLife(settings, view, identity, board, over).live())
                board.forget_engine()
                if not leaving.is_set():
                    await asyncio.to_thread(_give_memory_back)

    await _run(settings, view, status, life, owner=lambda board: _owner(settings, board))


def _owner(settings: NodeSettings, board: Board) -> Guard:
    """The owner's limits, sensors and diary. Raises ConfigError for damaged files."""

    def totals() -> Totals:
        counted, guard = board.metrics.totals, board.guard
        return Totals(
            sessions=counted.sessions,
            tokens=counted.tokens,
            energy_j=counted.energy_j,
            sent_bytes=0 if guard is None else guard.up.total_bytes,
            received_bytes=0 if guard is None else guard.down.total_bytes,
        )

    diary = Diary(settings.diary_file, datetime.now, totals)
    diary.load()
    return Guard(
        LimitsFile(settings.limits_file, settings.donor_limits),
        SystemSensors(settings.identity_file.parent),
        diary,
        clock=LoopClock(),
    )


async def run_seed(settings: SeedSettings, view: View) -> None:
    """Be a meeting point until SIGINT or SIGTERM. Raises SwarmErrors that say what to do."""

    async def life(identity: Identity, board: Board, leaving: asyncio.Event) -> None:
        async with AsyncExitStack() as stack:
            gate = settings.membership_files.require(identity.peer_id, LoopClock())
            network = await unless_left(leaving, start_network(settings, gate))
            stack.push_async_callback(network.close)
            addresses = for_people(await network.addresses(), network.peer_id)
            board.update(state="online", peer_id=network.peer_id, addresses=addresses)
            view.ready(board.snapshot())
            async with guarded_by(network) as group:
                running = [
                    group.create_task(
                        remember_peers(network, LoopClock(), identity.peer_id, settings.peers_file)
                    )
                ]
                if gate is not None:
                    watch = revocation_watch(identity, network, LoopClock(), gate, settings)
                    running.append(group.create_task(watch.run()))
                if settings.models:
                    holder = ModelHolder(
                        network, identity, settings, board, trusted=trusted_publishers(gate)
                    )
                    stack.callback(holder.close)
                    running.append(group.create_task(holder.run()))
                await leaving.wait()
                for task in running:
                    task.cancel()

    await _run(settings, view, NodeStatus(display_name=settings.display_name), life)


async def _run(
    settings: PeerSettings,
    view: View,
    status: NodeStatus,
    life: Life,
    *,
    owner: Callable[[Board], Guard] | None = None,
) -> None:
    """What nodes and seeds share: key, signals, metrics, view, and one error instead of a group."""
    leaving = asyncio.Event()
    board = Board(status, NodeMetrics())
    board.metrics.watch_tasks(asyncio.get_running_loop())
    control = control_path(settings.identity_file)
    try:
        async with AsyncExitStack() as stack:
            identity = stack.enter_context(held_identity(settings.identity_file))
            stack.enter_context(leave_on_signals(leaving))
            if owner is not None:
                board.guard = owner(board)
            if settings.metrics:
                url = await stack.enter_async_context(served_metrics(settings, board.metrics))
                board.update(metrics_url=url)
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(view.watch(board.snapshot))
                async with controlled(control, board.snapshot, leaving.set, board.guard):
                    await life(identity, board, leaving)
                watching.cancel()
    except BaseExceptionGroup as group_of_errors:
        error = only_error(group_of_errors)
        if not isinstance(error, Left):
            raise error from None
    view.stopped()


@asynccontextmanager
async def _watching(guard: Guard) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(guard.watch())
        try:
            yield
        finally:
            watching.cancel()


def _give_memory_back() -> None:
    from swarm.node.engine.freed_memory import return_freed_memory

    gc.unfreeze()
    gc.collect()
    return_freed_memory()
