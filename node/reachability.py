"""How others reach this node, in plain words, and what its owner could do about it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from swarm.addresses import is_loopback
from swarm.node.addresses import is_public
from swarm.protocol.errors import NetworkError

if TYPE_CHECKING:
    from swarm.hivemind_network import HivemindNetwork

log = logging.getLogger(__name__)

DIAL_BACK_PERIOD_S = 1800.0

Way = Literal["direct", "relayed", "local", "unreachable"]


@dataclass(frozen=True, slots=True)
class Reachability:
    """``advice`` is empty when there is nothing to do."""

    way: Way
    found: str
    advice: str = ""


def judge(
    addresses: Sequence[str], *, behind_router: bool, relays: int, reached: bool | None
) -> Reachability:
    """``reached`` is what a peer found that tried to dial us; None when nobody tried."""
    if reached and (behind_router or any(map(is_public, addresses))):
        return Reachability("direct", "others reach this computer directly; a peer has tried it")
    if relays:
        places = "a relay" if relays == 1 else f"{relays} relays"
        where = "behind a router" if behind_router else "behind a firewall"
        return Reachability(
            "relayed",
            f"{where}: others reach this computer through {places}, and directly where the router "
            "lets a hole be punched",
            "nothing has to be done; to need no relay, let a port in and give it to --listen, and "
            "your public address with it to --announce",
        )
    if behind_router:
        return Reachability(
            "unreachable",
            "behind a router, and no relay has a place",
            "let a port of the router in and give it to --listen, and your public address with it "
            "to --announce; or name other --peers or --relay peers",
        )
    if any(map(is_public, addresses)):
        if reached is None:
            found = "this computer has a public address; nobody has tried it from outside yet"
            return Reachability("direct", found)
        return Reachability(
            "unreachable",
            "this computer has a public address, but a peer could not reach it",
            "open the ports of --listen in the firewall, for TCP and for UDP",
        )
    if all(map(is_loopback, addresses)):
        return Reachability("local", "only programs on this computer reach it")
    return Reachability(
        "local",
        "only the local network reaches this computer, and so it seems do its peers",
        "for a swarm across the internet name --peers that have public addresses",
    )


async def follow_reachability(
    network: HivemindNetwork,
    *,
    use_relays: bool,
    moved: Callable[[Sequence[str]], None],
    judged: Callable[[Reachability], None],
) -> None:
    """Tell of new addresses and of how others reach us, until cancelled."""
    reached: bool | None = None
    addresses: Sequence[str] = ()

    def judge_again() -> None:
        judged(
            judge(
                addresses,
                behind_router=network.behind_router,
                relays=len(network.relays),
                reached=reached,
            )
        )

    async def follow() -> None:
        nonlocal addresses
        while True:
            addresses = await network.addresses_changed(addresses)
            moved(addresses)
            judge_again()

    async def let_others_try() -> None:
        nonlocal reached
        while True:
            try:
                reached = (await network.dial_back()).reached
            except NetworkError as error:
                log.debug("nobody dials back: %s", error)
            if reached is False and use_relays:
                network.take_relays()
            judge_again()
            await asyncio.sleep(DIAL_BACK_PERIOD_S)

    async with asyncio.TaskGroup() as group:
        group.create_task(follow())
        group.create_task(let_others_try())
