"""The session's state machines: rules 1-6 of ``swarm.protocol.session``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.messages import OpenSession, Step, StepResult
from swarm.protocol.session import (
    ClientSession,
    HopSession,
    SessionTerms,
    Verdict,
    check_open,
)
from swarm.protocol.tensors import ITEM_BYTES, DType, Encoding, WireTensor

TERMS = SessionTerms(
    rows=2,
    maximum_tokens=32,
    hidden_size=3,
    wire_dtype=DType.FLOAT32,
    wire_encoding=Encoding.RAW,
    maximum_step_tokens=16,
    maximum_steps_in_flight=3,
)


def tensor(rows: int, tokens: int, hidden: int = 3, dtype: DType = DType.FLOAT32) -> WireTensor:
    return WireTensor(
        dtype, (rows, tokens, hidden), bytes(rows * tokens * hidden * ITEM_BYTES[dtype])
    )


def step(number: int, position: int, tokens: int = 1, **changes: object) -> Step:
    message = Step(step=number, position=position, output_tokens=1, activations=tensor(2, tokens))
    return replace(message, **changes)  # type: ignore[arg-type]


def code_of(call: Callable[[], object]) -> ErrorCode:
    with pytest.raises(ProtocolError) as caught:
        call()
    return caught.value.code


def test_steps_apply_once_and_in_order() -> None:
    hop = HopSession(TERMS)
    assert hop.accept(step(1, 0, 8)) is Verdict.APPLY
    assert hop.accept(step(1, 0, 8)) is Verdict.IN_PROGRESS
    assert hop.completed(1) == ()
    assert hop.accept(step(1, 0, 8)) is Verdict.ANSWER_AGAIN
    assert hop.accept(step(2, 8)) is Verdict.APPLY
    assert hop.length == 9
    assert code_of(lambda: hop.accept(step(4, 9))) is ErrorCode.GAP


def test_a_lower_position_rolls_back_and_a_higher_one_is_a_gap() -> None:
    hop = HopSession(TERMS)
    hop.accept(step(1, 0, 8))
    hop.accept(step(2, 3, 2))
    assert hop.length == 5
    assert code_of(lambda: hop.accept(step(3, 6))) is ErrorCode.GAP
    assert hop.accept(step(3, 5)) is Verdict.APPLY


def test_results_are_kept_for_a_window_only() -> None:
    hop = HopSession(TERMS)
    dropped: list[int] = []
    for number in range(1, 6):
        hop.accept(step(number, number - 1))
        dropped += hop.completed(number)
    assert dropped == [1, 2]
    assert code_of(lambda: hop.accept(step(2, 1))) is ErrorCode.STALE_STEP
    assert hop.accept(step(3, 2)) is Verdict.ANSWER_AGAIN


def test_the_window_bounds_what_is_in_flight() -> None:
    hop = HopSession(TERMS)
    for number in range(1, 4):
        hop.accept(step(number, number - 1))
    assert code_of(lambda: hop.accept(step(4, 3))) is ErrorCode.TOO_MANY_STEPS
    hop.completed(1)
    assert hop.accept(step(4, 3)) is Verdict.APPLY


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"step": 0}, ErrorCode.BAD_STEP),
        ({"position": 1}, ErrorCode.GAP),
        ({"activations": tensor(1, 1)}, ErrorCode.BAD_TENSOR),
        ({"activations": tensor(2, 1, 4)}, ErrorCode.BAD_TENSOR),
        ({"activations": tensor(2, 1, 3, DType.BFLOAT16)}, ErrorCode.BAD_TENSOR),
        ({"activations": tensor(2, 9)}, ErrorCode.TOO_LARGE),
        ({"output_tokens": 0}, ErrorCode.BAD_FIELD),
        ({"output_tokens": 2}, ErrorCode.BAD_FIELD),
        ({"row_order": (0,)}, ErrorCode.BAD_FIELD),
        ({"row_order": (0, 2)}, ErrorCode.BAD_FIELD),
    ],
)
def test_a_refused_step_changes_nothing(changes: dict[str, object], code: ErrorCode) -> None:
    hop = HopSession(TERMS)
    assert code_of(lambda: hop.accept(replace(step(1, 0), **changes))) is code  # type: ignore[arg-type]
    assert (hop.length, hop.steps_in_flight) == (0, 0)
    assert hop.accept(step(1, 0)) is Verdict.APPLY


def test_nothing_beyond_the_reservation() -> None:
    hop = HopSession(TERMS)
    for number in range(1, 5):
        hop.accept(step(number, (number - 1) * 8, 8))
        hop.completed(number)
    assert code_of(lambda: hop.accept(step(5, 32))) is ErrorCode.BAD_POSITION
    assert hop.accept(step(5, 31)) is Verdict.APPLY


def test_one_token_for_each_row_is_always_possible() -> None:
    hop = HopSession(replace(TERMS, maximum_step_tokens=1))
    assert hop.accept(step(1, 0)) is Verdict.APPLY
    assert code_of(lambda: hop.accept(step(2, 1, 2))) is ErrorCode.TOO_LARGE


OPEN = OpenSession(
    model_revision=bytes(32),
    first_block=0,
    end_block=10,
    rows=2,
    maximum_tokens=32,
    wire_dtype=1,
    wire_encoding=0,
    previous_peer="",
)


def test_open_is_checked_across_fields() -> None:
    assert check_open(OPEN) == (DType.FLOAT32, Encoding.RAW)
    assert check_open(replace(OPEN, left_padding=(0, 31))) == (DType.FLOAT32, Encoding.RAW)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"end_block": 0}, ErrorCode.BAD_FIELD),
        ({"first_block": 10}, ErrorCode.BAD_FIELD),
        ({"rows": 0}, ErrorCode.BAD_FIELD),
        ({"maximum_tokens": 0}, ErrorCode.BAD_FIELD),
        ({"left_padding": (0,)}, ErrorCode.BAD_FIELD),
        ({"left_padding": (0, 32)}, ErrorCode.BAD_FIELD),
        ({"wire_dtype": 9}, ErrorCode.UNSUPPORTED_DTYPE),
        ({"wire_encoding": 9}, ErrorCode.UNSUPPORTED_DTYPE),
    ],
)
def test_bad_open_is_refused(changes: dict[str, object], code: ErrorCode) -> None:
    assert code_of(lambda: check_open(replace(OPEN, **changes))) is code  # type: ignore[arg-type]


def result(number: int, position: int, tokens: int = 1) -> StepResult:
    return StepResult(step=number, position=position, activations=tensor(2, tokens))


def test_the_client_takes_each_result_once() -> None:
    client = ClientSession(TERMS)
    issued = client.issue(0, 8, 2)
    assert (issued.step, client.length) == (1, 8)
    assert client.accept(result(1, 0, 2)) == issued
    assert client.accept(result(1, 0, 2)) is None


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (result(2, 0, 2), ErrorCode.BAD_STEP),
        (result(0, 0, 2), ErrorCode.BAD_STEP),
        (result(1, 1, 2), ErrorCode.BAD_POSITION),
        (result(1, 0, 1), ErrorCode.BAD_TENSOR),
        (replace(result(1, 0), activations=tensor(2, 2, 4)), ErrorCode.BAD_TENSOR),
        (
            replace(result(1, 0), activations=tensor(2, 2, 3, DType.BFLOAT16)),
            ErrorCode.BAD_TENSOR,
        ),
    ],
)
def test_the_client_refuses_answers_to_other_questions(answer: StepResult, code: ErrorCode) -> None:
    client = ClientSession(TERMS)
    client.issue(0, 8, 2)
    assert code_of(lambda: client.accept(answer)) is code


def test_the_client_refuses_its_own_mistakes() -> None:
    client = ClientSession(TERMS)
    with pytest.raises(ValueError, match="gap"):
        client.issue(1, 1, 1)
    with pytest.raises(ValueError, match="reserved"):
        client.issue(0, 33, 1)
    with pytest.raises(ValueError, match="return"):
        client.issue(0, 2, 3)
    for position in range(3):
        client.issue(position, 1, 1)
    with pytest.raises(ValueError, match="window"):
        client.issue(3, 1, 1)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_interleaving_gives_the_history_of_the_applied_steps(data: st.DataObject) -> None:
    """A hop that follows the verdicts has exactly the tokens that the client believes in.

    The link between them repeats and reorders within what a stream of several attempts can do:
    any step sent before may arrive again at any time.
    """
    client, hop = ClientSession(TERMS), HopSession(TERMS)
    sent: list[Step] = []
    believed: list[int] = []
    cached: list[int] = []
    computing: list[Step] = []
    results: list[StepResult] = []
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(("issue", "repeat", "compute", "answer")))
        if action == "issue" and client.may_issue:
            position = data.draw(st.integers(max(0, client.length - 4), client.length))
            tokens = data.draw(st.integers(1, min(8, TERMS.maximum_tokens - position) or 1))
            if position + tokens > TERMS.maximum_tokens:
                continue
            issued = client.issue(position, tokens, 1)
            believed[position:] = [issued.step] * tokens
            sent.append(step(issued.step, position, tokens))
            if hop.accept(sent[-1]) is Verdict.APPLY:
                computing.append(sent[-1])
        elif action == "repeat" and sent:
            repeated = data.draw(st.sampled_from(sent))
            try:
                assert hop.accept(repeated) is not Verdict.APPLY
            except ProtocolError as error:
                assert error.code is ErrorCode.STALE_STEP  # noqa: PT017
        elif action == "compute" and computing:
            computed = computing.pop(0)
            cached[computed.position :] = [computed.step] * computed.activations.shape[1]
            hop.completed(computed.step)
            results.append(result(computed.step, computed.position))
        elif action == "answer" and results:
            client.accept(data.draw(st.sampled_from(results)))
    for computed in computing:
        cached[computed.position :] = [computed.step] * computed.activations.shape[1]
    assert cached == believed
    assert hop.length == client.length == len(believed)
