"""A span as training needs it: ordinary linears, whose gradient torch knows, with low-rank paths.

On a CPU the weights of inference are packed, or taken apart, and have no gradient; so training has
a copy of its own (:func:`needs_copy`). On other devices the modules share the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from swarm.catalogue.checkpoint import Checkpoint
from swarm.node.engine import families
from swarm.node.engine.adapted_linear import AdaptedLinear, AdapterShard, Stage
from swarm.node.engine.span_loader import Span, load_span
from swarm.node.engine.training_batch import TrainingBatch

Linears = Mapping[int, Mapping[str, tuple[int, int]]]
"""Block (the model's number) to module name to (outputs, inputs)."""


class TrainableSpan:
    """Blocks that compute with gradients, one at a time. For the device thread."""

    def __init__(self, span: Span) -> None:
        """``span`` has ordinary modules, which are wrapped in place."""
        self.span = span
        self._stage = Stage()
        self.linears: dict[int, dict[str, nn.Linear]] = {}
        for index, layer in enumerate(span.layers):
            block = span.first_block + index
            own = _linears_of(layer)
            for name, linear in own.items():
                owner, _, attribute = name.rpartition(".")
                wrapped = AdaptedLinear(linear, (block, name), self._stage)
                setattr(layer.get_submodule(owner), attribute, wrapped)
            self.linears[block] = own

    @classmethod
    def load(cls, checkpoint: Checkpoint, span: Span) -> TrainableSpan:
        """Beside ``span``, which serves. Takes seconds where the weights cannot be shared."""
        if needs_copy(span):
            return cls(
                load_span(
                    checkpoint,
                    span.first_block,
                    span.end_block,
                    device=span.device,
                    dtype=span.dtype,
                    replace=False,
                )
            )
        shared = {
            id(tensor): tensor
            for layer in span.layers
            for tensor in (*layer.parameters(), *layer.buffers())
        }
        layers = [copy.deepcopy(layer, dict(shared)) for layer in span.layers]
        return cls(replace(span, layers=layers))

    def forward(
        self,
        block: int,
        hidden: torch.Tensor,
        batch: TrainingBatch,
        shard: AdapterShard | None,
        micro_batch: int,
    ) -> torch.Tensor:
        """``[1, total, hidden]`` through one block; with a gradient where torch records one."""
        with self._stage.play(shard, micro_batch):
            return self.span.run_blocks(hidden, batch, block, block + 1)

    def release(self) -> None:
        """Drop the modules, and the weights unless they are shared."""
        self.linears.clear()
        self.span.layers.clear()


def needs_copy(span: Span) -> bool:
    """Whether training needs weights of its own beside those that serve."""
    return span.device.type == "cpu"


def linear_sizes(checkpoint: Checkpoint, first_block: int, end_block: int) -> Linears:
    """What could be adapted, without reading any weights."""
    family = families.family_of(checkpoint)
    config = families.span_config(checkpoint, first_block, end_block)
    sizes: dict[int, dict[str, tuple[int, int]]] = {}
    for index in range(end_block - first_block):
        with torch.device("meta"):
            layer = family.decoder_layer(config, index)
        sizes[first_block + index] = {
            name: (linear.out_features, linear.in_features)
            for name, linear in _linears_of(layer).items()
        }
    return sizes


def graph_bytes_per_token(
    linears: Linears, hidden_size: int, item_bytes: int, expert_outputs: int
) -> int:
    """An upper bound of what torch keeps of one token in one block for its gradient.

    Every linear's output is kept up to two times (before and after rotation, repetition for the
    heads, activation or product), the low-rank paths keep their inputs, and norms compute in
    float32. ``expert_outputs``: of experts, which are no linears.
    """
    wide = max(
        (sum(outputs for outputs, _ in block.values()) for block in linears.values()), default=0
    )
    attention = max(
        (
            outputs
            for block in linears.values()
            for name, (outputs, _) in block.items()
            if name.endswith(("q_proj", "qkv_proj"))
        ),
        default=hidden_size,
    )
    return item_bytes * (2 * (wide + expert_outputs) + 4 * attention) + 4 * 10 * hidden_size


def _linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    return {name: one for name, one in layer.named_modules() if type(one) is nn.Linear}
