"""Nodes die in the middle of an answer, and nobody notices: the short form of ``scripts.chaos``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from scripts.faults.last_replica import lose_all_replicas
from scripts.faults.moments import Case, Moment

if TYPE_CHECKING:
    from .conftest import Chaos

DECODING = Moment("token 5", "decode", "token", count=5)
PREFILLING = Moment("prompt sent", "prefill", "sent", "Step")
ROLLING_BACK = Moment("first rollback", "rollback", "rollback", speculative=True)


def test_a_node_that_leaves_hands_its_session_over(chaos: Chaos) -> None:
    outcome = chaos.strike(Case("drain", DECODING, (1,)), chaos.patient)
    assert (outcome.hand_overs, outcome.heals, outcome.replayed_tokens) == (1, 0, 0)


@pytest.mark.parametrize("hop", [0, 1, 2])
def test_a_hop_is_killed_between_two_tokens(chaos: Chaos, hop: int) -> None:
    outcome = chaos.strike(Case("kill", DECODING, (hop,)))
    assert outcome.heals >= 1
    assert outcome.stall_s is not None
    # All that was cached, and no more: 64 tokens of prompt, 4 or 5 of the answer.
    assert 68 <= outcome.replayed_tokens <= 69


def test_a_hop_is_killed_in_prefill(chaos: Chaos) -> None:
    assert chaos.strike(Case("kill", PREFILLING, (1,))).heals >= 1


def test_a_hop_is_frozen_and_comes_back_when_it_is_no_longer_needed(chaos: Chaos) -> None:
    assert chaos.strike(Case("freeze", DECODING, (2,))).heals >= 1


def test_two_neighbours_are_killed_at_once(chaos: Chaos) -> None:
    assert chaos.strike(Case("kill", DECODING, (0, 1))).heals >= 1


def test_a_hop_is_killed_in_a_rollback(chaos: Chaos) -> None:
    assert chaos.strike(Case("kill", ROLLING_BACK, (2,))).heals >= 1


def test_the_last_replica_dies_and_the_answer_goes_on_when_one_is_back(chaos: Chaos) -> None:
    seen = chaos.run(lose_all_replicas(chaos.arena, chaos.watched, chaos.plain, stage=1))
    assert seen.problems == [], seen.error
