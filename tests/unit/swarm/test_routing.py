from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm.protocol.errors import NoRouteError
from swarm.protocol.identity import PeerId
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType
from swarm.routing import (
    HAND_OVER_S,
    RETRY_AFTER_MS,
    ChainPlan,
    Hop,
    block_ranges,
    choose_chain,
    is_one_machine,
    weakest_span,
)

MakeRecord = Callable[..., NodeRecord]


def spans(plan: ChainPlan) -> list[tuple[str, int, int]]:
    return [(hop.peer_id, hop.first_block, hop.end_block) for hop in plan.hops]


def test_three_thirds_make_a_chain(make_record: MakeRecord) -> None:
    records = [make_record(20, 30), make_record(0, 10), make_record(10, 20)]
    plan = choose_chain(records, number_of_blocks=30)
    assert spans(plan) == [("1", 0, 10), ("2", 10, 20), ("0", 20, 30)]


def test_hop_carries_what_dialling_needs(make_record: MakeRecord) -> None:
    record = make_record(0, 30, display_name="University", addresses=("/ip4/127.0.0.1/tcp/1",))
    (hop,) = choose_chain([record], number_of_blocks=30).hops
    assert (hop.display_name, hop.addresses) == ("University", ("/ip4/127.0.0.1/tcp/1",))


def test_a_span_is_entered_in_its_middle(make_record: MakeRecord) -> None:
    plan = choose_chain([make_record(0, 20), make_record(10, 30)], number_of_blocks=30)
    assert [(hop.first_block, hop.end_block) for hop in plan.hops] in (
        [(0, 10), (10, 30)],
        [(0, 20), (20, 30)],
    )


def test_the_faster_node_takes_as_much_as_it_can(make_record: MakeRecord) -> None:
    slow, fast = make_record(0, 20), make_record(10, 30, decode_tokens_per_s=2000)
    assert spans(choose_chain([slow, fast], number_of_blocks=30)) == [("0", 0, 10), ("1", 10, 30)]


def test_replacement_of_a_part(make_record: MakeRecord) -> None:
    records = [make_record(0, 20), make_record(5, 30)]
    plan = choose_chain(records, number_of_blocks=30, first_block=20, end_block=25)
    assert spans(plan) == [("1", 20, 25)]


def test_round_trip_and_queue_count(make_record: MakeRecord) -> None:
    near, far, busy = make_record(0, 30), make_record(0, 30), make_record(0, 30, queued_steps=10)
    trips = {PeerId("0"): 0.02, PeerId("1"): 0.2, PeerId("2"): 0.001}
    plan = choose_chain([far, busy, near], number_of_blocks=30, round_trip_s=trips)
    assert spans(plan) == [("0", 0, 30)]
    assert plan.expected_step_s == pytest.approx(HAND_OVER_S + 0.02 + 30 / 1000)


@pytest.mark.parametrize(
    "unfit",
    [
        {"state": NodeState.JOINING},
        {"state": NodeState.DRAINING},
        {"dtype": DType.BFLOAT16},
        {"minimum_version": 2, "maximum_version": 3},
        {"number_of_blocks": 31},
    ],
)
def test_filters_fail_closed(make_record: MakeRecord, unfit: dict[str, Any]) -> None:
    records = [make_record(0, 30, **unfit), make_record(0, 10), make_record(20, 30)]
    with pytest.raises(NoRouteError, match="blocks 10-19 are served by nobody") as caught:
        choose_chain(records, number_of_blocks=30, dtype=DType.FLOAT32)
    assert caught.value.missing_blocks == tuple(range(10, 20))
    assert caught.value.retry_after_ms == 0


def test_the_message_says_who_would_host_them(make_record: MakeRecord) -> None:
    records = [make_record(0, 10), make_record(10, 30, state=NodeState.DRAINING)]
    with pytest.raises(NoRouteError, match=r"10-29 are served by nobody else \(1 draining\)"):
        choose_chain(records, number_of_blocks=30)


def test_excluded_peers_are_not_used(make_record: MakeRecord) -> None:
    records = [make_record(0, 30), make_record(0, 30, decode_tokens_per_s=1)]
    assert spans(choose_chain(records, number_of_blocks=30, excluded={PeerId("0")})) == [
        ("1", 0, 30)
    ]


def test_without_room_the_caller_is_told_when_to_retry(make_record: MakeRecord) -> None:
    records = [make_record(0, 30, cache_tokens_free=99)]
    with pytest.raises(NoRouteError, match="no room") as caught:
        choose_chain(records, number_of_blocks=30, tokens=100)
    assert (caught.value.missing_blocks, caught.value.retry_after_ms) == ((), RETRY_AFTER_MS)
    assert choose_chain(records, number_of_blocks=30, tokens=99).hops


def test_nobody_at_all() -> None:
    with pytest.raises(NoRouteError, match="blocks 0-29 are served by nobody"):
        choose_chain([], number_of_blocks=30)


def test_equal_nodes_share_the_clients(make_record: MakeRecord) -> None:
    records = [make_record(0, 30) for _ in range(4)]
    chosen = {
        choose_chain(records, number_of_blocks=30, dice=random.Random(seed)).hops[0].peer_id
        for seed in range(40)
    }
    assert len(chosen) == 4


def cheapest_by_trying_everything(
    records: Sequence[NodeRecord], trips: Mapping[PeerId, float], blocks: int, *, returns: bool
) -> float:
    """Over all chains whatsoever; with ``returns`` also those that visit a peer again later."""

    def chains(start: int, used: frozenset[PeerId]) -> Iterator[float]:
        if start == blocks:
            yield 0.0
            return
        for record in records:
            if record.peer_id in used or not record.first_block <= start < record.end_block:
                continue
            speed = record.decode_tokens_per_s
            entry_s = HAND_OVER_S + trips[record.peer_id]
            entry_s += record.queued_steps * (record.end_block - record.first_block) / speed
            visited = frozenset({record.peer_id}) | (frozenset() if returns else used)
            for end in range(start + 1, record.end_block + 1):
                for rest in chains(end, visited):
                    yield entry_s + (end - start) / speed + rest

    return min(chains(0, frozenset()), default=float("inf"))


node = st.tuples(
    st.integers(0, 5), st.integers(1, 6), st.integers(1, 50), st.integers(0, 2), st.integers(0, 50)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(node, min_size=1, max_size=5))
def test_no_chain_is_cheaper(
    make_record: MakeRecord, nodes: list[tuple[int, int, int, int, int]]
) -> None:
    blocks = 6
    records, trips = [], {}
    for number, (first, size, speed, queue, trip_ms) in enumerate(nodes):
        record = make_record(first, min(first + size, blocks), number_of_blocks=blocks)
        record = replace(
            record, peer_id=PeerId(f"p{number}"), decode_tokens_per_s=speed, queued_steps=queue
        )
        records.append(record)
        trips[record.peer_id] = trip_ms / 1000
    best_s = cheapest_by_trying_everything(records, trips, blocks, returns=False)
    if best_s == float("inf"):
        with pytest.raises(NoRouteError):
            choose_chain(records, number_of_blocks=blocks, round_trip_s=trips)
        return
    plan = choose_chain(records, number_of_blocks=blocks, round_trip_s=trips)
    ends = [0, *(hop.end_block for hop in plan.hops)]
    assert [hop.first_block for hop in plan.hops] == ends[:-1]
    assert ends[-1] == blocks
    peers = [hop.peer_id for hop in plan.hops]
    assert len(set(peers)) == len(peers)
    for hop in plan.hops:
        record = next(record for record in records if record.peer_id == hop.peer_id)
        assert record.first_block <= hop.first_block < hop.end_block <= record.end_block
    # Chains that return to a peer are cut short afterwards, which may cost the optimum.
    if best_s == cheapest_by_trying_everything(records, trips, blocks, returns=True):
        assert plan.expected_step_s == pytest.approx(best_s)
    else:
        assert plan.expected_step_s >= best_s - 1e-9


# --- placement -----------------------------------------------------------------------------------
def test_three_nodes_after_each_other_cover_everything() -> None:
    replicas = [0] * 30
    for expected in [(0, 10), (10, 20), (20, 30)]:
        first, end = weakest_span(replicas, 10)
        assert (first, end) == expected
        replicas[first:end] = [count + 1 for count in replicas[first:end]]


def test_uncovered_blocks_come_before_weak_ones() -> None:
    assert weakest_span([1, 1, 1, 9, 0, 9], 2) == (3, 5)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 15))
def test_the_weakest_span_is_the_weakest(replicas: list[int], size: int) -> None:
    first, end = weakest_span(replicas, size)
    assert end - first == min(size, len(replicas))
    windows = [replicas[at : at + end - first] for at in range(len(replicas) - (end - first) + 1)]
    assert min((-window.count(0), sum(window)) for window in windows) == (
        -replicas[first:end].count(0),
        sum(replicas[first:end]),
    )


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
