"""Many nodes vanish at once: how many blocks are lost, how long until all are served again?

A third of the nodes by lot, or all of one organisation. Nobody else comes or goes. The clock starts
with the outage: noticing it, deciding, downloading and swapping all count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from swarm import virtual_time
from swarm.simulation.churn import Churn
from swarm.simulation.placement import Life, PlacementRun, make_life, settle
from swarm.simulation.population import MODELS, dice_of, draw_volunteers
from swarm.simulation.world import World

NOBODY_LEAVES = Churn("none", 1e12)
SETTLING_S = 1800.0
GIVE_UP_S = 3600


@dataclass(frozen=True, slots=True)
class OutageResult:
    """What happened."""

    lost_nodes: int
    uncovered_blocks: int
    """Right after the outage."""
    redundancy: float
    """Of those that are left: below 1 no placement covers the model."""
    countries: int
    """That hosted 1.5 copies of the model before the outage."""
    countries_alone: int
    """Of these: covered by their own nodes."""
    claimed_s: float
    """Until every block has a node or one that loads it."""
    recovered_s: float
    """Until every block is served; infinite if that takes longer than an hour."""


def simulate_outage(
    nodes: int,
    blocks: int,
    *,
    seed: int = 0,
    share: float = 1 / 3,
    organisation: str = "",
    rule: str = "potential",
) -> OutageResult:
    """In virtual time; the same arguments always give the same result.

    ``share`` of the nodes vanish by lot, or instead all of ``organisation``.
    """
    run = PlacementRun(nodes, blocks, NOBODY_LEAVES, rule=rule, seed=seed)
    return virtual_time.run(_simulate(run, share, organisation))


async def _simulate(run: PlacementRun, share: float, organisation: str) -> OutageResult:
    world = World(run.blocks)
    volunteers = draw_volunteers(run.nodes, MODELS[run.blocks], dice_of(run.seed, "who"))
    lives = [make_life(run, world, MODELS[run.blocks], volunteer) for volunteer in volunteers]
    async with asyncio.TaskGroup() as group:
        for life in lives:
            life.begins_present = True
        settle(lives)
        tasks = [group.create_task(life.run()) for life in lives]
        watching = group.create_task(world.watch(dice_of(run.seed, "watch")))
        await asyncio.sleep(SETTLING_S)
        world.measure()
        alone = world.samples.country_alone
        lost = _lost(lives, run, share, organisation)
        for index in lost:
            tasks[index].cancel()
        await asyncio.sleep(0)
        for index in lost:
            lives[index].go(crash=True)
        uncovered = world.uncovered_blocks()
        hosted = sum(node.end_block - node.first_block for node in world.present.values())
        claimed_s = recovered_s = float("inf")
        for look in range(GIVE_UP_S):
            if not world.unclaimed_blocks():
                claimed_s = min(claimed_s, float(look))
            if not world.uncovered_blocks():
                recovered_s = float(look)
                break
            await asyncio.sleep(1.0)
        for task in (*tasks, watching):
            task.cancel()
    return OutageResult(
        lost_nodes=len(lost),
        uncovered_blocks=uncovered,
        redundancy=hosted / run.blocks,
        countries=len(alone),
        countries_alone=sum(alone),
        claimed_s=claimed_s,
        recovered_s=recovered_s,
    )


def _lost(
    lives: Sequence[Life], run: PlacementRun, share: float, organisation: str
) -> Sequence[int]:
    """Indices of those who vanish."""
    if organisation:
        return [
            index for index, life in enumerate(lives) if life.volunteer.organisation == organisation
        ]
    return dice_of(run.seed, "outage").sample(range(len(lives)), round(share * len(lives)))
