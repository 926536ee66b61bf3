"""Simulations: the same seed gives the same trace, and the yardsticks measure what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from swarm.block_vectors import PlacedNode, block_vectors
from swarm.protocol.identity import PeerId
from swarm.simulation import petals
from swarm.simulation.churn import CHURNS, HEAVY, NORMAL
from swarm.simulation.control import simulate_control
from swarm.simulation.optimum import fewest_hops, weakest_stretch
from swarm.simulation.outages import simulate_outage
from swarm.simulation.placement import PETALS, POTENTIAL, PlacementRun, simulate_placement
from swarm.simulation.population import MODELS, dice_of, draw_volunteers
from swarm.simulation.routing import RoutingRun, Strategy, cheapest_chain, simulate_routing
from swarm.simulation.sessions import SessionRun, simulate_sessions
from swarm.simulation.world import (
    could_outlive_largest_organisation,
    countries_alone,
    outlives_largest_organisation,
)

SHORT = PlacementRun(20, 80, HEAVY, hours=0.5, warm_up_hours=0.5, seed=3)

DIGESTS = """
from swarm.simulation.churn import HEAVY
from swarm.simulation.placement import PlacementRun, simulate_placement
from swarm.simulation.sessions import SessionRun, simulate_sessions
run = PlacementRun(20, 80, HEAVY, hours=0.5, warm_up_hours=0.5, seed=3)
print(simulate_placement(run).digest)
print(simulate_sessions(SessionRun(nodes=5, clients=1, minutes=0.2, crash_every_s=8.0)).digest)
"""


def nodes(*spans: tuple[int, int, float]) -> list[PlacedNode]:
    return [PlacedNode(PeerId(str(n)), *span) for n, span in enumerate(spans)]


def test_the_same_seed_gives_the_same_trace_whatever_the_hash_seed() -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", DIGESTS],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("1", "2")
    ]
    first, second = (run.communicate()[0] for run in runs)
    assert len(first.split()) == 2
    assert first == second


def test_other_seeds_give_other_traces() -> None:
    other = PlacementRun(20, 80, HEAVY, hours=0.5, warm_up_hours=0.5, seed=4)
    assert simulate_placement(SHORT).digest != simulate_placement(other).digest


@pytest.mark.parametrize("rule", [POTENTIAL, PETALS])
def test_both_rules_keep_a_small_model_whole(rule: str) -> None:
    result = simulate_placement(
        PlacementRun(12, 32, NORMAL, rule=rule, hours=0.5, warm_up_hours=0.25)
    )
    assert result.covered == 1.0
    assert result.weakest_stretch > 0.8
    assert result.hops >= 1.0


def test_both_rules_meet_the_same_volunteers_and_churn() -> None:
    mine, theirs = (
        simulate_placement(
            PlacementRun(12, 32, HEAVY, rule=rule, hours=1.0, warm_up_hours=0.25, seed=1)
        )
        for rule in (POTENTIAL, PETALS)
    )
    assert mine.nodes == theirs.nodes
    assert mine.leaves_per_node_day == theirs.leaves_per_node_day > 0


def test_the_others_live_the_same_lives_without_an_organisation() -> None:
    run = PlacementRun(12, 32, HEAVY, hours=0.5, warm_up_hours=0.25, seed=1)
    all_of_them, others = (
        simulate_placement(replace(run, without_organisation=name)) for name in ("", "org-0")
    )
    assert 0 < others.nodes < all_of_them.nodes
    assert 0 < others.redundancy < all_of_them.redundancy
    assert all_of_them.outlives_organisation <= all_of_them.could_outlive


def test_a_swarm_that_lost_a_third_is_whole_again() -> None:
    result = simulate_outage(24, 80, seed=1, share=0.75)
    assert result.lost_nodes == 18
    assert result.redundancy > 1.0
    assert result.claimed_s <= result.recovered_s < 3600.0


def test_sessions_survive_crashes_and_partitions() -> None:
    result = simulate_sessions(
        SessionRun(nodes=6, clients=1, minutes=0.5, crash_every_s=10.0, partition_every_s=20.0)
    )
    assert result.answers > 0
    assert result.crashes > 0
    assert result.wrong_tokens == 0


def test_asked_candidates_come_close_to_the_oracle() -> None:
    asked, oracle = (
        simulate_routing(RoutingRun(40, 32, 0.3, strategy, seconds=20, warm_up_seconds=20))
        for strategy in (Strategy.ASKED, Strategy.ORACLE)
    )
    assert asked.sessions == oracle.sessions
    assert asked.token_s < 1.3 * oracle.token_s


def test_control_traffic_is_bounded() -> None:
    result = simulate_control(16, actors=4, seconds=60.0)
    assert result.known_nodes == 16
    assert 0 < result.bytes_per_s < 4000


# --- yardsticks ----------------------------------------------------------------------------------
def test_the_weakest_stretch_of_overlapping_nodes() -> None:
    assert weakest_stretch(nodes((0, 2, 1.0), (1, 3, 1.0)), 3) == pytest.approx(1.0, abs=0.01)
    assert weakest_stretch(nodes((0, 1, 1.0), (1, 2, 3.0)), 2) == pytest.approx(0.5, abs=0.01)
    # The first node is all that blocks 0 and 2 have; a stretch alone would not show it.
    lonely = nodes((0, 3, 1.0), (1, 2, 9.0))
    assert weakest_stretch(lonely, 3) == pytest.approx(0.5 / (10 / 3), abs=0.01)


def test_the_shortest_chain() -> None:
    assert fewest_hops(nodes((0, 3, 1.0), (1, 6, 1.0), (2, 4, 1.0), (5, 8, 1.0)), 8) == 3
    assert fewest_hops(nodes((0, 3, 1.0), (4, 8, 1.0)), 8) == 0


def test_the_exact_chain_prefers_near_nodes() -> None:
    delays_s = np.full((8, 8), 0.03)
    np.fill_diagonal(delays_s, 0.001)
    starts, ends = np.array([0, 0, 4, 4]), np.array([4, 4, 8, 8])
    cities = np.array([0, 1, 1, 0])
    equal = np.full(4, 0.001)
    hops = cheapest_chain(starts, ends, cities, equal, equal, delays_s, 0, 8)
    assert hops == [(0, 4), (3, 4)]


def test_petals_joins_where_the_sorted_window_is_smallest() -> None:
    assert petals.choose_start(np.array([3.0, 1.0, 2.0, 1.0, 1.5, 9.0]), 2) == 3
    swarm = nodes((0, 2, 4.0), (0, 2, 4.0), (2, 4, 4.0))
    assert petals.wants_elsewhere(swarm[0], swarm, 4) is False  # both places are equal then
    assert petals.wants_elsewhere(swarm[2], swarm, 4) is False  # nobody else has its blocks


def test_organisations_and_countries_that_stand_alone() -> None:
    def node(name: str, first: int, end: int, organisation: str, country: str) -> PlacedNode:
        return PlacedNode(PeerId(name), first, end, 1.0, organisation=organisation, country=country)

    swarm = [node("1", 0, 4, "a", "AA"), node("2", 0, 4, "a", "AA"), node("3", 0, 3, "b", "BB")]
    vectors = block_vectors(swarm, 4)
    assert not outlives_largest_organisation(vectors)
    assert not could_outlive_largest_organisation(vectors)  # three blocks are not four
    assert countries_alone(vectors) == [True]
    doubled = block_vectors([*swarm, node("5", 0, 3, "c", "CC")], 4)
    assert could_outlive_largest_organisation(doubled)
    assert not outlives_largest_organisation(doubled)
    swarm.append(node("4", 3, 4, "b", "BB"))
    assert outlives_largest_organisation(block_vectors(swarm, 4))


@pytest.mark.parametrize("name", sorted(CHURNS))
def test_lives_have_their_mean_and_heavy_tails(name: str) -> None:
    churn, dice = CHURNS[name], dice_of(0, "lives")
    lives_s = [churn.life_s(dice, lab=False) for _ in range(20_000)]
    assert np.mean(lives_s) == pytest.approx(churn.mean_life_s, rel=0.1)
    assert np.median(lives_s) < 0.4 * np.mean(lives_s)
    running_s = [sum(churn.running_life_s(dice, lab=False)) for _ in range(5000)]
    assert np.mean(running_s) > 3 * np.mean(lives_s)  # long lives are met more often


def test_every_class_takes_part_in_its_proportion() -> None:
    volunteers = draw_volunteers(100, MODELS[80], dice_of(0, "who"))
    assert sum(v.organisation == "org-0" for v in volunteers) == 30
    assert sum(v.hardware.name == "CPU" for v in volunteers) == 20
    assert all(1 <= v.size <= 80 for v in volunteers)
