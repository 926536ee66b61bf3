"""Opens the hops of a training session and joins them to a chain."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from swarm.client.finetune.chain_request import TrainingChainRequest, open_message
from swarm.client.finetune.link import TrainingLink
from swarm.client.healing import could_not_open
from swarm.client.link import HopFailed
from swarm.client.planner import Planner
from swarm.ports import Clock, Transport
from swarm.protocol.errors import NoRouteError, SwarmError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import SetRoute
from swarm.routing import ChainPlan

OPEN_ATTEMPTS = 4
ROUTE_VERSION = 1


async def open_links(
    transport: Transport,
    planner: Planner,
    request: TrainingChainRequest,
    blocks: range,
    excluded: Collection[PeerId],
    *,
    clock: Clock,
    timeout_s: float,
) -> tuple[list[TrainingLink], ChainPlan]:
    """Choose hops for ``blocks`` and open a session on each; who refuses is left out.

    Raises NoRouteError when blocks are served by nobody, or too many attempts failed.
    """
    failures: list[HopFailed] = []
    last: SwarmError | None = None
    left_out = list(excluded)

    async def open_one(plan: ChainPlan, index: int) -> TrainingLink:
        hop = plan.hops[index]
        previous = transport.peer_id if index == 0 else plan.hops[index - 1].peer_id
        return await TrainingLink.open(
            transport,
            hop,
            open_message(request, hop, previous),
            state_elements=(
                request.maximum_state_elements_per_block * (hop.end_block - hop.first_block)
            ),
            clock=clock,
            timeout_s=timeout_s,
            only_for=None if request.policy is None else request.policy.check,
        )

    while len(failures) < OPEN_ATTEMPTS:
        try:
            plan = await planner.plan(blocks.start, blocks.stop, excluded=left_out)
        except NoRouteError as error:
            last = error
            break
        opening = [open_one(plan, index) for index in range(len(plan.hops))]
        results = await asyncio.gather(*opening, return_exceptions=True)
        links = [result for result in results if isinstance(result, TrainingLink)]
        if len(links) == len(results):
            return links, plan
        await asyncio.gather(*(link.close() for link in links))
        for result in results:
            if isinstance(result, HopFailed):
                failures.append(result)
                left_out.append(result.peer_id)
            elif isinstance(result, BaseException):
                raise result
    raise could_not_open(failures, last)


async def join_links(links: Sequence[TrainingLink], timeout_s: float) -> None:
    """Tell each hop who comes next. Raises HopFailed."""
    routes = []
    for link, following in zip(links, [*links[1:], None], strict=True):
        message = SetRoute(
            route_version=ROUTE_VERSION,
            next_peer=following.hop.peer_id if following else "",
            next_session_id=following.session_id if following else b"",
        )
        routes.append(link.set_route(message, timeout_s))
    await asyncio.gather(*routes)
