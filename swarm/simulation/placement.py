"""Days of a swarm under churn: real placement and rebalancing, or Petals' rule, over a model world.

Who comes when, stays how long and crashes or not is drawn before and the same for both rules.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from swarm import virtual_time
from swarm.block_vectors import BlockVectors, PlacedNode, Vector, without
from swarm.node.rebalancing import Outcome, Rebalancer
from swarm.placement import DEFAULTS, PlacementSettings, choose_span, loading_s
from swarm.protocol.records import NodeState
from swarm.simulation import petals
from swarm.simulation.churn import Churn
from swarm.simulation.population import (
    MODELS,
    SimulatedModel,
    Volunteer,
    dice_of,
    draw_volunteers,
)
from swarm.simulation.world import World
from swarm.virtual_time import LoopClock

SWAP_S = 20.0
"""From the disk into the device's memory."""
READ_S = 1.0
"""A read of the directory, at most."""
DISK_SPANS = 3
"""So many spans fit on a disk."""
LINGERING_S = (15.0, 30.0)
"""Until neighbours agree that a crashed node is gone."""
PETALS = "petals"
POTENTIAL = "potential"
EXACT_PETALS_NODES = 30
"""In larger swarms Petals' simulation of everybody is shared among those who ask in one minute."""


@dataclass(frozen=True, slots=True)
class PlacementRun:
    """What to simulate."""

    nodes: int
    """That are there on average."""
    blocks: int
    churn: Churn
    rule: str = POTENTIAL
    seed: int = 0
    hours: float = 6.0
    warm_up_hours: float = 2.0
    sample_s: float = 300.0
    settings: PlacementSettings = DEFAULTS
    without_organisation: str = ""
    """Leave its volunteers away; all others come, stay and go as they would with them."""


@dataclass(frozen=True, slots=True)
class PlacementResult:
    """Means over the measured hours."""

    nodes: float
    redundancy: float
    weakest_stretch: float
    """Throughput of the weakest stretch if work is split ideally, relative to the optimum."""
    weakest_block: float
    """The same if every node splits its speed evenly over its blocks."""
    covered: float
    """Share of time with every block on at least one node."""
    covered_twice: float
    moves_per_node_day: float
    leaves_per_node_day: float
    blocks_loaded_per_node_day: float
    hops: float
    """Of the shortest chain, while there is one."""
    outlives_organisation: float
    """Share of time in which the largest organisation could go and every block would stay."""
    could_outlive: float
    """Share of time in which the others hosted enough blocks for that, wherever they were."""
    countries_alone: float
    """Share of countries with 1.5x the nodes they need that are covered by their own; 1 of none."""
    digest: str
    """Of all announcements and when they were made: equal runs have equal ones."""


def simulate_placement(run: PlacementRun) -> PlacementResult:
    """In virtual time; the same run always gives the same result."""
    return virtual_time.run(_simulate(run))


async def _simulate(run: PlacementRun) -> PlacementResult:
    model = MODELS[run.blocks]
    world = World(run.blocks)
    volunteers = draw_volunteers(_population(run), model, dice_of(run.seed, "who"))
    lives = [
        make_life(run, world, model, volunteer)
        for volunteer in volunteers
        if not volunteer.organisation or volunteer.organisation != run.without_organisation
    ]
    async with asyncio.TaskGroup() as group:
        settle(lives)
        tasks = [group.create_task(life.run()) for life in lives]
        tasks.append(group.create_task(world.watch(dice_of(run.seed, "watch"))))
        await asyncio.sleep(run.warm_up_hours * 3600)
        world.begin_measuring()
        for _ in range(round(run.hours * 3600 / run.sample_s)):
            await asyncio.sleep(run.sample_s)
            world.measure()
        for task in tasks:
            task.cancel()
    return _result(run, world)


def _population(run: PlacementRun) -> int:
    """So many volunteers have to exist for ``run.nodes`` to be there."""
    presence = 0.55 * run.churn.presence(lab=True) + 0.45 * run.churn.presence(lab=False)
    return round(run.nodes / presence)


def _result(run: PlacementRun, world: World) -> PlacementResult:
    samples = world.samples
    nodes = fmean(samples.present)
    node_days = nodes * run.hours / 24
    hops = [hops for hops in samples.fewest_hops if hops]
    return PlacementResult(
        nodes=nodes,
        redundancy=fmean(samples.redundancy),
        weakest_stretch=fmean(samples.weakest_stretch),
        weakest_block=fmean(samples.weakest_block),
        covered=world.seconds_with[1] / world.seconds,
        covered_twice=world.seconds_with[2] / world.seconds,
        moves_per_node_day=world.moves / node_days,
        leaves_per_node_day=world.leaves / node_days,
        blocks_loaded_per_node_day=world.blocks_loaded / node_days,
        hops=fmean(hops) if hops else 0.0,
        outlives_organisation=fmean(samples.outlives_organisation),
        could_outlive=fmean(samples.could_outlive),
        countries_alone=fmean(samples.country_alone) if samples.country_alone else 1.0,
        digest=world.digest(),
    )


def make_life(run: PlacementRun, world: World, model: SimulatedModel, volunteer: Volunteer) -> Life:
    """The life of one volunteer under the rule of ``run``."""
    return (PetalsLife if run.rule == PETALS else PotentialLife)(run, world, model, volunteer)


def settle(lives: Sequence[Life]) -> None:
    """Those who are there at the beginning place themselves one after the other."""
    for life in lives:
        if life.begins_present:
            life.settle()


class Life:
    """One volunteer: comes, loads, serves, moves, goes; again and again."""

    def __init__(
        self, run: PlacementRun, world: World, model: SimulatedModel, volunteer: Volunteer
    ) -> None:
        self.volunteer = volunteer
        self._run = run
        self._world = world
        self._clock = LoopClock()
        self._dice = dice_of(run.seed, volunteer.peer_id, "choices")
        self._fate = dice_of(run.seed, volunteer.peer_id, "fate")
        self._disk: OrderedDict[int, None] = OrderedDict()
        self._started_s = 0.0
        self._span = (0, 0)
        self._state = NodeState.JOINING
        self._target: tuple[int, int] | None = None
        churn, lab = run.churn, volunteer.is_lab
        self.begins_present = self._fate.random() < churn.presence(lab=lab)
        age_s, self._rest_s = churn.running_life_s(self._fate, lab=lab)
        self._first_age_s = age_s

    @property
    def node(self) -> PlacedNode:
        """As it is announced."""
        volunteer = self.volunteer
        return PlacedNode(
            peer_id=volunteer.peer_id,
            first_block=self._span[0],
            end_block=self._span[1],
            speed=volunteer.speed,
            state=self._state,
            target=self._target,
            organisation=volunteer.organisation,
            country=volunteer.country,
            uptime_s=self._clock.monotonic_s() - self._started_s,
        )

    @property
    def size(self) -> int:
        return self.volunteer.size

    def load_s(self) -> Vector:
        return loading_s(
            self._world.number_of_blocks, self._disk, self.volunteer.download_s_per_block
        )

    # --- its course --------------------------------------------------------------------------
    def settle(self) -> None:
        """Be there already when the simulation begins, with everything loaded."""
        self._started_s = -self._first_age_s
        self._span = (0, self.volunteer.size)
        self._world.arrive(self.node)
        self._span = self._choose()
        self._keep_on_disk(self._span)
        self._go_online()

    async def run(self) -> None:
        """Until cancelled."""
        churn, lab = self._run.churn, self.volunteer.is_lab
        if not self.begins_present:
            await self._clock.sleep(churn.absence_s(self._fate))
        settled = self.begins_present
        while True:
            life_s = self._rest_s if settled else churn.life_s(self._fate, lab=lab)
            try:
                async with asyncio.timeout(life_s):
                    if not settled:
                        await self._join()
                    await self._serve()
            except TimeoutError:
                self.go(crash=churn.is_crash(self._fate))
            settled = False
            await self._clock.sleep(churn.absence_s(self._fate))

    async def _join(self) -> None:
        self._started_s = self._clock.monotonic_s()
        self._state, self._target = NodeState.JOINING, None
        self._span = (0, self.volunteer.size)
        self._world.arrive(self.node)
        self._world.joins += 1
        await self._clock.sleep(self._dice.uniform(0.0, 10.0))
        self._span = self._choose()
        self._announce()
        await self._fetch(self._span)
        await self._clock.sleep(SWAP_S)
        self._go_online()

    async def _serve(self) -> None:
        """Until the life ends."""
        raise NotImplementedError

    def _choose(self) -> tuple[int, int]:
        raise NotImplementedError

    def _go_online(self) -> None:
        self._state, self._target = NodeState.ONLINE, None
        self._world.serve(self.node)
        self._announce()

    def _announce(self) -> None:
        self._world.announce(self.node)

    def go(self, *, crash: bool) -> None:
        """Switch off; ``run`` must have ended or be between two lives."""
        world, peer_id = self._world, self.volunteer.peer_id
        world.leaves += 1
        world.depart(peer_id)
        if crash:
            started_s = self._started_s

            def forget() -> None:
                if self._started_s == started_s:
                    world.withdraw(peer_id)

            lingering_s = self._dice.uniform(*self._lingering_s())
            asyncio.get_running_loop().call_later(lingering_s, forget)
        else:
            world.withdraw(peer_id)

    def _lingering_s(self) -> tuple[float, float]:
        return LINGERING_S

    async def _fetch(self, span: tuple[int, int]) -> None:
        """Download what the disk lacks."""
        for block in range(*span):
            if block not in self._disk:
                await self._clock.sleep(self.volunteer.download_s_per_block)
                self._world.blocks_loaded += 1
            self._keep_on_disk((block, block + 1))

    def _keep_on_disk(self, span: tuple[int, int]) -> None:
        for block in range(*span):
            self._disk[block] = None
            self._disk.move_to_end(block)
        while len(self._disk) > DISK_SPANS * self.volunteer.size:
            self._disk.popitem(last=False)


class PotentialLife(Life):
    """By ``swarm.placement`` and ``node.rebalancing``: it is their ``Others`` and ``Mover``."""

    async def _serve(self) -> None:
        rebalancer = Rebalancer(
            self,
            self,
            self._clock,
            self._dice,
            settings=self._run.settings,
            observer=self._observe,
        )
        await rebalancer.run()

    def _choose(self) -> tuple[int, int]:
        choice = choose_span(
            self._others(), self.node, self.volunteer.size, self.load_s(), self._run.settings
        )
        return choice.first_block, choice.end_block

    def _others(self) -> BlockVectors:
        seen = self._world.read(self._dice)
        self_as_seen = seen.nodes.get(self.volunteer.peer_id)
        return seen.vectors if self_as_seen is None else without(seen.vectors, self_as_seen)

    def _observe(self, outcome: Outcome) -> None:
        self._world.moves += outcome is Outcome.MOVED

    # --- Others and Mover --------------------------------------------------------------------
    async def read(self) -> BlockVectors:
        await self._clock.sleep(self._dice.uniform(0.0, READ_S))
        return self._others()

    async def emergency(self) -> BlockVectors:
        return await self._world.emergency()

    async def announce(self, node: PlacedNode) -> None:
        self._span = (node.first_block, node.end_block)
        self._state, self._target = node.state, node.target
        self._announce()

    async def load(self, span: tuple[int, int]) -> None:
        await self._fetch(span)

    async def give_back(self, span: tuple[int, int]) -> None:
        """The disk keeps it."""

    async def drain(self) -> None:
        self._world.stop_serving(self.volunteer.peer_id)

    async def swap(self, span: tuple[int, int]) -> None:
        await self._clock.sleep(SWAP_S)
        self._world.serve(replace(self.node, state=NodeState.ONLINE))


class PetalsLife(Life):
    """By Petals' published rule."""

    async def _serve(self) -> None:
        while True:
            await self._clock.sleep(self._dice.uniform(0.0, 2 * petals.MEAN_BALANCE_CHECK_S))
            if not self._should_move():
                continue
            self._world.stop_serving(self.volunteer.peer_id)
            self._world.withdraw(self.volunteer.peer_id)
            self._state = NodeState.JOINING
            self._span = self._choose()
            self._announce()
            self._world.balances.somebody_moved()
            await self._fetch(self._span)
            await self._clock.sleep(SWAP_S)
            self._go_online()
            self._world.moves += 1

    def _choose(self) -> tuple[int, int]:
        of_blocks = petals.throughputs(self._seen(), self._world.number_of_blocks)
        start = petals.choose_start(of_blocks, self.volunteer.size)
        return start, start + self.volunteer.size

    def _seen(self) -> list[PlacedNode]:
        nodes = self._world.read(self._dice).nodes
        return [node for peer_id, node in nodes.items() if peer_id != self.volunteer.peer_id]

    def _should_move(self) -> bool:
        blocks = self._world.number_of_blocks
        nodes = [*self._seen(), self.node]
        if not petals.wants_elsewhere(self.node, nodes, blocks):
            return False
        if len(nodes) <= EXACT_PETALS_NODES:
            dice = np.random.default_rng(self._dice.getrandbits(32))
            return petals.is_unbalanced(petals.balance(self.node, nodes, blocks, dice))
        return petals.is_unbalanced(self._world.balances.of(nodes))

    def _lingering_s(self) -> tuple[float, float]:
        return petals.RECORD_S
