"""A node moves to other blocks: its sessions go on elsewhere, and it serves the new blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any, cast

import pytest

from swarm import virtual_time
from swarm.block_vectors import BlockVectors, PlacedNode, block_vectors
from swarm.client.chain import Chain
from swarm.membership import Announcer
from swarm.node.config import BlockSpan
from swarm.node.rebalancing import Outcome, Rebalancer
from swarm.node.relocation import Relocation
from swarm.protocol.errors import CapacityError
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType

SPANS = ((0, 2), (2, 4), (0, 2), (2, 4), (0, 2), (2, 4))
NEW = (4, 6)
MOVER = 2
DRAIN_S = 20.0


class Announced:
    """Stands for the announcer: keeps the record and what it said."""

    def __init__(self, record: NodeRecord) -> None:
        self.record = record
        self.said: list[tuple[NodeState, int, int]] = []

    def update(self, record: NodeRecord) -> None:
        self.record = record
        self.said.append((record.state, record.first_block, record.end_block))

    async def announced(self) -> None:
        return None


class Willing(Random):
    """Never leaves it to the others."""

    def random(self) -> float:
        return 0.0


class Known:
    """Two others for each block of 0 to 3, none for 4 and 5."""

    async def read(self) -> BlockVectors:
        return block_vectors(
            [
                PlacedNode(cast(Any, f"peer {number}"), first, first + 2, 100.0, uptime_s=1e6)
                for number, first in enumerate((0, 2) * 3)
            ],
            6,
        )

    async def emergency(self) -> BlockVectors:
        return await self.read()


class Story:
    """One node of a toy swarm with its relocation."""

    def __init__(self, swarm: Any, *, beside: bool, fail: bool = False) -> None:
        self.node = swarm.nodes[MOVER]
        self._engine_type: Callable[[int, int], Any] = type(self.node.engine)
        self.loads: list[str] = []
        self.served: list[Any] = []
        self._fail = fail
        self.announced = Announced(
            NodeRecord(
                peer_id=self.node.peer.peer_id,
                model_name="toy",
                model_revision=bytes(32),
                number_of_blocks=6,
                shards=1,
                first_block=0,
                end_block=2,
                state=NodeState.ONLINE,
                dtype=DType.FLOAT32,
                minimum_version=1,
                maximum_version=1,
                sequence=1,
                expires_unix_s=0,
                decode_tokens_per_s=100,
                batched_tokens_per_s=100,
            )
        )
        self.relocation = Relocation(
            self.node.engine,
            self.node.service,
            cast(Announcer, self.announced),
            swarm.clock,
            load=self._load,
            fits=lambda spans: beside or len(spans) == 1,
            drain_timeout_s=DRAIN_S,
            on_drain=lambda: self.loads.append("drains"),
            on_served=self.served.append,
        )
        self.rebalancer = Rebalancer(Known(), self.relocation, swarm.clock, Willing(1))

    async def _load(self, span: BlockSpan) -> Any:
        self.loads.append(str(span))
        await asyncio.sleep(3)
        if self._fail and span == BlockSpan(*NEW):
            raise CapacityError("no room")
        return self._engine_type(span.first_block, span.end_block)


async def talk(chain: Chain, blocks: Any, make_tensor: Any, until: asyncio.Event) -> int:
    """Single tokens until ``until``, each compared with the model; how many."""
    random, reference, steps = Random(1), blocks(0, 4, 1), 0
    while not until.is_set() or steps < 5:
        sent = make_tensor(random, 1, 1)
        position = min(steps, 100)
        received = await chain.step(sent, position, output_tokens=1)
        assert bytes(received.data) == reference.step(bytes(sent.data), 1, position)
        steps += 1
        await asyncio.sleep(0.05)
    return steps


@pytest.mark.parametrize("beside", [True, False])
def test_a_node_moves_under_a_live_session(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, beside: bool
) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS)
        await swarm.start()
        story, done = Story(swarm, beside=beside), asyncio.Event()
        async with swarm.chain(MOVER, 1, 0) as chain:
            talking = asyncio.create_task(talk(chain, toy_blocks, make_tensor, done))
            assert await story.rebalancer.consider() is Outcome.MOVED
            done.set()
            assert await talking > 5
            assert story.node.service.sessions == 0
        assert story.announced.said == [
            (NodeState.MOVING, 0, 2),
            (NodeState.JOINING, *NEW),
            (NodeState.ONLINE, *NEW),
        ]
        assert story.loads == (["4:6", "drains"] if beside else ["drains", "4:6"])
        assert [(engine.first_block, engine.end_block) for engine in story.served] == [NEW]
        story.node.engine = story.relocation.engine
        assert [node.counted.replayed_tokens for node in swarm.nodes] == [0] * len(SPANS)
        assert story.relocation.load_s()[4:].tolist() == [0.0, 0.0]
        assert bool(story.relocation.load_s()[0] == 0) is beside, "the old blocks are at hand"
        await story.relocation.close()
        await swarm.assert_nothing_left()

    virtual_time.run(main())


@pytest.mark.parametrize("beside", [True, False])
def test_what_cannot_be_loaded_leaves_the_node_where_it_was(toy_swarm: Any, beside: bool) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS)
        await swarm.start()
        story = Story(swarm, beside=beside, fail=True)
        assert await story.rebalancer.consider() is Outcome.FAILED
        assert story.announced.said[-1] == (NodeState.ONLINE, 0, 2)
        story.node.engine = story.relocation.engine
        async with swarm.chain(MOVER, 1) as chain:
            assert chain.plan.hops[0].peer_id == story.node.peer.peer_id
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_a_session_that_cannot_move_ends_and_is_healed(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, toy_planner: Any
) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS)
        await swarm.start()
        story, done = Story(swarm, beside=True), asyncio.Event()
        planner = toy_planner(swarm, (MOVER, 1))
        planner.fails_to_see |= {0, 4}
        async with swarm.chain(planner=planner) as chain:
            talking = asyncio.create_task(talk(chain, toy_blocks, make_tensor, done))
            moving = asyncio.create_task(story.rebalancer.consider())
            await asyncio.sleep(3 + DRAIN_S - 1)
            assert story.node.service.sessions == 1
            planner.fails_to_see.clear()
            assert await moving is Outcome.MOVED
            done.set()
            await talking
        story.node.engine = story.relocation.engine
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_a_way_back_costs_nothing(toy_swarm: Any) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS)
        await swarm.start()
        story = Story(swarm, beside=True)
        for span in (NEW, (0, 2), NEW):
            await story.relocation.load(span)
            await story.relocation.drain()
            await story.relocation.swap(span)
            record = replace(story.announced.record, first_block=span[0], end_block=span[1])
            story.announced.record = record
        assert story.loads == ["4:6", "drains", "drains", "drains"]

    virtual_time.run(main())
