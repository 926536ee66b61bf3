from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarm.node.engine.batching import (
    BatchLimits,
    Turns,
    WaitingStep,
    choose_batch,
    service_order,
)

LIMITS = BatchLimits(maximum_steps=8, maximum_tokens=512)
ALL = (0, 10)


def steps(*described: tuple[str, int]) -> list[WaitingStep]:
    return [WaitingStep(session, ALL, tokens) for session, tokens in described]


def test_nothing_waits() -> None:
    assert choose_batch([], LIMITS) == []


def test_decodes_of_different_sessions_run_together() -> None:
    assert choose_batch(steps(("a", 1), ("b", 1), ("c", 4)), LIMITS) == [0, 1, 2]


def test_steps_of_one_session_never_share_a_batch() -> None:
    assert choose_batch(steps(("a", 1), ("a", 1), ("b", 1)), LIMITS) == [0, 2]


def test_a_later_step_does_not_overtake_one_of_its_session_that_must_wait() -> None:
    waiting = [
        WaitingStep("a", ALL, 1),
        WaitingStep("b", (0, 5), 1),
        WaitingStep("b", ALL, 1),
    ]
    assert choose_batch(waiting, LIMITS) == [0]


def test_long_steps_join_only_within_the_token_budget() -> None:
    waiting = steps(("a", 256), ("b", 256), ("c", 1), ("d", 200))
    # the decode joins first, so that the second chunk of 256 does not fit any more
    assert choose_batch(waiting, LIMITS) == [0, 2, 3]


def test_a_step_above_the_budget_still_runs() -> None:
    assert choose_batch(steps(("a", 4000), ("b", 1)), LIMITS) == [0, 1]


def test_decodes_wait_for_one_long_step_at_most() -> None:
    waiting = steps(("a", 300), ("b", 300), ("c", 300), ("d", 1))
    assert choose_batch(waiting, LIMITS) == [0, 3]


def test_only_the_blocks_of_the_oldest_step() -> None:
    waiting = [WaitingStep("a", (2, 4), 1), WaitingStep("b", ALL, 1), WaitingStep("c", (2, 4), 1)]
    assert choose_batch(waiting, LIMITS) == [0, 2]


waiting_steps = st.lists(
    st.builds(
        WaitingStep,
        session=st.integers(0, 5),
        blocks=st.sampled_from([(0, 10), (0, 5), (5, 10)]),
        tokens=st.integers(1, 600),
    ),
    max_size=30,
)


@given(waiting_steps)
def test_any_queue_empties_in_order(waiting: list[WaitingStep]) -> None:
    """Every batch holds the oldest step, keeps the limits, and keeps each session's order."""
    remaining = list(enumerate(waiting))
    ran: dict[object, list[int]] = {}
    while remaining:
        chosen = choose_batch([step for _, step in remaining], LIMITS)
        batch = [remaining[index] for index in chosen]
        assert batch[0] == remaining[0]
        assert len({step.session for _, step in batch}) == len(batch) <= LIMITS.maximum_steps
        assert len({step.blocks for _, step in batch}) == 1
        long = [step.tokens for _, step in batch if step.tokens > 16]
        assert len(long) <= 1 or sum(long) <= LIMITS.maximum_tokens
        for number, step in batch:
            ran.setdefault(step.session, []).append(number)
        remaining = [item for index, item in enumerate(remaining) if index not in chosen]
    for numbers in ran.values():
        assert numbers == sorted(numbers)


def paid(*described: tuple[str, str, int, int]) -> list[WaitingStep]:
    """Session, payer, priority, tokens."""
    return [
        WaitingStep(session, ALL, tokens, payer=payer, priority=priority)
        for session, payer, priority, tokens in described
    ]


ONE = BatchLimits(maximum_steps=1, maximum_tokens=64)


def test_the_owner_goes_first_and_strangers_do_not_starve() -> None:
    waiting = paid(("a", "stranger", 3, 32), ("b", "member", 2, 32), ("c", "owner", 0, 32))
    assert service_order(waiting) == [2, 1, 0]
    assert choose_batch(waiting, ONE) == [2]
    assert choose_batch(waiting, ONE, oldest_first=True) == [0]


def test_payers_take_turns_whatever_the_number_of_their_sessions() -> None:
    flood = [(f"f{number}", "flooder", 3, 32) for number in range(20)]
    waiting = paid(*flood, ("s", "small", 3, 32))
    assert service_order(waiting)[:3] == [0, 20, 1]
    assert choose_batch(waiting, BatchLimits(maximum_steps=2, maximum_tokens=64)) == [0, 20]


def test_a_flooder_gets_no_more_than_its_share() -> None:
    """One payer with fifty sessions and one with a single one, a step at a time."""
    turns = Turns()
    queue = paid(*[(f"f{number}", "flooder", 3, 10) for number in range(50)], ("s", "small", 3, 10))
    served = {"flooder": 0, "small": 0}
    for _ in range(160):
        (index,) = choose_batch(
            queue, ONE, turns.served(queue), oldest_first=turns.is_for_the_oldest
        )
        turns.serve([queue[index]])
        served[queue[index].payer] += 1
        queue.append(queue.pop(index))  # the session sends its next step at once
    assert served["small"] >= 70  # of 80: every eighth batch goes to whoever waits longest


def test_one_payer_is_served_in_the_order_of_arrival() -> None:
    waiting = paid(("a", "", 0, 32), ("b", "", 0, 1), ("c", "", 0, 1))
    assert service_order(waiting) == [0, 1, 2]
