"""The size of a model's blocks, for prices: from the checkpoint, the same for everybody."""

from __future__ import annotations

from math import prod
from typing import Any

from swarm.catalogue.checkpoint import Checkpoint
from swarm.protocol.prices import mflop_per_block_token


def block_price(checkpoint: Checkpoint) -> int:
    """MFLOP per token of one block: the largest one, if they differ."""
    config = checkpoint.text_config
    heads = _natural(config.get("num_attention_heads"), 1)
    width = heads * _natural(config.get("head_dim"), checkpoint.hidden_size // heads)
    experts = _natural(
        config.get("num_local_experts", config.get("num_experts")),
        1,
    )
    active = min(experts, _natural(config.get("num_experts_per_tok"), experts))
    largest = 0
    for block in range(checkpoint.number_of_blocks):
        parameters = 0
        for name, tensor in checkpoint.block_tensors(block).items():
            count = prod(tensor.shape)
            parameters += count * active // experts if ".experts." in name else count
        largest = max(largest, parameters)
    return mflop_per_block_token(largest, width)


def _natural(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and value > 0 else otherwise
