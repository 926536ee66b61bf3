from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm.chain_choice import (
    CLIENT,
    HAND_OVER_S,
    Candidate,
    Place,
    candidate,
    charged_s,
    choose_chain,
    one_way_s,
)
from swarm.protocol.errors import NoRouteError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import LoadReport
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType
from swarm.routing import (
    LARGEST_SAMPLE,
    NO_ROOM,
    RETRY_AFTER_MS,
    SAMPLE,
    ChainPlan,
    Hop,
    Needs,
    block_ranges,
    is_one_machine,
    no_route,
    obstacle,
    sample_nodes,
    uncovered,
)

MakeRecord = Callable[..., NodeRecord]

IDLE = LoadReport(1, 0, 1000, 0, 0)
NEEDS = Needs(b"r" * 32, 30)


def spans(plan: ChainPlan) -> list[tuple[str, int, int]]:
    return [(hop.peer_id, hop.first_block, hop.end_block) for hop in plan.hops]


def idle(record: NodeRecord, round_trip_s: float = 0.02) -> Candidate:
    return candidate(record, IDLE, round_trip_s=round_trip_s)


def choose(*records: NodeRecord, first_block: int = 0, end_block: int = 30) -> ChainPlan:
    return choose_chain([idle(record) for record in records], first_block, end_block)


# --- the chain -----------------------------------------------------------------------------------
def test_three_thirds_make_a_chain(make_record: MakeRecord) -> None:
    plan = choose(make_record(20, 30), make_record(0, 10), make_record(10, 20))
    assert spans(plan) == [("1", 0, 10), ("2", 10, 20), ("0", 20, 30)]


def test_hop_carries_what_dialling_needs(make_record: MakeRecord) -> None:
    record = make_record(0, 30, display_name="University", addresses=("/ip4/127.0.0.1/tcp/1",))
    (hop,) = choose(record).hops
    assert (hop.display_name, hop.addresses) == ("University", ("/ip4/127.0.0.1/tcp/1",))


def test_a_span_is_entered_in_its_middle(make_record: MakeRecord) -> None:
    plan = choose(make_record(0, 20), make_record(10, 30))
    assert [(hop.first_block, hop.end_block) for hop in plan.hops] in (
        [(0, 10), (10, 30)],
        [(0, 20), (20, 30)],
    )


def test_the_faster_node_takes_as_much_as_it_can(make_record: MakeRecord) -> None:
    slow, fast = make_record(0, 20), make_record(10, 30, decode_tokens_per_s=2000)
    assert spans(choose(slow, fast)) == [("0", 0, 10), ("1", 10, 30)]


def test_replacement_of_a_part(make_record: MakeRecord) -> None:
    plan = choose(make_record(0, 20), make_record(5, 30), first_block=20, end_block=25)
    assert spans(plan) == [("1", 20, 25)]


def test_round_trip_and_load_count(make_record: MakeRecord) -> None:
    near, far, busy = make_record(0, 30), make_record(0, 30), make_record(0, 30)
    at_work = LoadReport(1, 0, 1000, busy_permille=900, sessions=10)
    plan = choose_chain(
        [
            idle(far, 0.2),
            candidate(busy, at_work, round_trip_s=0.001),
            idle(near, 0.02),
        ],
        0,
        30,
    )
    assert spans(plan) == [("0", 0, 30)]
    assert plan.expected_step_s == pytest.approx(HAND_OVER_S + 0.02 + 30 / 1000)


def test_a_gap_is_filled_near_its_neighbours(make_record: MakeRecord) -> None:
    """Two replacements: one near the client, one on the machine of both hops around the gap."""
    local = ("/ip4/192.168.1.5/tcp/1",)
    near = idle(make_record(10, 20), 0.05)
    beside = idle(make_record(10, 20, addresses=local), 0.3)
    around = Place(0.3, frozenset({"192.168.1.5"}))
    there = choose_chain([near, beside], 10, 20, previous=around, following=around)
    assert spans(there) == [("1", 10, 20)]
    assert there.expected_step_s == pytest.approx(HAND_OVER_S + 10 / 1000)
    assert spans(choose_chain([near, beside], 10, 20)) == [("0", 10, 20)]


def test_hops_say_what_was_expected_of_them(make_record: MakeRecord) -> None:
    """What their speed is compared with later: computing, without links."""
    slow, fast = make_record(0, 20), make_record(10, 30, decode_tokens_per_s=2000)
    plan = choose_chain([idle(slow, 0.2), idle(fast, 0.01)], 0, 30)
    assert spans(plan) == [("0", 0, 10), ("1", 10, 30)]
    assert [hop.promised_s for hop in plan.hops] == pytest.approx([10 / 1000, 20 / 2000])


def test_links_are_estimated_within_the_triangle() -> None:
    near, far = Place(0.02), Place(0.1)
    assert one_way_s(CLIENT, far) == one_way_s(far, CLIENT) == pytest.approx(0.05)
    assert abs(near.round_trip_s - far.round_trip_s) / 2 < one_way_s(near, far)
    assert one_way_s(near, far) < (near.round_trip_s + far.round_trip_s) / 2
    there = frozenset({"10.0.0.1"})
    assert one_way_s(Place(0.1, there), Place(0.1, there)) == 0.0


def test_a_measured_speed_counts_more_than_the_announced_one(make_record: MakeRecord) -> None:
    honest = make_record(0, 30, decode_tokens_per_s=100)
    liar = make_record(0, 30, decode_tokens_per_s=10_000)
    slow = candidate(liar, IDLE, round_trip_s=0.02, slowness=1000.0)
    assert spans(choose_chain([idle(honest), idle(liar)], 0, 30)) == [("1", 0, 30)]
    assert spans(choose_chain([idle(honest), slow], 0, 30)) == [("0", 0, 30)]


def test_time_that_nobody_reports_is_charged_to_all() -> None:
    places = [Place(0.02), Place(0.06)]
    links_s = 0.01 + 0.03 + 0.03 + 2 * HAND_OVER_S
    honest = charged_s(links_s + 0.05, [0.02, 0.03], places)
    assert honest == pytest.approx([0.02, 0.03])
    assert charged_s(0.01, [0.02, 0.03], places) == pytest.approx([0.02, 0.03])
    lied = charged_s(links_s + 0.05, [0.0, 0.03], places)
    assert lied == pytest.approx([0.01, 0.04])
    assert charged_s(0.5 + HAND_OVER_S, [0.0], [CLIENT]) == pytest.approx([0.5])


def test_openings_of_our_own_spread_a_burst(make_record: MakeRecord) -> None:
    records = [make_record(0, 30, batched_tokens_per_s=8000) for _ in range(4)]
    opened: Counter[PeerId] = Counter()
    for _ in range(40):
        plan = choose_chain(
            [
                candidate(record, IDLE, round_trip_s=0.02, in_flight=opened[record.peer_id])
                for record in records
            ],
            0,
            30,
        )
        opened.update(hop.peer_id for hop in plan.hops)
    assert set(opened.values()) == {10}


def test_many_sessions_on_a_fast_node_before_one_on_a_slow_node(make_record: MakeRecord) -> None:
    fast = make_record(0, 30, decode_tokens_per_s=1000, batched_tokens_per_s=20_000)
    slow = make_record(0, 30, decode_tokens_per_s=100, batched_tokens_per_s=2000)
    busy = LoadReport(1, 0, 1000, busy_permille=1000, sessions=20)
    plan = choose_chain([idle(slow), candidate(fast, busy, round_trip_s=0.02)], 0, 30)
    assert spans(plan) == [("0", 0, 30)]


def test_nobody_at_all() -> None:
    with pytest.raises(NoRouteError, match="blocks 0-29 are served by nobody"):
        choose()


def cheapest_by_trying_everything(
    candidates: Sequence[Candidate], blocks: int, *, returns: bool
) -> float:
    """Over all chains whatsoever; with ``returns`` also those that visit a node again later."""

    def chains(start: int, last: int | None, used: frozenset[int]) -> Iterator[float]:
        place = CLIENT if last is None else candidates[last].place
        if start == blocks:
            yield one_way_s(place, CLIENT)
            return
        for number, entry in enumerate(candidates):
            record = entry.record
            if number in used or not record.first_block <= start < record.end_block:
                continue
            entry_s = one_way_s(place, entry.place) + HAND_OVER_S + entry.wait_s
            visited = frozenset({number}) | (frozenset() if returns else used)
            for end in range(start + 1, record.end_block + 1):
                for rest_s in chains(end, number, visited):
                    yield entry_s + (end - start) * entry.block_s + rest_s

    return min(chains(0, None, frozenset()), default=float("inf"))


node = st.tuples(
    st.integers(0, 5), st.integers(1, 6), st.integers(1, 50), st.integers(0, 3), st.integers(0, 50)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(node, min_size=1, max_size=5))
def test_no_chain_is_cheaper(
    make_record: MakeRecord, nodes: list[tuple[int, int, int, int, int]]
) -> None:
    blocks = 6
    candidates = []
    for number, (first, size, speed, sessions, trip_ms) in enumerate(nodes):
        record = make_record(first, min(first + size, blocks), number_of_blocks=blocks)
        record = replace(record, peer_id=PeerId(f"p{number}"), decode_tokens_per_s=speed)
        load = LoadReport(1, 0, 1000, 100 * sessions, sessions)
        candidates.append(candidate(record, load, round_trip_s=trip_ms / 1000))
    best_s = cheapest_by_trying_everything(candidates, blocks, returns=False)
    if best_s == float("inf"):
        with pytest.raises(NoRouteError):
            choose_chain(candidates, 0, blocks)
        return
    plan = choose_chain(candidates, 0, blocks)
    assert plan.hops[0].first_block == 0
    assert plan.hops[-1].end_block == blocks
    assert all(hop.end_block == after.first_block for hop, after in pairwise(plan.hops))
    by_peer = {entry.record.peer_id: entry for entry in candidates}
    assert len({hop.peer_id for hop in plan.hops}) == len(plan.hops)
    places = [CLIENT, *(by_peer[hop.peer_id].place for hop in plan.hops), CLIENT]
    expected_s = sum(one_way_s(one, other) for one, other in pairwise(places))
    for hop in plan.hops:
        entry = by_peer[hop.peer_id]
        assert entry.record.first_block <= hop.first_block < hop.end_block
        assert hop.end_block <= entry.record.end_block
        blocks_s = (hop.end_block - hop.first_block) * entry.block_s
        expected_s += HAND_OVER_S + entry.wait_s + blocks_s
    assert plan.expected_step_s == pytest.approx(expected_s)
    assert plan.expected_step_s >= best_s - 1e-9
    # Where a return to a node would be cheaper than any chain, the best chain may be missed.
    if best_s < cheapest_by_trying_everything(candidates, blocks, returns=True) + 1e-9:
        assert plan.expected_step_s == pytest.approx(best_s)


def test_a_choice_among_32_is_fast(make_record: MakeRecord) -> None:
    dice = random.Random(1)
    candidates = []
    for _ in range(SAMPLE):
        first = dice.randrange(60)
        record = make_record(first, first + 20, number_of_blocks=80)
        candidates.append(idle(record, dice.random() / 10))
    candidates.append(idle(make_record(0, 40), 0.1))
    candidates.append(idle(make_record(40, 80), 0.1))

    def once_s() -> float:
        started_s = time.perf_counter()
        choose_chain(candidates, 0, 80)
        return time.perf_counter() - started_s

    # About 0.5 ms where this was written; slower machines have their time, worse growth has not.
    assert min(once_s() for _ in range(50)) < 0.005


# --- who may serve -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("unfit", "reason"),
    [
        ({"state": NodeState.JOINING}, "joining"),
        ({"state": NodeState.DRAINING}, "draining"),
        ({"dtype": DType.BFLOAT16}, "of another dtype"),
        ({"minimum_version": 2, "maximum_version": 3}, "of another protocol version"),
        ({"model_revision": b"s" * 32}, "of another revision"),
        ({"number_of_blocks": 31}, "of another model"),
        ({"adapters": ("law",)}, "without the adapter"),
        ({"cache_tokens_total": 99, "cache_tokens_free": 99}, NO_ROOM),
        ({"adapters": ("law", "medicine")}, ""),
        ({"adapters": ("medicine",), "state": NodeState.MOVING}, ""),
        ({"adapters": ("medicine",), "cache_tokens_free": 0}, ""),
    ],
)
def test_filter(make_record: MakeRecord, unfit: dict[str, Any], reason: str) -> None:
    needs = replace(NEEDS, tokens=100, dtype=DType.FLOAT32, adapters=("medicine",))
    fit = {"adapters": ("medicine",)}
    assert obstacle(make_record(0, 30, **(fit | unfit)), needs) == reason


def test_the_error_names_blocks_and_those_who_would_host_them(make_record: MakeRecord) -> None:
    records = [make_record(0, 10), make_record(10, 30), make_record(10, 20), make_record(20, 30)]
    reasons = {PeerId("1"): "draining", PeerId("2"): "draining", PeerId("3"): NO_ROOM}
    error = no_route(records, reasons, 0, 30)
    assert str(error) == "blocks 10-19 are served by nobody else (2 draining)"
    assert error.missing_blocks == tuple(range(10, 20))
    assert error.retry_after_ms == 0


def test_without_room_the_user_is_told_when_to_retry(make_record: MakeRecord) -> None:
    records = [make_record(0, 30), make_record(0, 30)]
    reasons = {PeerId("0"): NO_ROOM, PeerId("1"): "draining"}
    error = no_route(records, reasons, 0, 30)
    assert str(error) == "the swarm has no room for this session now; try again in 2 s"
    assert (error.missing_blocks, error.retry_after_ms) == ((), RETRY_AFTER_MS)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12))), st.integers(0, 11))
def test_uncovered(make_record: MakeRecord, edges: list[tuple[int, int]], first_block: int) -> None:
    records = [make_record(first, first + size) for first, size in edges]
    hosted = {block for first, size in edges for block in range(first, first + size)}
    missing = tuple(block for block in range(first_block, 12) if block not in hosted)
    assert uncovered(records, first_block, 12) == missing


# --- who is asked --------------------------------------------------------------------------------
def test_a_small_swarm_is_asked_as_a_whole(make_record: MakeRecord) -> None:
    records = [make_record(0, 30) for _ in range(SAMPLE)]
    assert sample_nodes(records, 0, 30, dice=random.Random(1)) == records


def test_a_sample_is_small_and_the_same_for_the_same_seed(make_record: MakeRecord) -> None:
    records = [make_record(0, 10 + number % 20) for number in range(500)]
    one, same, other = (
        sample_nodes(records, 0, 10, dice=random.Random(seed)) for seed in (1, 1, 2)
    )
    assert len(one) == SAMPLE
    assert one == same
    assert one != other


def test_small_spans_take_larger_samples(make_record: MakeRecord) -> None:
    records = [make_record(at % 28, at % 28 + 3) for at in range(500)]
    assert len(sample_nodes(records, 0, 30, dice=random.Random(1))) == 80
    single = [make_record(at % 30, at % 30 + 1) for at in range(500)]
    assert len(sample_nodes(single, 0, 30, dice=random.Random(1))) == LARGEST_SAMPLE


def test_a_sample_grows_until_it_covers_the_blocks(make_record: MakeRecord) -> None:
    """One node among many holds the end, and is unlikely to be drawn."""
    records = [make_record(0, 29) for _ in range(200)]
    records.append(make_record(29, 30, decode_tokens_per_s=1))
    for seed in range(5):
        sample = sample_nodes(records, 0, 30, dice=random.Random(seed))
        assert not uncovered(sample, 0, 30)


def test_free_and_near_nodes_are_drawn_more_often(make_record: MakeRecord) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "usual": {},
        "full": {"cache_tokens_free": 100},
        "far": {},
        "boasting": {"decode_tokens_per_s": 10**15},
        "other blocks": {"first_block": 20},
    }
    records, trips_s = [], {}
    for kind, changes in kinds.items():
        for number in range(100):
            peer = PeerId(f"{kind}/{number}")
            records.append(replace(make_record(0, 30), peer_id=peer, **changes))
            trips_s[peer] = 0.3 if kind == "far" else 0.02
    drawn: Counter[str] = Counter()
    for seed in range(50):
        sample = sample_nodes(records, 0, 10, dice=random.Random(seed), round_trip_s=trips_s)
        drawn.update(record.peer_id.split("/")[0] for record in sample)
    assert drawn["usual"] > 3 * drawn["full"]
    assert drawn["usual"] > 3 * drawn["far"]
    assert drawn["usual"] > 100
    assert drawn["other blocks"] == 0


def test_block_ranges() -> None:
    assert block_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert block_ranges([]) == ""


def plan_at(*addresses: tuple[str, ...]) -> ChainPlan:
    hops = tuple(
        Hop(PeerId(f"peer-{index}"), "", hosts, index, index + 1)
        for index, hosts in enumerate(addresses)
    )
    return ChainPlan(hops, expected_step_s=0.0)


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ([("/ip4/127.0.0.1/tcp/1",), ("/ip4/127.0.0.1/tcp/2",)], True),
        ([("/ip4/192.168.1.5/tcp/1",), ("/ip4/192.168.1.5/udp/2/quic-v1",)], True),
        ([("/ip4/192.168.1.5/tcp/1",), ("/ip4/192.168.1.6/tcp/1",)], False),
        ([("/ip4/8.8.8.8/tcp/1",), ("/ip4/8.8.8.8/tcp/2",)], False),
        ([("/dns4/example.org/tcp/1",), ("/dns4/example.org/tcp/1",)], False),
        ([("/ip4/nonsense/tcp/1", ""), ()], False),
        ([], False),
    ],
)
def test_hops_on_one_machine_are_told_by_a_local_address_in_common(
    addresses: list[tuple[str, ...]], expected: bool
) -> None:
    assert is_one_machine(plan_at(*addresses)) is expected
