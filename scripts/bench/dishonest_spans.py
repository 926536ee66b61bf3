"""Ways in which a node may compute less than it says, on the real blocks of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from swarm.client.calibration import SpanRunner

Outputs = torch.Tensor
Cheat = Callable[[SpanRunner, int, int, torch.Tensor, torch.Tensor], Outputs]
"""Of a runner, a span, its inputs and the right outputs ``[windows, tokens, hidden]``."""


class _Nothing(torch.nn.Module):
    """An attention that adds nothing."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


def skip_block(
    runner: SpanRunner, first: int, end: int, given: torch.Tensor, right: torch.Tensor
) -> Outputs:
    """One block of the middle left out."""
    blocks = runner.copy_of(first, end, torch.bfloat16)
    left_out = (end - first) // 2
    kept = [block for index, block in enumerate(blocks) if index != left_out]
    return runner.prefill(torch.nn.ModuleList(kept), given) if kept else given


def skip_attention(
    runner: SpanRunner, first: int, end: int, given: torch.Tensor, right: torch.Tensor
) -> Outputs:
    """The attention of one block left out."""
    blocks = runner.copy_of(first, end, torch.bfloat16)
    blocks[(end - first) // 2].self_attn = _Nothing()
    return runner.prefill(blocks, given)


@torch.no_grad()
def _round_to_4_bits(weight: torch.Tensor) -> torch.Tensor:
    """Groups of 64 along the inputs, symmetric."""
    rows, columns = weight.shape
    size = 64 if columns % 64 == 0 else columns
    groups = weight.view(rows, columns // size, size)
    scale = groups.abs().amax(dim=2, keepdim=True) / 7
    rounded = torch.round(groups / scale.clamp(min=1e-12)).clamp(-8, 7) * scale
    return rounded.view(rows, columns)


def four_bits(
    runner: SpanRunner, first: int, end: int, given: torch.Tensor, right: torch.Tensor
) -> Outputs:
    """4-bit weights where 16 bits were declared."""
    blocks = runner.copy_of(first, end, torch.float32)
    for module in blocks.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(_round_to_4_bits(module.weight))
    return runner.prefill(blocks.to(torch.bfloat16), given)


def lazy(
    runner: SpanRunner, first: int, end: int, given: torch.Tensor, right: torch.Tensor
) -> Outputs:
    """One token of ten is not computed."""
    answered = right.clone()
    answered[:, 5::10] = given[:, 5::10]
    return answered


def foreign(
    runner: SpanRunner, first: int, end: int, given: torch.Tensor, right: torch.Tensor
) -> Outputs:
    """The right outputs of another session."""
    return right.roll(1, dims=0)


def noise(
    runner: SpanRunner, first: int, end: int, given: torch.Tensor, right: torch.Tensor
) -> Outputs:
    """Numbers with the same mean and spread in each dimension."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(right.shape, generator=generator)
    return right.mean(dim=1, keepdim=True) + drawn * right.std(dim=1, keepdim=True)


CHEATS: Mapping[str, Cheat] = {
    "skipped block": skip_block,
    "skipped attention": skip_attention,
    "4 bits instead of 16": four_bits,
    "lazy on 10 % of tokens": lazy,
    "foreign outputs": foreign,
    "noise": noise,
}
