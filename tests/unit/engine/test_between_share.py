"""Work that is not in a hurry gets its share of a busy device, and no more."""

import pytest

from swarm.node.engine.worker import BetweenShare


@pytest.mark.parametrize("call_s", [0.005, 0.05])
def test_its_share_while_steps_always_wait(call_s: float) -> None:
    share, steps_s, between_s = BetweenShare(), 0.0, 0.0
    share.ran_between(call_s)
    for _ in range(20_000):
        if share.is_due:
            share.ran_between(call_s)
            between_s += call_s
        else:
            share.ran_steps(0.01)
            steps_s += 0.01
    assert between_s / (steps_s + between_s) == pytest.approx(BetweenShare.SHARE, abs=0.02)


def test_an_idle_device_costs_no_credit_later() -> None:
    share = BetweenShare()
    for _ in range(1000):
        share.ran_between(0.05)  # nobody waited
    steps = 0
    while not share.is_due:
        share.ran_steps(0.01)
        steps += 1
    assert steps <= 16  # as after a single call


def test_steps_never_wait_for_two_calls() -> None:
    """Nor when there is credit for several: a long call came before short ones."""
    share = BetweenShare()
    share.ran_between(0.05)
    for _ in range(100):
        share.ran_steps(0.01)
    assert share.is_due
    share.ran_between(0.001)
    assert not share.is_due
    share.ran_steps(0.01)
    assert share.is_due
