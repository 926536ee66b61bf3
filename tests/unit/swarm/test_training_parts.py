"""Micro-batches and states in parts: whole again, and nothing else is accepted."""

import random
from dataclasses import replace

import pytest

from swarm import training_parts
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.messages import StateEnd, StatePart
from swarm.protocol.tensors import DType, WireTensor
from swarm.training_parts import (
    HandledMicroBatch,
    ShownAssembly,
    StateAssembly,
    TensorAssembly,
    backward_parts,
    forward_parts,
    shown_parts,
    state_hash,
    state_messages,
)


def tensor(tokens: int, hidden: int = 8, seed: int = 1) -> WireTensor:
    data = random.Random(seed).randbytes(tokens * hidden * 4)
    return WireTensor(DType.FLOAT32, (1, tokens, hidden), data)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_parts, "PART_BYTES", 100)  # three tokens, 25 elements


@pytest.mark.parametrize("tokens", [1, 3, 4, 10])
def test_a_micro_batch_is_whole_again(tokens: int) -> None:
    sent = tensor(tokens)
    assembly = TensorAssembly(tokens, 8, DType.FLOAT32)
    parts = list(forward_parts(7, (tokens,), sent, use_adapter=True, needs_gradient=False))
    results = [assembly.add(part.first_token, part.activations) for part in parts]
    assert results[:-1] == [None] * (len(parts) - 1)
    assert results[-1] is not None
    assert bytes(results[-1].data) == bytes(sent.data)
    assert {(part.use_adapter, part.needs_gradient) for part in parts} == {(1, 0)}


def test_parts_that_do_not_fit_are_refused() -> None:
    first, second, *_ = backward_parts(7, tensor(10))
    assembly = TensorAssembly(10, 8, DType.FLOAT32)
    for at, part, code in (
        (3, second.gradients, ErrorCode.GAP),  # the first one is missing
        (0, tensor(3, hidden=7), ErrorCode.BAD_TENSOR),
        (0, tensor(11), ErrorCode.BAD_TENSOR),
        (0, WireTensor(DType.BFLOAT16, (1, 3, 8), bytes(48)), ErrorCode.BAD_TENSOR),
    ):
        with pytest.raises(ProtocolError) as refused:
            assembly.add(at, part)
        assert refused.value.code is code
    assert assembly.add(0, first.gradients) is None
    with pytest.raises(ProtocolError):
        assembly.add(0, first.gradients)  # twice


def flat(elements: int, seed: int) -> WireTensor:
    data = random.Random(seed).randbytes(4 * elements)
    return WireTensor(DType.FLOAT32, (1, 1, elements), data)


def test_a_state_is_whole_again() -> None:
    state = {"a": flat(60, 1), "b": flat(1, 2), "c": flat(25, 3)}
    assembly = StateAssembly({"a": (6, 10), "b": (), "c": (5, 5), "never sent": (2,)})
    *parts, end = state_messages(12, list(state.items()))
    assert isinstance(end, StateEnd)
    assert end.step == 12
    for part in parts:
        assert isinstance(part, StatePart)
        assembly.add(part)
    whole = assembly.finish(end)
    assert {name: bytes(one.data) for name, one in whole.items()} == {
        name: bytes(one.data) for name, one in state.items()
    }


def test_states_that_do_not_fit_are_refused() -> None:
    def part(name: str, elements: int, first: int, values: WireTensor) -> StatePart:
        return StatePart(name=name, elements=elements, first_element=first, values=values)

    shapes = {"a": (6, 10), "b": (2,)}
    for bad in (
        part("x", 60, 0, flat(25, 1)),
        part("a", 61, 0, flat(25, 1)),
        part("a", 60, 25, flat(25, 1)),
        part("a", 60, 0, flat(61, 1)),
        part("a", 60, 0, WireTensor(DType.BFLOAT16, (1, 1, 25), bytes(50))),
        part("a", 60, 0, WireTensor(DType.FLOAT32, (1, 5, 5), bytes(100))),
    ):
        with pytest.raises(ProtocolError) as refused:
            StateAssembly(shapes).add(bad)
        assert refused.value.code is ErrorCode.BAD_STATE
    assembly = StateAssembly(shapes)
    assembly.add(part("a", 60, 0, flat(25, 1)))
    with pytest.raises(ProtocolError):
        assembly.add(part("b", 2, 0, flat(2, 1)))  # before the end of the other
    with pytest.raises(ProtocolError):
        assembly.finish(StateEnd(step=1, tensors=0))


def handled(tokens: int) -> HandledMicroBatch:
    return HandledMicroBatch(*(tensor(tokens, seed=seed) for seed in range(4)))


@pytest.mark.parametrize("tokens", [1, 3, 4, 10])
def test_what_is_shown_is_whole_again_and_has_its_hashes(tokens: int) -> None:
    sent = handled(tokens)
    assembly = ShownAssembly(7, tokens, 8, DType.FLOAT32)
    results = [assembly.add(part) for part in shown_parts(7, sent)]
    assert results[:-1] == [None] * (len(results) - 1)
    assert results[-1] is not None
    assert results[-1].done(7) == sent.done(7)
    assert len({sent.done(7).activations_in, sent.done(7).gradients_out}) == 2


def test_shown_tensors_come_in_order_and_not_twice() -> None:
    parts = list(shown_parts(7, handled(4)))
    for wrong in (
        parts[1],
        parts[2],
        replace(parts[0], micro_batch=8),
    ):
        with pytest.raises(ProtocolError) as error:
            ShownAssembly(7, 4, 8, DType.FLOAT32).add(wrong)
        assert error.value.code is ErrorCode.GAP
    with pytest.raises(ProtocolError) as error:
        ShownAssembly(7, 2, 8, DType.FLOAT32).add(parts[0])
    assert error.value.code is ErrorCode.BAD_TENSOR


def test_hash_of_a_state() -> None:
    """Of names, sizes and values, in whatever order they are."""

    def flat(data: bytes) -> WireTensor:
        return WireTensor(DType.FLOAT32, (1, 1, len(data) // 4), data)

    state = {"a": flat(b"1" * 8), "b": flat(b"2" * 4)}
    assert state_hash(dict(reversed(state.items()))) == state_hash(state)
    for other in (
        {"a": state["a"]},
        {"a": flat(b"1" * 8), "b": flat(b"3" * 4)},
        {"a": flat(b"1" * 4), "b": flat(b"2" * 4)},
        {"a": state["a"], "c": state["b"]},
    ):
        assert state_hash(other) != state_hash(state)
