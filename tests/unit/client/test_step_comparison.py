"""Two works of one training step: what counts as honest rounding and what does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from swarm.client.finetune.step_comparison import StepInputs, StepWork, difference
from swarm.protocol.tensors import DType, WireTensor

LENGTHS = ((5, 11), (16,))
HIDDEN = 8
NAME = "model.layers.0.self_attn.q_proj.lora_A.weight"
NUMBERS = np.random.default_rng(0)


def wire(values: Any) -> WireTensor:
    return WireTensor(DType.FLOAT32, values.shape, values.astype("<f4").tobytes())


def draw(tokens: int = 16, hidden: int = HIDDEN) -> Any:
    return NUMBERS.normal(size=(1, tokens, hidden))


GIVEN, GRADIENTS, OUTPUTS, UPSTREAM = ([draw() for _ in LENGTHS] for _ in range(4))
BEFORE, CHANGE, MOMENTS = (draw(1, 100) for _ in range(3))
INPUTS = StepInputs(
    LENGTHS,
    tuple(map(wire, GIVEN)),
    tuple(map(wire, UPSTREAM)),
    {NAME: wire(BEFORE)},
)


def work(
    *,
    forward: float = 0.0,
    backward: float = 0.0,
    only: int | None = None,
    square_sum: float = 4.0,
    change: float = 1.0,
    moments: float = 1.0,
    dtype_class: str = "float32",
) -> StepWork:
    """A work that is off by so much of what it should add; ``only`` in one of the micro-batches."""
    outputs, gradients = [], []
    for index in range(len(LENGTHS)):
        is_off = only is None or only == index
        outputs.append(OUTPUTS[index] + is_off * forward * (OUTPUTS[index] - GIVEN[index]))
        gradients.append(
            GRADIENTS[index] + is_off * backward * (GRADIENTS[index] - UPSTREAM[index])
        )
    return StepWork(
        tuple(map(wire, outputs)),
        tuple(map(wire, gradients)),
        (dtype_class,),
        square_sum,
        {NAME: wire(BEFORE + change * CHANGE), f"{NAME}#exp_avg": wire(moments * MOMENTS)},
    )


def passes(found: StepWork) -> bool:
    right = work()
    return difference(INPUTS, found, right).passes((*found.dtype_classes, *right.dtype_classes))


@pytest.mark.parametrize(
    "found",
    [
        work(),
        work(forward=0.02, backward=0.02),
        work(forward=0.05, dtype_class="int8"),
        work(square_sum=4.4),
        work(change=1.3, moments=1.1),
        replace(work(), square_sum=None, state=None),
    ],
)
def test_honest_works_pass(found: StepWork) -> None:
    assert passes(found)


@pytest.mark.parametrize(
    "found",
    [
        work(forward=0.05),
        work(forward=0.5, only=1),
        work(backward=0.9),
        work(backward=0.9, only=0),
        work(forward=0.2, dtype_class="int8"),
        work(square_sum=12.0),
        work(square_sum=0.0),
        work(change=0.0),
        work(change=-1.0),
        work(moments=0.0),
        work(change=float("nan")),
        replace(work(), state={}),
        replace(work(), state={NAME: wire(BEFORE + CHANGE), f"{NAME}#exp_avg": wire(draw(1, 7))}),
    ],
)
def test_others_do_not(found: StepWork) -> None:
    assert not passes(found)


def test_the_first_token_of_each_sequence_does_not_count() -> None:
    outputs = [each.copy() for each in OUTPUTS]
    for start in (0, 5):
        outputs[0][:, start] += 100.0
    found = replace(work(), activations=tuple(map(wire, outputs)))
    assert passes(found)
    outputs[0][:, 1:3] += 100.0
    assert not passes(replace(found, activations=tuple(map(wire, outputs))))


def test_a_hop_without_the_adapter_is_seen_by_its_direction() -> None:
    """Unless the adapter does hardly anything, as every one in its first steps."""
    for size, is_seen in ((0.1, True), (0.02, True), (0.002, False)):
        bare = [each + size * draw() for each in OUTPUTS]
        right = replace(work(), without_adapter=tuple(map(wire, bare)))
        for answered, is_right in ((OUTPUTS, True), (bare, not is_seen)):
            found = replace(work(), activations=tuple(map(wire, answered)))
            assert difference(INPUTS, found, right).has_adapter is is_right


def test_what_did_not_change_must_not_be_wrong() -> None:
    still = {NAME: wire(BEFORE)}
    assert difference(INPUTS, replace(work(), state=still), replace(work(), state=still)).passes(())
    moved = {NAME: wire(BEFORE + 1e-3)}
    found = difference(INPUTS, replace(work(), state=moved), replace(work(), state=still))
    assert not found.passes(())


def test_too_short_to_be_compared() -> None:
    given = StepInputs(((4, 4),), (wire(draw(8)),), (wire(draw(8)),), {})
    found = StepWork((wire(draw(8)),), (wire(draw(8)),), ("float32",))
    assert difference(given, found, found).is_empty
