"""A session that goes on where another hop was."""

from __future__ import annotations

import pytest

from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.messages import Replay, Step
from swarm.protocol.session import HopSession, SessionTerms, Verdict
from swarm.protocol.tensors import DType, Encoding, WireTensor

TERMS = SessionTerms(
    rows=2,
    maximum_tokens=32,
    hidden_size=3,
    wire_dtype=DType.FLOAT32,
    wire_encoding=Encoding.RAW,
    maximum_step_tokens=16,
    maximum_steps_in_flight=3,
)
TENSOR = WireTensor(DType.FLOAT32, (2, 1, 3), bytes(24))


def step(number: int, position: int, row_order: tuple[int, ...] = ()) -> Step:
    return Step(
        step=number, position=position, output_tokens=1, activations=TENSOR, row_order=row_order
    )


def test_it_goes_on_with_the_next_step_of_the_other() -> None:
    hop = HopSession(TERMS)
    hop.take_over(8, 5)
    assert (hop.length, hop.received_step, hop.computed_step) == (8, 4, 4)
    with pytest.raises(ProtocolError, match="GAP"):
        hop.accept(step(6, 8))
    assert hop.accept(step(5, 8, (1, 0))) is Verdict.APPLY
    assert hop.row_order_of(step(5, 8, (1, 0))) == (1, 0), "later orders are not in what was moved"
    with pytest.raises(ProtocolError) as stale:
        hop.accept(step(4, 7))
    assert stale.value.code is ErrorCode.STALE_STEP


@pytest.mark.parametrize(("length", "next_step"), [(33, 1), (-1, 1), (4, 0)])
def test_what_does_not_fit_changes_nothing(length: int, next_step: int) -> None:
    hop = HopSession(TERMS)
    with pytest.raises(ProtocolError, match="BAD_FIELD"):
        hop.take_over(length, next_step)
    assert hop.accept(step(1, 0)) is Verdict.APPLY


@pytest.mark.parametrize("first", [step(1, 0), Replay(0, TENSOR, 0)])
def test_a_session_that_has_begun_takes_nothing_over(first: Step | Replay) -> None:
    hop = HopSession(TERMS)
    hop.require_new()
    if isinstance(first, Step):
        hop.accept(first)
    else:
        hop.accept_replay(first)
    with pytest.raises(ProtocolError, match="UNEXPECTED_MESSAGE"):
        hop.take_over(8, 5)
    assert hop.length == 1


def test_state_is_taken_over_once() -> None:
    hop = HopSession(TERMS)
    hop.take_over(8, 5)
    with pytest.raises(ProtocolError, match="UNEXPECTED_MESSAGE"):
        hop.take_over(8, 5)
