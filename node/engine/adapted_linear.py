"""Linears that add the low-rank path of whichever training session computes at the moment.

The weights are shared by all sessions; a session's tensors are its own. One thread computes, so
that the session is simply set before a block runs (``Stage.play``).

The arithmetic is PEFT's, in its order, also that of DoRA: the norm of the adapted weight counts as
constant in the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from swarm.compute.initial_values import hash64, initial_a
from swarm.compute.lora import LORA_A, LORA_B, MAGNITUDE, AdapterShape, Method, tensor_name


@dataclass(slots=True)
class LowRankPair:
    """The tensors of one adapted linear, float32."""

    a: nn.Parameter
    """``[rank, inputs]``"""
    b: nn.Parameter
    """``[outputs, rank]``"""
    magnitude: nn.Parameter | None = None
    """``[outputs]``, DoRA only."""
    weight_norm: torch.Tensor | None = None
    """``[outputs]``, of the adapted weight; None when a change has made it wrong."""


class AdapterShard:
    """One session's adapter for the blocks of one hop."""

    def __init__(self, shape: AdapterShape, dropout: float, seed: int) -> None:
        self.shape = shape
        self.dropout = dropout
        self.seed = seed
        self.pairs: dict[tuple[int, str], LowRankPair] = {}

    def add_block(self, block: int, linears: dict[str, nn.Linear]) -> None:
        """Give every targeted linear of ``block`` its initial tensors."""
        sizes = {name: (one.out_features, one.in_features) for name, one in linears.items()}
        for module, shapes in self.shape.tensor_shapes(sizes).items():
            weight = linears[module].weight
            a = initial_a(shapes[LORA_A], self.seed, tensor_name(block, module, LORA_A))
            b = torch.zeros(shapes[LORA_B])
            pair = LowRankPair(_trained(a, weight), _trained(b, weight))
            if self.shape.method is Method.DORA:
                norm = torch.linalg.vector_norm(weight.float(), dim=1)
                pair.magnitude = _trained(norm.clone(), weight)
            self.pairs[block, module] = pair

    def parameters(self, block: int | None = None) -> dict[str, nn.Parameter]:
        """By ``tensor_name``; of one block or of all."""
        named: dict[str, nn.Parameter] = {}
        for (own, module), pair in self.pairs.items():
            if block is not None and own != block:
                continue
            named[tensor_name(own, module, LORA_A)] = pair.a
            named[tensor_name(own, module, LORA_B)] = pair.b
            if pair.magnitude is not None:
                named[tensor_name(own, module, MAGNITUDE)] = pair.magnitude
        return named

    def changed(self) -> None:
        """The tensors have new values."""
        for pair in self.pairs.values():
            pair.weight_norm = None

    def output(
        self, key: tuple[int, str], linear: nn.Linear, inputs: torch.Tensor, micro_batch: int
    ) -> torch.Tensor:
        """What the adapted linear makes of ``inputs``."""
        pair = self.pairs.get(key)
        plain: torch.Tensor = linear(inputs)
        if pair is None:
            return plain
        low = inputs.to(pair.a.dtype)
        if self.dropout:
            low = low * self._mask(low, key, micro_batch)
        product: torch.Tensor = F.linear(F.linear(low, pair.a), pair.b) * self.shape.scaling
        if pair.magnitude is None:
            return plain + product.to(plain.dtype)
        if pair.weight_norm is None:
            pair.weight_norm = _weight_norm(linear.weight, pair, self.shape.scaling)
        factor: torch.Tensor = pair.magnitude / pair.weight_norm
        # With dropout PEFT applies it to the frozen weight's part of the difference as well.
        base = F.linear(low.to(plain.dtype), linear.weight) if self.dropout else plain
        if not self.dropout and linear.bias is not None:
            base = base - linear.bias
        return plain + ((factor - 1) * base + factor * product).to(plain.dtype)

    def _mask(self, like: torch.Tensor, key: tuple[int, str], micro_batch: int) -> torch.Tensor:
        """The same whenever and wherever it is made: a block may be computed again elsewhere."""
        seed = hash64(self.seed, "dropout", micro_batch, *key)
        generator = torch.Generator().manual_seed(seed)
        kept: torch.Tensor = torch.rand(like.shape, generator=generator) >= self.dropout
        return kept.to(like.device, like.dtype).div_(1 - self.dropout)


class Stage:
    """Which session, and which of its micro-batches, computes at the moment."""

    def __init__(self) -> None:
        self.shard: AdapterShard | None = None
        self.micro_batch = 0

    @contextmanager
    def play(self, shard: AdapterShard | None, micro_batch: int) -> Iterator[None]:
        """``None``: the model without any adapter."""
        self.shard, self.micro_batch = shard, micro_batch
        try:
            yield
        finally:
            self.shard = None


class AdaptedLinear(nn.Module):
    """A frozen linear and, while a session computes, its low-rank path."""

    def __init__(self, linear: nn.Linear, key: tuple[int, str], stage: Stage) -> None:
        super().__init__()
        self.linear = linear
        self._key = key
        self._stage = stage

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[..., inputs]`` to ``[..., outputs]``."""
        stage = self._stage
        if stage.shard is None:
            plain: torch.Tensor = self.linear(inputs)
            return plain
        return stage.shard.output(self._key, self.linear, inputs, stage.micro_batch)


def _trained(values: torch.Tensor, beside: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(beside.device, torch.float32))


@torch.no_grad()
def _weight_norm(weight: torch.Tensor, pair: LowRankPair, scaling: float) -> torch.Tensor:
    adapted = torch.addmm(weight.float(), pair.b, pair.a, alpha=scaling)
    norm: torch.Tensor = torch.linalg.vector_norm(adapted, dim=1)
    return norm
