"""Owners of what runs in a node: tasks that end with a block, and one error instead of a group."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from swarm.membership import Announcer
from swarm.node.config import PeerSettings
from swarm.node.metrics import MetricsServer, NodeMetrics
from swarm.protocol.errors import ConfigError, NetworkError, SwarmError

if TYPE_CHECKING:
    from swarm.hivemind_network import HivemindNetwork

T = TypeVar("T")


class Left(Exception):
    """The owner asked to leave while something was being prepared."""


@asynccontextmanager
async def guarded_by(network: HivemindNetwork) -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that ends with NetworkError when the network daemon dies."""

    async def guard() -> None:
        await network.wait_failed()
        raise NetworkError("the network daemon (p2pd) has ended; start the node again")

    async with asyncio.TaskGroup() as group:
        guarding = group.create_task(guard())
        yield group
        guarding.cancel()


@asynccontextmanager
async def announcing(announcer: Announcer, group: asyncio.TaskGroup) -> AsyncIterator[None]:
    """Announce meanwhile, and at the end that we leave."""
    announcing = group.create_task(announcer.run())
    try:
        yield
    except asyncio.CancelledError:
        raise  # the network is gone, or the owner does not want to wait
    except BaseException:
        await _leave(announcer, announcing)
        raise
    await _leave(announcer, announcing)


async def _leave(announcer: Announcer, announcing: asyncio.Task[None]) -> None:
    announcing.cancel()
    await asyncio.wait((announcing,))
    await announcer.leave()


@asynccontextmanager
async def served_metrics(settings: PeerSettings, metrics: NodeMetrics) -> AsyncIterator[str]:
    """Serve metrics meanwhile; gives their URL. Raises ConfigError for a port that is taken."""
    try:
        server = MetricsServer(metrics.registry, settings.metrics_port)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics on port {settings.metrics_port}: {error.strerror}; "
            "choose another with --metrics-port, or --no-metrics"
        ) from None
    try:
        yield server.url
    finally:
        await asyncio.to_thread(server.close)


async def alone(life: Awaitable[None]) -> None:
    """Run one life of a node; raises one error instead of a group."""
    try:
        await life
    except BaseExceptionGroup as group_of_errors:
        raise only_error(group_of_errors) from None


async def unless_left(leaving: asyncio.Event, work: Awaitable[T]) -> T:
    """The result of ``work``; when the owner leaves before, it is cancelled and Left raised."""
    working = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(leaving.wait())
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Left
    finally:
        waiting.cancel()
        working.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


def only_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """What the owner is told of several errors: a bug as it is, else the first of ours."""
    _, bugs = errors.split((Left, SwarmError))
    if bugs is not None:
        return bugs
    _, ours = errors.split(Left)
    error: BaseException = ours or errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
