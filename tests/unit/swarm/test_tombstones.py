"""Who is dead for everybody, and how little invented witnesses can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from swarm.protocol.identity import PeerId
from swarm.protocol.records import NodeRecord, TombstoneRecord
from swarm.tombstones import IMMUNITY_S, Tombstones, accusations, lost_nodes

MakeRecord = Callable[..., NodeRecord]
NOW_UNIX_S = 1000.0


def says(witness: NodeRecord, *lost: NodeRecord) -> TombstoneRecord:
    return TombstoneRecord(
        peer_id=witness.peer_id,
        model_revision=witness.model_revision,
        groups=1,
        group=0,
        lost_peers=tuple(record.peer_id for record in lost),
        lost_sequences=tuple(record.sequence for record in lost),
        sequence=1,
        expires_unix_s=1060,
    )


def by_peer(*records: NodeRecord) -> dict[PeerId, NodeRecord]:
    return {record.peer_id: record for record in records}


def dead(nodes: dict[PeerId, NodeRecord], *testimonies: TombstoneRecord) -> set[PeerId]:
    return lost_nodes(accusations(testimonies, nodes, NOW_UNIX_S), nodes)


def test_one_witness_is_not_enough(make_record: MakeRecord) -> None:
    one, two, three, lost = (make_record(0, 10) for _ in range(4))
    nodes = by_peer(one, two, three, lost)
    assert dead(nodes, says(one, lost)) == set()
    assert dead(nodes, says(one, lost), says(one, lost)) == set()
    assert dead(nodes, says(one, lost), says(two, lost)) == {lost.peer_id}


def test_witnesses_must_host_the_model_and_speak_of_the_newest_record(
    make_record: MakeRecord,
) -> None:
    one, two, stranger, lost = (make_record(0, 10) for _ in range(4))
    nodes = by_peer(one, two, lost)
    assert dead(nodes, says(one, lost), says(stranger, lost)) == set()
    newer = make_record(0, 10, peer_id=lost.peer_id, sequence=2)
    assert dead(by_peer(one, two, newer), says(one, lost), says(two, lost)) == set()
    assert dead(by_peer(one, two, newer), says(one, newer), says(two, newer)) == {lost.peer_id}
    assert dead(by_peer(one, two), says(one, lost), says(two, lost)) == set()


def test_records_of_the_future_cannot_have_died(make_record: MakeRecord) -> None:
    one, two, victim = (make_record(0, 10) for _ in range(3))
    for sequence, believed in ((1_000_000, True), (1_010_000, True), (1_010_001, False)):
        announced = replace(victim, sequence=sequence)
        testimonies = [says(one, announced), says(two, announced)]
        assert bool(dead(by_peer(one, two, victim), *testimonies)) == believed


def test_a_record_from_before_the_death_that_is_read_late_is_no_sign_of_life(
    make_record: MakeRecord,
) -> None:
    one, two, stale = (make_record(0, 10) for _ in range(3))
    fresh = replace(stale, sequence=7)
    testimonies = [says(one, fresh), says(two, fresh)]
    tombstones = Tombstones()
    for known in (stale, fresh):
        nodes = by_peer(one, two, known)
        tombstones.update(testimonies, nodes, now_s=0.0, now_unix_s=NOW_UNIX_S)
        assert set(tombstones.lost) == {stale.peer_id}


def test_one_organisation_cannot_bury_a_node_where_there_are_others(
    make_record: MakeRecord,
) -> None:
    one, two, lost = (make_record(0, 10, organisation="A") for _ in range(3))
    other = make_record(0, 10, organisation="B")
    assert dead(by_peer(one, two, other, lost), says(one, lost), says(two, lost)) == set()
    assert dead(by_peer(one, two, lost), says(one, lost), says(two, lost)) == {lost.peer_id}
    assert dead(by_peer(one, other, lost, two), says(one, lost), says(other, lost)) == {
        lost.peer_id
    }


@pytest.mark.parametrize(("number_lost", "believed"), [(3, True), (5, True), (6, False)])
def test_more_than_half_of_a_swarm_is_not_believed_to_be_dead(
    make_record: MakeRecord, number_lost: int, believed: bool
) -> None:
    records = [make_record(0, 10) for _ in range(10)]
    lost = records[:number_lost]
    found = dead(by_peer(*records), says(records[8], *lost), says(records[9], *lost))
    assert found == ({record.peer_id for record in lost} if believed else set())


def test_who_came_back_is_not_silenced_again_for_a_while(make_record: MakeRecord) -> None:
    one, two, victim = (make_record(0, 10) for _ in range(3))
    tombstones = Tombstones()

    def update(now_s: float, sequence: int, *, accused: bool = True) -> bool:
        record = make_record(0, 10, peer_id=victim.peer_id, sequence=sequence)
        testimonies = [says(one, record), says(two, record)] if accused else []
        tombstones.update(
            testimonies, by_peer(one, two, record), now_s=now_s, now_unix_s=NOW_UNIX_S
        )
        assert (victim.peer_id in tombstones.accused) == accused
        return victim.peer_id in tombstones.lost

    assert update(0.0, 1)
    assert not update(10.0, 2, accused=False)  # a newer record: it lives
    for second in range(20, int(IMMUNITY_S), 10):
        assert not update(second, second)  # liars may go on as long as they like
    assert update(IMMUNITY_S + 11, 10_000)
