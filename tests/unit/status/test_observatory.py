"""What the page remembers from look to look, and across restarts."""

from __future__ import annotations

import random

import pytest

from swarm.protocol.errors import ConfigError
from swarm.protocol.records import NodeState
from swarm.status.database import Database
from swarm.status.history import DAY, read_history
from swarm.status.snapshot import Probe, ProbeHop, Standing, Work
from tests.unit.status.conftest import PERIOD_S, Watched


def kinds(watched: Watched, *, still_open: bool = True) -> list[str]:
    return [
        incident.kind
        for incident in watched.observatory.snapshot.incidents
        if (incident.closed_unix_s is None) == still_open
    ]


def test_a_node_that_dies_is_shown_as_gone_and_its_blocks_as_missing(watched: Watched) -> None:
    watched.add(0, 15)
    second = watched.add(15, 30, display_name="Kenya 2")
    assert watched.look().models[0].is_whole
    watched.records.remove(second)
    snapshot = watched.look()
    (model,) = snapshot.models
    assert model.replicas == (1,) * 15 + (0,) * 15
    assert model.weak_spans[0].command.startswith("swarm-node join tiny --blocks 15:30 ")
    gone = next(node for node in snapshot.nodes if node.peer_id == second.peer_id)
    assert (gone.standing, gone.name) == (Standing.LOST, "Kenya 2")
    assert snapshot.totals.volunteers_online == 1
    assert snapshot.totals.volunteers_registered == 2
    assert kinds(watched) == ["blocks_missing"]
    watched.records.append(second)
    assert watched.look().models[0].is_whole
    assert kinds(watched) == []
    assert kinds(watched, still_open=False) == ["blocks_missing"]


def test_a_node_that_left_by_plan_is_not_called_lost(watched: Watched) -> None:
    watched.add(0, 30)
    leaving = watched.add(0, 30)
    watched.look()
    watched.change(leaving, state=NodeState.DRAINING)
    watched.look()
    watched.records.pop()
    assert len(watched.look().nodes) == 1


def test_uptime_of_a_node_that_was_away_for_one_of_three_looks(watched: Watched) -> None:
    watched.add(0, 30)
    sometimes = watched.add(0, 30)
    watched.look()
    for here in (True, False, True, True):
        watched.records[1:] = [sometimes] if here else []
        watched.look()
    node = next(
        node for node in watched.observatory.snapshot.nodes if node.peer_id == sometimes.peer_id
    )
    assert node.uptime_24h == pytest.approx(2 / 4)


def test_tokens_energy_and_co2_add_up_by_day_and_survive_a_restart(watched: Watched) -> None:
    half = watched.add(0, 15, country="KE")
    watched.add(15, 30)
    watched.look()
    half = watched.change(half, decode_block_tokens=1500, energy_j=7_200, energy_measured=True)
    watched.look()
    totals = watched.observatory.snapshot.totals
    assert totals.today.generated_tokens == pytest.approx(50)
    assert totals.today.energy_j == pytest.approx(7200)
    assert totals.today.co2_g == pytest.approx(7200 / 3.6e6 * 70)
    watched.restart()
    watched.change(half, decode_block_tokens=3000, energy_j=14_400)
    snapshot = watched.look()
    assert snapshot.totals.today.generated_tokens == pytest.approx(100)
    assert snapshot.totals.month == snapshot.totals.ever == snapshot.totals.today
    donor = snapshot.of_peer[half.peer_id][0]
    assert donor.work.generated_tokens == pytest.approx(100)
    assert donor.energy_source == "measured"


def test_a_restart_loses_nothing(watched: Watched) -> None:
    watched.add(0, 10, display_name="one", organisation="Org", country="IN")
    watched.look()
    watched.look()
    probe = Probe(
        "ab" * 32, watched.now_unix_s, True, 0.5, 12.0, 16, hops=(ProbeHop("p", "one", 0, 30),)
    )
    watched.observatory.probed(probe)
    before = watched.look()
    watched.restart()
    after = watched.look()
    assert after.models[0].probe == probe
    assert [item.opened_unix_s for item in after.incidents] == [
        item.opened_unix_s for item in before.incidents
    ]
    assert after.nodes[0].registered_unix_s == before.nodes[0].registered_unix_s
    assert after.nodes[0].uptime_24h == 1.0
    history = read_history(watched.database, "ab" * 32, watched.now_unix_s, DAY)
    assert history.curves["nodes"][-1][1] == 1.0
    assert [value for _, value in history.curves["first_token"]] == [0.5]


def test_time_in_which_the_page_was_down_counts_for_nobody(watched: Watched) -> None:
    watched.add(0, 30)
    watched.look()
    watched.look()
    watched.look(after_s=20 * PERIOD_S)
    assert watched.look().nodes[0].uptime_24h == 1.0


def test_a_page_that_hears_nothing_calls_nobody_dead(watched: Watched) -> None:
    watched.add(0, 30)
    watched.look()
    watched.records.clear()
    watched.heard_ago_s = 10 * PERIOD_S
    snapshot = watched.look(after_s=10 * PERIOD_S)
    assert snapshot.is_stale(watched.now_unix_s)
    assert snapshot.models[0].is_whole
    assert snapshot.nodes[0].standing is Standing.ONLINE
    assert kinds(watched) == ["page_blind"]


def test_an_empty_answer_is_no_news(watched: Watched) -> None:
    watched.add(0, 30)
    watched.look()
    watched.records.clear()
    assert watched.look().totals.volunteers_online == 1


def test_many_nodes_lost_at_once_are_an_incident(watched: Watched) -> None:
    for _ in range(8):
        watched.add(0, 30)
    watched.look()
    del watched.records[4:]
    watched.look()
    assert kinds(watched, still_open=False) == ["nodes_lost"]


def test_failing_probes_are_an_incident_until_one_succeeds(watched: Watched) -> None:
    watched.add(0, 30)
    watched.look()
    revision = "ab" * 32
    watched.observatory.probed(Probe(revision, watched.now_unix_s, False, problem="network"))
    watched.look()
    assert kinds(watched) == ["probe_failing"]
    watched.observatory.probed(Probe(revision, watched.now_unix_s + 1, True, 0.1, 5.0, 16))
    watched.look()
    assert kinds(watched) == []


def test_announced_speed_is_that_of_the_fastest_node_of_each_block(watched: Watched) -> None:
    watched.add(0, 15)
    watched.add(15, 30, decode_tokens_per_s=1500)
    watched.add(15, 30, decode_tokens_per_s=3000)
    (model,) = watched.look().models
    assert model.announced_tokens_per_s == pytest.approx(100)
    assert model.announced_batch_tokens_per_s == pytest.approx(2000)


def test_what_a_node_did_before_the_page_began_is_not_counted(watched: Watched) -> None:
    watched.add(0, 30, decode_block_tokens=10**9)
    watched.look()
    assert watched.look().totals.ever == Work()
    newcomer = watched.add(
        0, 30, decode_block_tokens=300, started_unix_s=int(watched.now_unix_s) + 1
    )
    assert watched.look().of_peer[newcomer.peer_id][0].work.generated_tokens == 10


def test_a_file_of_the_future_is_left_alone(watched: Watched) -> None:
    path = watched.folder / "future.sqlite"
    database = Database(path)
    database._connection.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ConfigError, match="newer version"):
        Database(path)


def test_a_donor_that_is_long_gone_still_has_a_page(watched: Watched) -> None:
    watched.add(0, 30)
    gone = watched.add(0, 30, display_name="gone")
    watched.look()
    watched.records.pop()
    watched.restart()
    snapshot = watched.look(after_s=3 * 86_400)
    assert gone.peer_id not in snapshot.of_peer
    (node,) = watched.observatory.donor(gone.peer_id, watched.now_unix_s)
    assert (node.name, node.standing) == ("gone", Standing.LOST)
    assert watched.observatory.donor("nobody", watched.now_unix_s) == ()
    assert snapshot.totals.volunteers_registered == 2


def test_the_file_knows_what_memory_knows(watched: Watched) -> None:
    """Most nodes are written in one statement: after comings, goings and changes, the file and the
    page that goes on with it agree with the page that never ended."""
    dice = random.Random(7)
    everybody = [watched.add(0, 30) for _ in range(12)]
    for look in range(40):
        watched.records = [record for record in everybody if dice.random() < 0.8] or everybody[:1]
        if look % 5 == 0:
            busy = dice.choice(watched.records)
            everybody[everybody.index(busy)] = watched.change(
                busy, decode_block_tokens=busy.decode_block_tokens + 30
            )
        watched.look(after_s=20 * PERIOD_S if look == 20 else PERIOD_S)
    before = watched.observatory
    watched.restart()
    after = watched.observatory
    assert after._known == before._known
    assert after._presence == before._presence
    assert after._watched == before._watched
    assert after._here == before._here
    assert after._days == before._days
