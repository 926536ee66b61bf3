from __future__ import annotations

from collections.abc import Callable

import pytest

from swarm.membership import agreed_shards, coverage, proposed_shards
from swarm.protocol.identity import PeerId
from swarm.protocol.records import ModelIndexRecord, NodeRecord, NodeState

MakeRecord = Callable[..., NodeRecord]


def index_record(shards: int) -> ModelIndexRecord:
    return ModelIndexRecord(PeerId("p"), "model", b"r" * 32, 30, shards, 576, 1, 1060)


def test_coverage_counts_online_replicas(make_record: MakeRecord) -> None:
    records = [
        make_record(0, 20),
        make_record(10, 30),
        make_record(0, 30, state=NodeState.DRAINING),
        make_record(0, 5, number_of_blocks=5),
    ]
    assert coverage(records, 30) == [1] * 10 + [2] * 10 + [1] * 10


def test_coverage_for_placement_counts_those_that_join(make_record: MakeRecord) -> None:
    records = [make_record(0, 2, number_of_blocks=3, state=NodeState.JOINING)]
    assert coverage(records, 3) == [0, 0, 0]
    assert coverage(records, 3, (NodeState.ONLINE, NodeState.JOINING)) == [1, 1, 0]


@pytest.mark.parametrize(
    ("named", "agreed"),
    [([], 1), ([1, 2, 2], 2), ([1, 2], 2), ([3, 65535], 1), ([4, 4, 2, 2, 2], 2)],
)
def test_the_number_of_shards_is_what_most_name(named: list[int], agreed: int) -> None:
    assert agreed_shards([index_record(shards) for shards in named]) == agreed


@pytest.mark.parametrize(
    ("shards", "records", "proposed"),
    [(1, 0, 1), (1, 128, 1), (1, 129, 2), (4, 24, 4), (4, 23, 2), (65536, 500, 65536)],
)
def test_shards_grow_and_shrink(shards: int, records: int, proposed: int) -> None:
    assert proposed_shards(shards, records) == proposed


def test_doubling_does_not_swing() -> None:
    """Half of what makes a shard crowded must not look empty."""
    assert proposed_shards(2, 129 // 2) == 2
