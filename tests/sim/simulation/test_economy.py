"""Self-dealing, collusion, over-issue, slander: nobody gains what the design does not allow."""

from __future__ import annotations

import pytest

from swarm.simulation.economy import (
    cheating_node,
    colluding_organisation,
    griefing_audits,
    over_issue,
    self_dealing_funded,
    self_dealing_subsidised,
    slander,
)


def test_a_hundred_identities_gain_nothing_from_their_own_money() -> None:
    outcome = self_dealing_funded(identities=100, rounds=1)
    assert outcome.put_in == 1000
    assert outcome.got_out == pytest.approx(970, abs=1)
    assert outcome.spendable == pytest.approx(970, abs=1)


@pytest.mark.parametrize("own_nodes", [5, 40])
def test_a_hundred_identities_get_at_most_their_nodes_share_of_public_money(own_nodes: int) -> None:
    outcome = self_dealing_subsidised(
        identities=100, own_nodes=own_nodes, honest_nodes=100 - own_nodes, days=1
    )
    assert outcome.details["drawn"] == 100 * 100
    # eight in a hundred are drawn, each for a sixteenth of the allowance: half of the share
    assert outcome.got_out == pytest.approx(outcome.limit / 2, rel=0.25)
    assert outcome.spendable == 0


def test_the_share_of_a_node_is_what_bounds_it() -> None:
    """With a node allowed half of an allowance, self-dealers would take more than their share."""
    outcome = self_dealing_subsidised(
        identities=20, own_nodes=10, honest_nodes=90, days=1,
        nodes_per_allowance=2, pair_floor_units=10**12,
    )  # fmt: skip
    assert outcome.got_out > outcome.limit


def test_an_organisation_is_not_paid_from_its_own_grants() -> None:
    assert colluding_organisation().got_out == 0


def test_over_issue_works_once() -> None:
    outcome = over_issue(nodes=40)
    assert outcome.details["unpaid work"] == pytest.approx(24, abs=0.1)
    assert outcome.details["suspended"]


def test_one_accuser_freezes_and_takes_nothing() -> None:
    alone, together = slander(1), slander(2)
    assert alone.got_out == 0
    assert alone.details["frozen"] > 0
    assert 0 < together.got_out <= together.limit


def test_auditing_others_to_death_costs_the_auditor() -> None:
    assert griefing_audits().put_in == pytest.approx(10, abs=0.1)


@pytest.mark.parametrize("share", [1.0, 0.2, 0.05])
def test_cheating_costs_more_than_it_brings(share: float) -> None:
    assert cheating_node(share, 0.05).holds
