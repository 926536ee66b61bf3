"""Placement: the potential, the best span, when to move and when not to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.block_vectors import (
    PlacedNode,
    block_vectors,
    placed_nodes,
    typical_speed,
    with_node,
    without,
)
from swarm.placement import (
    DEFAULTS,
    Stay,
    choose_span,
    decide_move,
    decision_interval_s,
    gains,
    loading_s,
    may_leave,
    span_size,
)
from swarm.protocol.identity import PeerId
from swarm.protocol.records import NodeState
from tests.unit.swarm.conftest import MakeRecord

HOUR_S = 3600.0


def node(name: object, first: int, end: int, speed: float = 100.0, **rest: object) -> PlacedNode:
    placed = PlacedNode(PeerId(str(name)), first, end, speed, uptime_s=HOUR_S)
    return replace(placed, **rest)  # type: ignore[arg-type]


def nothing_loads(blocks: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.zeros(blocks)


def potential(nodes: Sequence[PlacedNode], blocks: int) -> float:
    """The definition, block by block, without vectors."""
    mean = sum(n.speed for n in nodes) / blocks
    hosted = sum(n.planned[1] - n.planned[0] for n in nodes)
    expected = sum(n.availability * (n.planned[1] - n.planned[0]) for n in nodes)
    exponent = 2 if expected < 3 * blocks else 3
    total = 0.0
    countries = {n.country for n in nodes if n.country}
    for block in range(blocks):
        here = [n for n in nodes if n.planned[0] <= block < n.planned[1]]
        throughput = sum(n.speed / (n.planned[1] - n.planned[0]) for n in here)
        replicas = sum(n.availability for n in here)
        owners = {n.organisation or n.peer_id for n in here}
        total -= (mean / (throughput + 0.02 * mean)) ** exponent
        total -= 0.3 * max(0.0, 3 - replicas) ** 2 + max(0, 2 - len(owners)) ** 2
        total -= min(max(hosted / blocks - 3, 0), 1) * max(0, 3 - len(owners)) ** 2
        for country in countries:
            own = [n for n in nodes if n.country == country]
            own_hosted = sum(n.planned[1] - n.planned[0] for n in own)
            if own_hosted < 1.5 * blocks or hosted < 4 * blocks:
                continue
            own_mean = sum(n.speed for n in own) / blocks
            share = own_mean / mean
            own_here = sum(n.speed / (n.planned[1] - n.planned[0]) for n in here if n in own)
            total -= 0.01 * share * (own_mean / (own_here + 0.02 * own_mean)) ** exponent
    return total


def random_swarm(dice: Random, blocks: int, nodes: int) -> list[PlacedNode]:
    swarm = []
    for index in range(nodes):
        size = dice.randint(1, blocks)
        first = dice.randint(0, blocks - size)
        swarm.append(
            node(
                index,
                first,
                first + size,
                dice.choice((50.0, 300.0, 900.0)),
                organisation=dice.choice(("", "a", "b")),
                country=dice.choice(("", "AA", "BB")),
                uptime_s=dice.uniform(0, 9999),
            )
        )
    return swarm


# --- vectors -------------------------------------------------------------------------------------
def test_a_node_counts_at_its_target_and_stays_only_where_it_will_be() -> None:
    moving = node("m", 0, 4, 400.0, state=NodeState.MOVING, target=(3, 7))
    joining = node("j", 0, 2, state=NodeState.JOINING)
    leaving = node("d", 0, 8, state=NodeState.DRAINING)
    vectors = block_vectors([moving, joining, leaving], 8)
    assert vectors.planned.tolist() == [1, 1, 0, 1, 1, 1, 1, 0]
    assert vectors.staying.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert vectors.throughput.tolist() == pytest.approx([50, 50, 0, 100, 100, 100, 100, 0])
    assert vectors.nodes == 2


def test_one_organisation_counts_once_and_nodes_without_one_each() -> None:
    swarm = [node(n, 0, 2, organisation="a") for n in "12"] + [node(n, 1, 2) for n in "34"]
    assert block_vectors(swarm, 2).organisations().tolist() == [1, 3]


@pytest.mark.parametrize("seed", range(20))
def test_the_vectors_without_a_node_are_those_of_the_others(seed: int) -> None:
    dice = Random(seed)
    swarm = random_swarm(dice, 9, 12)
    swarm[0] = replace(swarm[0], state=NodeState.MOVING, target=(2, 6))
    swarm[1] = replace(swarm[1], state=NodeState.JOINING)
    for gone in swarm:
        got = without(block_vectors(swarm, 9), gone)
        expected = block_vectors([n for n in swarm if n is not gone], 9)
        back = with_node(got, gone)
        for name in ("throughput", "replicas", "planned", "staying"):
            assert getattr(back, name) == pytest.approx(getattr(block_vectors(swarm, 9), name))
            assert getattr(got, name) == pytest.approx(getattr(expected, name)), name
        assert got.organisations().tolist() == expected.organisations().tolist()
        assert got.nodes == expected.nodes


def test_records_become_nodes(make_record: MakeRecord) -> None:
    records = [
        make_record(0, 10, batched_tokens_per_s=4000, organisation="a", country="KE"),
        make_record(5, 9, state=NodeState.JOINING, decode_tokens_per_s=0),
        make_record(
            0,
            9,
            state=NodeState.MOVING,
            target_first_block=3,
            target_end_block=12,
            decode_tokens_per_s=2000,
            started_unix_s=500,
        ),
    ]
    first, joining, moving = placed_nodes(records, now_unix_s=1500.0)
    assert (first.speed, first.organisation, first.country) == (4000.0, "a", "KE")
    assert joining.speed == 3000.0  # unknown: the mean of the others
    assert (moving.planned, moving.staying, moving.uptime_s) == ((3, 12), (3, 9), 1000.0)
    assert typical_speed([]) == 1.0


# --- gain ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(30))
def test_the_gain_is_the_difference_of_the_potential(seed: int) -> None:
    dice = Random(seed)
    blocks = dice.randint(3, 12)
    swarm = random_swarm(dice, blocks, dice.choice((0, 3, 30)))
    size = dice.randint(1, blocks)
    me = node("me", 0, size, 200.0, organisation="a", country="AA")
    everywhere = gains(block_vectors(swarm, blocks), me, size)
    here = [
        potential([*swarm, replace(me, first_block=first, end_block=first + size)], blocks)
        for first in range(blocks - size + 1)
    ]
    # What does not depend on the place (the mean, shares of other countries) is left out.
    assert np.diff(everywhere) == pytest.approx(np.diff(here), rel=1e-6, abs=1e-6)


def test_three_nodes_after_each_other_cover_everything() -> None:
    swarm: list[PlacedNode] = []
    for expected in [(0, 10), (10, 20), (20, 30)]:
        choice = choose_span(block_vectors(swarm, 30), node("me", 0, 10), 10, nothing_loads(30))
        assert (choice.first_block, choice.end_block) == expected
        swarm.append(node(len(swarm), *expected))


def test_uncovered_blocks_come_first() -> None:
    swarm = [node(1, 0, 10, 1.0), *(node(i, 12, 30, 9999.0) for i in range(2, 5))]
    choice = choose_span(block_vectors(swarm, 30), node("me", 0, 4), 4, nothing_loads(30))
    assert choice.first_block <= 10
    assert choice.end_block >= 12


def test_a_rejoining_node_goes_back_to_where_its_files_are() -> None:
    swarm = [node(i, 0, 12) for i in range(4)]
    load_s = loading_s(12, range(5, 9), 60.0)
    choice = choose_span(block_vectors(swarm, 12), node("me", 0, 4), 4, load_s)
    assert (choice.first_block, choice.end_block) == (5, 9)


def test_but_not_when_it_is_needed_elsewhere() -> None:
    swarm = [node(i, 4, 12) for i in range(4)]
    load_s = loading_s(12, range(5, 9), 60.0)
    choice = choose_span(block_vectors(swarm, 12), node("me", 0, 4), 4, load_s)
    assert (choice.first_block, choice.end_block) == (0, 4)


def test_a_second_organisation_goes_where_the_first_is_alone() -> None:
    swarm = [
        node(1, 0, 6, organisation="a"),
        node(2, 0, 6, organisation="a"),
        node(3, 6, 12, organisation="a"),
        node(4, 6, 12, organisation="b"),
    ]
    choice = choose_span(
        block_vectors(swarm, 12), node("me", 0, 6, organisation="c"), 6, nothing_loads(12)
    )
    assert choice.first_block == 0
    same = node("me", 0, 6, organisation="a")
    assert gains(block_vectors(swarm, 12), same, 6)[0] < choice.gain


def test_a_third_organisation_is_wanted_only_where_there_are_copies_to_spare() -> None:
    of_two = [node((0, i), 0, 6, organisation=name) for i, name in enumerate("aab")]
    of_three = [node((6, i), 6, 12, organisation=name) for i, name in enumerate("abc")]

    def gained(copies_elsewhere: int) -> list[float]:
        elsewhere = [node((12, i), 12, 36, 400.0) for i in range(copies_elsewhere)]
        vectors = block_vectors([*of_two, *of_three, *elsewhere], 36)
        there = gains(vectors, node("me", 0, 6, organisation="d"), 6)
        return [there[0], there[6]]

    with_few, with_many = gained(copies_elsewhere=1), gained(copies_elsewhere=5)
    assert with_few[0] == pytest.approx(with_few[1])
    assert with_many[0] > with_many[1] + 1.0


def test_a_country_closes_its_own_gap_only_if_the_swarm_has_nodes_to_spare() -> None:
    own = [node("a", 0, 6, country="AA"), node("b", 0, 5, country="AA")]
    me = node("me", 0, 4, country="AA")

    def first_choice(others: int) -> int:
        # slightly weaker at the beginning, so that the term alone makes the difference
        foreign = [node(i, 2, 8, 300.0, country="BB") for i in range(others)]
        foreign += [node(f"f{i}", 0, 2, 20.0, country="BB") for i in range(others)]
        vectors = block_vectors([*own, *foreign], 8)
        return choose_span(vectors, me, 4, nothing_loads(8)).first_block

    assert first_choice(others=2) == 0
    assert first_choice(others=12) > 2


def test_a_slow_computer_hosts_no_more_than_a_token_passes_in_time() -> None:
    assert span_size(40, speed_one_session=60.0) == 9
    assert span_size(4, speed_one_session=60.0) == 4
    assert span_size(40, speed_one_session=1.0) == 1


# --- moving --------------------------------------------------------------------------------------
def decide_all(swarm: list[PlacedNode], blocks: int, dice: Random) -> bool:
    """Everybody once, in random order; True when somebody moved."""
    moved = False
    for index in dice.sample(range(len(swarm)), len(swarm)):
        me = swarm[index]
        others = without(block_vectors(swarm, blocks), me)
        target = decide_move(others, me, nothing_loads(blocks), chance=0.0).target
        if target is not None:
            before = potential(swarm, blocks)
            swarm[index] = replace(me, first_block=target.first_block, end_block=target.end_block)
            assert potential(swarm, blocks) > before
            moved = True
    return moved


@pytest.mark.parametrize("part", range(10))
def test_best_responses_end(part: int) -> None:
    for seed in range(100):
        dice = Random(f"{part}/{seed}")
        blocks = dice.randint(3, 8)
        swarm = random_swarm(dice, blocks, dice.randint(1, 7))
        rounds = next(number for number in count() if not decide_all(swarm, blocks, dice))
        assert rounds < 20


def test_nobody_moves_in_a_balanced_swarm() -> None:
    swarm = [node((i, first), first, first + 4) for i in range(4) for first in (0, 4, 8)]
    for me in swarm:
        decision = decide_move(
            without(block_vectors(swarm, 12), me), me, nothing_loads(12), chance=0.0
        )
        assert (decision.target, decision.reason) == (None, Stay.BEST)


def test_a_move_must_be_worth_its_loading_time() -> None:
    swarm = [node(i, 0, 4) for i in range(5)] + [node("x", 4, 8)]
    me = swarm[0]
    others = without(block_vectors(swarm, 8), me)
    assert decide_move(others, me, nothing_loads(8), chance=0.0).target is not None
    slow = loading_s(8, range(4), 20 * HOUR_S)
    assert decide_move(others, me, slow, chance=0.0).reason is Stay.BEST


def test_enough_others_in_the_same_minute_damp() -> None:
    swarm = [node(i, 0, 4) for i in range(90)] + [node(f"x{i}", 4, 8) for i in range(60)]
    me = swarm[0]
    others = without(block_vectors(swarm, 8), me)
    settings = replace(DEFAULTS, hysteresis=0.2)
    decision = decide_move(others, me, nothing_loads(8), chance=0.99, settings=settings)
    assert decision.reason is Stay.DAMPED
    decision = decide_move(others, me, nothing_loads(8), chance=0.01, settings=settings)
    assert decision.target is not None


def test_who_is_to_fill_a_countrys_gap_is_among_its_own_nodes() -> None:
    # 200 nodes decide, but only the 8 in EE can help EE: more of them are needed than of 200.
    swarm = [node(i, 0, 8, country="FI") for i in range(192)]
    swarm += [node(f"e{i}", 0, 4, country="EE") for i in range(8)]
    me = swarm[-1]
    others = without(block_vectors(swarm, 8), me)
    assert decide_move(others, me, nothing_loads(8), chance=0.6).target is not None
    assert decide_move(others, me, nothing_loads(8), chance=0.65).reason is Stay.DAMPED


@given(st.integers(0, 10**6))
def test_a_move_never_uncovers_a_block(seed: int) -> None:
    dice = Random(seed)
    blocks = dice.randint(2, 10)
    swarm = random_swarm(dice, blocks, dice.randint(1, 9))
    me = swarm[0]
    others = without(block_vectors(swarm, blocks), me)
    target = decide_move(others, me, nothing_loads(blocks), chance=0.0).target
    if target is not None:
        left = set(range(*me.planned)) - set(range(target.first_block, target.end_block))
        assert all(any(n.first_block <= block < n.end_block for n in swarm[1:]) for block in left)


def test_two_movers_that_see_each_other_both_stay() -> None:
    """Each would leave the other with block 0; only the announced intents tell them."""
    one, two = node(1, 0, 1), node(2, 0, 1)
    third = node(3, 1, 2)
    view_of_one = block_vectors([two, third], 2)
    assert may_leave(view_of_one, one, (1, 2))
    two_moves = replace(two, state=NodeState.MOVING, target=(1, 2))
    assert not may_leave(block_vectors([two_moves, third], 2), one, (1, 2))


def test_who_only_joins_does_not_keep_a_block_alive() -> None:
    joining = node(2, 0, 1, state=NodeState.JOINING)
    assert not may_leave(block_vectors([joining, node(3, 1, 2)], 2), node(1, 0, 1), (1, 2))


def test_the_fewer_replicas_the_sooner_nodes_decide() -> None:
    def interval_s(replicas: int) -> float:
        swarm = [node(i, 0, 4) for i in range(replicas)] + [node("x", 0, 3), node("y", 0, 3)]
        return decision_interval_s(block_vectors(swarm, 4))

    assert [interval_s(replicas) for replicas in range(3)] == [10.0, 60.0, 300.0]


def test_a_gap_is_closed_with_a_small_span_that_loads_fast() -> None:
    swarm = [node((i, first), first, end) for i in range(4) for first, end in ((0, 3), (3, 5))]
    swarm += [node((i, 6), 6, 9) for i in range(4)]
    me = swarm[0]
    others = without(block_vectors(swarm, 9), me)
    decision = decide_move(others, me, loading_s(9, range(3), 300.0), chance=0.0)
    assert decision.target is not None
    assert (decision.target.first_block, decision.target.end_block) == (5, 6)
