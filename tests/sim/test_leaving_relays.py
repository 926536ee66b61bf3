"""Hops behind routers: a session begins through a relay and moves off it without losing a token."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import pytest

from swarm import virtual_time
from swarm.memory_network import LinkSettings, MemorySettings

LINKS = MemorySettings(link=LinkSettings(latency_s=0.02, jitter_s=0.01))
STEPS = 120


@pytest.mark.parametrize("seed", range(10))
def test_a_live_session_leaves_the_relay_once_a_hole_is_punched(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int
) -> None:
    async def main() -> None:
        random = Random(seed)
        swarm = toy_swarm(((0, 2), (2, 4), (4, 6)), seed=seed, settings=LINKS)
        peers = [node.peer.peer_id for node in swarm.nodes]
        for one, other in ((0, 1), (1, 2)):
            swarm.network.relay(peers[one], peers[other])
        await swarm.start()
        leaving = [asyncio.create_task(node.service.leave_relays()) for node in swarm.nodes]
        reference = toy_blocks(0, 6, 1)
        relayed: list[tuple[bool, ...]] = []
        async with swarm.chain(0, 1, 2, maximum_tokens=4 * STEPS) as chain:
            punched_at = random.randrange(STEPS // 4)
            position = 0
            for step in range(STEPS):
                if step == punched_at:
                    swarm.network.punch(peers[0], peers[1])
                tokens = random.choice((1, 1, 2, 7))
                tokens = min(tokens, 4 * STEPS - position)
                sent = make_tensor(random, 1, tokens)
                received = await chain.step(sent, position, output_tokens=tokens)
                assert bytes(received.data) == reference.step(bytes(sent.data), tokens, position)
                position += tokens
                relayed.append(
                    tuple(
                        hop.relayed_next_peer is not None
                        for node in swarm.nodes[:2]
                        for hop in node.service.hops
                    )
                )
            assert chain.hops_through_client == 0
        assert relayed[0] == (True, True)
        # Where no hole was punched the stream stays as it was.
        assert relayed[-1] == (False, True)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        await swarm.assert_nothing_left()

    virtual_time.run(main())
