"""Nodes leave by plan, at any moment: sessions move to others, and nothing is computed again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

import pytest

from swarm import virtual_time
from swarm.client.chain import Chain
from swarm.client.metrics import ClientMetrics
from swarm.memory_network import LinkSettings, MemorySettings

SPANS = ((0, 2), (2, 4), (4, 6), (0, 2), (2, 4), (4, 6))
"""A chain of three, and everything twice."""
CHAIN = (0, 1, 2)
LINKS = MemorySettings(link=LinkSettings(latency_s=0.01, jitter_s=0.004), give_up_after_s=3600)
MAXIMUM_TOKENS = 160
DRAIN_S = 30.0

Story = Callable[[Any, Chain], Coroutine[Any, Any, None]]


class Talk:
    """Random prompts, single tokens, rollbacks and row orders, each compared with the model."""

    def __init__(self, chain: Chain, seed: int, rows: int, blocks: Any, make_tensor: Any) -> None:
        self._chain, self._random, self._rows = chain, Random(seed), rows
        self._make_tensor = make_tensor
        self._reference = blocks(0, 6, rows)
        self._length = 0
        self.durations_s: list[float] = []

    async def step(self, tokens: int | None = None) -> None:
        random, rows = self._random, self._rows
        position = random.choice(
            (self._length, random.randint(max(0, self._length - 3), self._length))
        )
        if position > MAXIMUM_TOKENS - 30:
            position = random.randint(0, 60)
        tokens = tokens or random.choice((1, 1, 1, 2, 5, 30))
        order = tuple(random.randrange(rows) for _ in range(rows)) if rows > 1 else ()
        sent = self._make_tensor(random, rows, tokens)
        started_s = asyncio.get_running_loop().time()
        received = await self._chain.step(sent, position, output_tokens=tokens, row_order=order)
        self.durations_s.append(asyncio.get_running_loop().time() - started_s)
        whole = self._reference.step(bytes(sent.data), tokens, position, order)
        assert bytes(received.data) == whole, f"{tokens} tokens at {position}"
        self._length = position + tokens


def converse(
    swarm_type: Any,
    blocks: Any,
    make_tensor: Any,
    story: Story,
    *,
    seed: int,
    rows: int = 1,
    steps: int = 25,
    tokens: int | None = None,
    spans: tuple[tuple[int, int], ...] = SPANS,
    metrics: ClientMetrics | None = None,
) -> Any:
    """Talk while ``story`` runs, then one step more; the swarm, in which nothing is left."""

    async def main() -> Any:
        swarm = swarm_type(spans, seed=seed, settings=LINKS)
        await swarm.start()
        async with swarm.chain(
            *CHAIN, rows=rows, maximum_tokens=MAXIMUM_TOKENS, observer=metrics
        ) as chain:
            talk = Talk(chain, seed, rows, blocks, make_tensor)
            telling = asyncio.create_task(story(swarm, chain))
            for _ in range(steps):
                await talk.step(tokens)
            await telling
            await talk.step(1)
            assert chain.hops_through_client == 0
            swarm.durations_s = talk.durations_s
        swarm.network.heal()
        await swarm.assert_nothing_left()
        return swarm

    return virtual_time.run(main())


async def leave(swarm: Any, node: int) -> None:
    """What a node does at Ctrl-C."""
    service = swarm.nodes[node].service
    service.stop_accepting(DRAIN_S)
    try:
        async with asyncio.timeout(DRAIN_S):
            await service.emptied()
    finally:
        crash(swarm, node)


def crash(swarm: Any, node: int) -> None:
    peer_id = swarm.nodes[node].peer.peer_id
    if swarm.network.peer(peer_id) is not None:
        swarm.network.crash(peer_id)


def drains(*nodes: int, at_s: float, apart_s: float = 0.0) -> Story:
    async def story(swarm: Any, _chain: Chain) -> None:
        await asyncio.sleep(at_s)
        async with asyncio.TaskGroup() as tasks:
            for node in nodes:
                tasks.create_task(leave(swarm, node))
                await asyncio.sleep(apart_s)

    return story


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("hop", CHAIN)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_hop_leaves_at_any_moment_and_nothing_is_computed_again(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int, hop: int, rows: int
) -> None:
    metrics = ClientMetrics()
    story = drains(hop, at_s=Random(seed).uniform(0, 1.2))
    swarm = converse(
        toy_swarm, toy_blocks, make_tensor, story, seed=seed, rows=rows, metrics=metrics
    )
    assert [node.counted.replayed_tokens for node in swarm.nodes] == [0] * len(SPANS)
    steps = swarm.nodes[(hop + 1) % 3].counted.steps
    assert swarm.nodes[hop].counted.steps + swarm.nodes[hop + 3].counted.steps == steps
    assert swarm.nodes[hop + 3].counted.opened == 1
    assert swarm.nodes[hop].counted.codes == []


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("hop", CHAIN)
def test_no_token_waits_for_the_move(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int, hop: int
) -> None:
    """While single tokens are decoded, with 20 ms between any two peers."""
    story = drains(hop, at_s=Random(seed).uniform(0.5, 2.5))
    swarm = converse(toy_swarm, toy_blocks, make_tensor, story, seed=seed, steps=60, tokens=1)
    durations_s = sorted(swarm.durations_s)
    assert durations_s[-1] < 3 * durations_s[len(durations_s) // 2]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("hops", [(0, 1), (1, 2), (2, 0), (0, 1, 2)])
@pytest.mark.parametrize("apart_s", [0.0, 0.15])
def test_several_hops_leave_at_once(
    toy_swarm: Any,
    toy_blocks: Any,
    make_tensor: Any,
    seed: int,
    hops: tuple[int, ...],
    apart_s: float,
) -> None:
    story = drains(*hops, at_s=Random(seed).uniform(0, 1.2), apart_s=apart_s)
    swarm = converse(toy_swarm, toy_blocks, make_tensor, story, seed=seed, rows=2, steps=40)
    assert [node.counted.replayed_tokens for node in swarm.nodes] == [0] * len(SPANS)
    assert all(swarm.nodes[hop].counted.closed == 1 for hop in hops)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("hop", CHAIN)
@pytest.mark.parametrize("victim", ["neighbour", "replacement", "leaving"])
def test_another_hop_dies_while_one_leaves(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int, hop: int, victim: str
) -> None:
    random = Random(seed)
    spans = (*SPANS, *SPANS[:3])
    dies = {"neighbour": (hop + random.choice((1, 2))) % 3, "replacement": hop + 3, "leaving": hop}

    async def story(swarm: Any, _chain: Chain) -> None:
        await asyncio.sleep(random.uniform(0, 1.2))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(leave(swarm, hop))
            await asyncio.sleep(random.uniform(0, 0.3))
            crash(swarm, dies[victim])

    converse(toy_swarm, toy_blocks, make_tensor, story, seed=seed, rows=2, steps=40, spans=spans)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("hop", CHAIN)
def test_blocks_that_go_to_several_nodes_are_rebuilt_there(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int, hop: int
) -> None:
    spans = (*SPANS[:3], *((block, block + 1) for block in range(6)))
    story = drains(hop, at_s=Random(seed).uniform(0, 1.2))
    converse(toy_swarm, toy_blocks, make_tensor, story, seed=seed, rows=2, steps=40, spans=spans)


@pytest.mark.parametrize("hop", CHAIN)
def test_a_node_without_a_replacement_serves_until_there_is_one(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, toy_planner: Any, hop: int
) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS, settings=LINKS)
        await swarm.start()
        planner = toy_planner(swarm, CHAIN)
        planner.fails_to_see |= {3, 4, 5}
        async with swarm.chain(*CHAIN, maximum_tokens=MAXIMUM_TOKENS, planner=planner) as chain:
            talk = Talk(chain, 1, 1, toy_blocks, make_tensor)
            await talk.step(5)
            leaving = asyncio.create_task(leave(swarm, hop))
            for _ in range(50):
                await talk.step(1)
            assert swarm.nodes[hop].service.sessions == 1
            planner.fails_to_see.clear()
            await leaving
            assert swarm.nodes[hop + 3].service.sessions == 1
            await talk.step(1)
        await swarm.assert_nothing_left()

    virtual_time.run(main())


@pytest.mark.parametrize("hop", CHAIN)
def test_an_idle_session_moves_too_and_a_new_one_is_refused(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, hop: int
) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS, settings=LINKS)
        await swarm.start()
        async with swarm.chain(*CHAIN, maximum_tokens=MAXIMUM_TOKENS) as chain:
            talk = Talk(chain, 1, 1, toy_blocks, make_tensor)
            if hop:
                await talk.step(30)
            started_s = swarm.clock.monotonic_s()
            await leave(swarm, hop)
            assert swarm.clock.monotonic_s() - started_s < 2
            await talk.step(1)
        await swarm.assert_nothing_left()

    virtual_time.run(main())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("hop", CHAIN)
def test_a_node_leaves_while_sessions_are_opened_on_it(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int, hop: int
) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS, seed=seed, settings=LINKS)
        await swarm.start()

        async def leave_soon() -> None:
            await asyncio.sleep(Random(seed).uniform(0, 0.2))
            await leave(swarm, hop)

        leaving = asyncio.create_task(leave_soon())
        async with swarm.chain(*CHAIN, maximum_tokens=MAXIMUM_TOKENS) as chain:
            talk = Talk(chain, seed, 1, toy_blocks, make_tensor)
            for _ in range(20):
                await talk.step()
            await leaving
            await talk.step(1)
        await swarm.assert_nothing_left()

    virtual_time.run(main())


@pytest.mark.parametrize("seed", range(5))
def test_a_neighbour_in_the_chain_may_take_the_blocks_over(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int
) -> None:
    async def main() -> None:
        swarm = toy_swarm(((0, 2), (0, 6)), seed=seed, settings=LINKS)
        await swarm.start()
        async with swarm.chain(0, 1, maximum_tokens=MAXIMUM_TOKENS) as chain:
            assert len(chain.plan.hops) == 2
            talk = Talk(chain, seed, 1, toy_blocks, make_tensor)
            leaving = asyncio.create_task(leave(swarm, 0))
            for _ in range(20):
                await talk.step()
            await leaving
            await talk.step(1)
            assert {hop.peer_id for hop in chain.plan.hops} == {swarm.nodes[1].peer.peer_id}
        assert swarm.nodes[1].counted.replayed_tokens == 0
        await swarm.assert_nothing_left()

    virtual_time.run(main())
