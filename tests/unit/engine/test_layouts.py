"""Weights follow the number of sessions that share a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from swarm.compute.packed_linear import PackedLinear
from swarm.node.engine.layouts import Layouts, SharedSteps


def test_several_sessions_want_packed_weights_and_one_wants_plain_ones() -> None:
    steps = SharedSteps()
    for _ in range(100):
        steps.saw(1)
        steps.saw(2)
        steps.saw(512)  # a piece of a prompt says nothing
    assert not steps.wants_packed
    for _ in range(16):
        steps.saw(8)
    assert steps.wants_packed
    steps.saw(1)  # one step alone changes nothing
    assert steps.wants_packed
    for _ in range(32):
        steps.saw(1)
    assert not steps.wants_packed


@pytest.mark.parametrize("singles", [1, 2])
def test_mixed_steps_do_not_flap(singles: int) -> None:
    steps = SharedSteps()
    changes, before = 0, False
    for number in range(300):
        steps.saw(1 if number % 3 < singles else 4)
        changes += steps.wants_packed != before
        before = steps.wants_packed
    assert changes <= 1


def test_layers_change_one_after_each_step_and_compute_the_same() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(PackedLinear(torch.randn(32, 32), None)) for _ in range(3)]
    hidden = torch.randn(1, 1, 32)
    expected = [layer(hidden) for layer in layers]
    layouts = Layouts(layers)

    def packed() -> list[bool]:
        linears = [layer[0] for layer in layers]
        return [isinstance(linear, PackedLinear) and linear.is_packed for linear in linears]

    def step(rows: int) -> list[bool]:
        layouts.after_step(rows)
        for layer, output in zip(layers, expected, strict=True):
            torch.testing.assert_close(layer(hidden), output)
        return packed()

    assert packed() == [False] * 3
    seen = [step(8) for _ in range(20)]
    changes = [state for state, before in zip(seen[1:], seen, strict=False) if state != before]
    assert changes == [[True, False, False], [True, True, False], [True, True, True]]
    seen = [step(1) for _ in range(40)]
    assert seen[-1] == [False] * 3


def test_layers_without_such_linears_are_left_alone() -> None:
    layouts = Layouts([nn.Linear(4, 4), nn.Sequential(PackedLinear(torch.ones(33, 4), None))])
    for _ in range(40):
        layouts.after_step(8)
    for _ in range(40):
        layouts.after_step(1)
