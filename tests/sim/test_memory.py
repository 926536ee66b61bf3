"""Sessions whose peers vanish leave nothing in the memory of the nodes that stay."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from random import Random
from typing import Any

from swarm import virtual_time
from swarm.memory_network import LinkSettings, MemorySettings
from swarm.protocol.errors import SwarmError
from swarm.protocol.identity import Identity

LINKS = MemorySettings(link=LinkSettings(latency_s=0.01), give_up_after_s=5.0)
FAULTS = ("next hop", "client", "both", "nobody")
OF_THE_NETWORK = ("swarm.memory_network", "swarm.record_validation")
"""What stays of peers that are gone belongs to the network between them, which is the test's."""


class Vanished(Exception):
    """The client's program ended here."""


def objects_alive() -> Counter[str]:
    """Of our own types and of asyncio's, by name."""
    gc.collect()
    names = (f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())
    ours = (name for name in names if name.startswith(("swarm.", "asyncio.", "_asyncio.")))
    return Counter(name for name in ours if not name.startswith(OF_THE_NETWORK))


def test_what_is_alive_does_not_grow_with_the_sessions(toy_swarm: Any, make_tensor: Any) -> None:
    async def run() -> None:
        swarm = toy_swarm(((0, 2), (2, 4), (2, 4)), settings=LINKS)
        await swarm.start()
        dice = Random(1)

        async def session(fault: str) -> None:
            swarm.client = swarm.network.join(Identity.generate())
            try:
                async with swarm.chain(0, 1) as chain:
                    for position in range(3):
                        await chain.step(make_tensor(dice, 1, 1), position, output_tokens=1)
                    if fault in ("next hop", "both"):
                        for peer in (swarm.nodes[0].peer, swarm.client):
                            swarm.network.cut(peer.peer_id, swarm.nodes[1].peer.peer_id)
                    if fault in ("client", "both"):
                        swarm.network.crash(swarm.client.peer_id)
                        raise Vanished
                    await chain.step(make_tensor(dice, 1, 1), 3, output_tokens=1)
            except (Vanished, SwarmError):
                pass
            swarm.network.heal()
            if swarm.network.peer(swarm.client.peer_id) is not None:
                swarm.network.crash(swarm.client.peer_id)
            await swarm.assert_nothing_held()
            await asyncio.sleep(60.0)

        for fault in 2 * FAULTS:
            await session(fault)
        before = objects_alive()
        for fault in 8 * FAULTS:
            await session(fault)
        assert objects_alive() - before == Counter()

    virtual_time.run(run())
