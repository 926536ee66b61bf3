"""A running node moves when it is needed elsewhere, step by step, and never leaves a hole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from swarm import virtual_time
from swarm.block_vectors import BlockVectors, PlacedNode, Vector, block_vectors
from swarm.node.rebalancing import Outcome, Rebalancer, Span
from swarm.placement import DEFAULTS, decision_interval_s
from swarm.protocol.errors import CapacityError, NetworkError
from swarm.protocol.identity import PeerId
from swarm.protocol.records import NodeState
from swarm.virtual_time import LoopClock

BLOCKS = 8


def node(name: str, first: int, end: int) -> PlacedNode:
    return PlacedNode(PeerId(name), first, end, 100.0, uptime_s=3600.0)


class Directory:
    """What is announced and what is served."""

    def __init__(self, *nodes: PlacedNode) -> None:
        self.announced = {node.peer_id: node for node in nodes}
        self.served = dict(self.announced)
        self.uncovered: list[int] = []

    def check(self) -> None:
        """Remember blocks that nobody serves."""
        for block in range(BLOCKS):
            if not any(n.first_block <= block < n.end_block for n in self.served.values()):
                self.uncovered.append(block)


class ToyMover:
    """A node without blocks, service or records: ``Others`` and ``Mover``."""

    def __init__(self, directory: Directory, name: str) -> None:
        self.directory = directory
        self.peer_id = PeerId(name)
        self.log: list[str] = []
        self.while_loading: Callable[[], None] = lambda: None
        self.load_error: Exception | None = None
        self.swap_error: Exception | None = None
        self.directory_error: Exception | None = None

    @property
    def node(self) -> PlacedNode:
        return self.directory.announced[self.peer_id]

    @property
    def size(self) -> int:
        return self.node.end_block - self.node.first_block

    def load_s(self) -> Vector:
        return np.zeros(BLOCKS)

    async def read(self) -> BlockVectors:
        await asyncio.sleep(0.5)
        if self.directory_error is not None:
            raise self.directory_error
        others = [n for n in self.directory.announced.values() if n.peer_id != self.peer_id]
        return block_vectors(others, BLOCKS)

    async def emergency(self) -> BlockVectors:
        while True:
            vectors = block_vectors(self.directory.announced.values(), BLOCKS)
            if decision_interval_s(vectors) < DEFAULTS.interval_s:
                return vectors
            await asyncio.sleep(60.0)

    async def announce(self, node: PlacedNode) -> None:
        self.log.append(f"{node.state.name} {node.first_block}:{node.end_block}")
        self.directory.announced[self.peer_id] = node

    async def load(self, span: Span) -> None:
        self.log.append("load {}:{}".format(*span))
        await asyncio.sleep(60.0)
        self.while_loading()
        if self.load_error is not None:
            raise self.load_error

    async def give_back(self, span: Span) -> None:
        self.log.append("give back {}:{}".format(*span))

    async def drain(self) -> None:
        self.log.append("drain")
        del self.directory.served[self.peer_id]
        self.directory.check()

    async def swap(self, span: Span) -> None:
        await asyncio.sleep(20.0)
        if self.swap_error is not None:
            self.directory.served[self.peer_id] = self.node
            raise self.swap_error
        self.log.append("swap {}:{}".format(*span))
        self.directory.served[self.peer_id] = self.node


def lopsided() -> Directory:
    """Blocks 0-3 on four nodes, 4-7 on one."""
    return Directory(*(node(name, 0, 4) for name in "abcd"), node("e", 4, 8))


def consider(mover: ToyMover) -> Outcome:
    rebalancer = Rebalancer(mover, mover, LoopClock(), Random(1))  # draws low: not damped
    return virtual_time.run(rebalancer.consider())


def test_a_move_step_by_step() -> None:
    mover = ToyMover(lopsided(), "a")
    assert consider(mover) is Outcome.MOVED
    assert mover.log == [
        "MOVING 0:4",
        "load 4:8",
        "JOINING 4:8",
        "drain",
        "swap 4:8",
        "ONLINE 4:8",
    ]
    assert mover.node.target is None
    assert mover.directory.uncovered == []


def test_who_is_in_its_place_stays() -> None:
    mover = ToyMover(lopsided(), "e")
    assert consider(mover) is Outcome.STAYED
    assert mover.log == []


def test_blocks_that_do_not_load_leave_the_node_where_it_was() -> None:
    mover = ToyMover(lopsided(), "a")
    mover.load_error = CapacityError("no room")
    assert consider(mover) is Outcome.FAILED
    assert mover.log[-2:] == ["give back 4:8", "ONLINE 0:4"]
    assert mover.node.target is None


def test_a_swap_that_fails_leaves_the_node_where_it_was() -> None:
    mover = ToyMover(lopsided(), "a")
    mover.swap_error = CapacityError("out of memory")
    assert consider(mover) is Outcome.FAILED
    assert mover.log[-1] == "ONLINE 0:4"


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (lambda n: replace(n, state=NodeState.DRAINING), Outcome.NEEDED_HERE),
        (
            lambda n: replace(n, state=NodeState.MOVING, target=(4, 8)),
            Outcome.NEEDED_HERE,
        ),
        (lambda n: replace(n, first_block=4, end_block=8), Outcome.NEEDED_HERE),
    ],
)
def test_what_happens_while_loading_counts(
    change: Callable[[PlacedNode], PlacedNode], outcome: Outcome
) -> None:
    mover = ToyMover(lopsided(), "a")

    def others_change() -> None:
        for name in "bcd":
            peer = PeerId(name)
            mover.directory.announced[peer] = change(mover.directory.announced[peer])

    mover.while_loading = others_change
    assert consider(mover) is outcome
    assert mover.log[-1] == "ONLINE 0:4"


def test_nobody_goes_where_others_have_gone_meanwhile() -> None:
    mover = ToyMover(lopsided(), "a")

    def many_come() -> None:
        for name in "vwxyz":
            mover.directory.announced[PeerId(name)] = node(name, 4, 8)

    mover.while_loading = many_come
    assert consider(mover) is Outcome.BETTER_HERE


def run_all(directory: Directory, names: str, hours: float, seed: int) -> list[ToyMover]:
    movers = [ToyMover(directory, name) for name in names]

    async def story() -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    Rebalancer(mover, mover, LoopClock(), Random(f"{seed}/{name}")).run()
                )
                for mover, name in zip(movers, names, strict=True)
            ]
            await asyncio.sleep(3600.0 * hours)
            for task in tasks:
                task.cancel()

    virtual_time.run(story())
    return movers


@pytest.mark.parametrize("seed", range(5))
def test_movers_together_balance_the_swarm_and_never_uncover_a_block(seed: int) -> None:
    directory = Directory(*(node(name, 0, 4) for name in "abcdef"), node("g", 4, 8))
    run_all(directory, "abcdefg", hours=1.5, seed=seed)
    assert directory.uncovered == []
    first_half = sum(n.first_block < 2 for n in directory.served.values())
    assert 3 <= first_half <= 4


def test_a_directory_that_does_not_answer_is_asked_again_later() -> None:
    directory = lopsided()
    mover = ToyMover(directory, "a")
    mover.directory_error = NetworkError("no answer")

    async def story() -> None:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(Rebalancer(mover, mover, LoopClock(), Random(0)).run())
            await asyncio.sleep(1800.0)
            assert mover.log == []
            mover.directory_error = None
            await asyncio.sleep(1800.0)
            task.cancel()

    virtual_time.run(story())
    assert mover.log[-1] == "ONLINE 4:8"
