"""Our attention, registered through the attention interface of transformers.

A layer calls it with queries, keys and values of all tokens of a :class:`RaggedBatch`, which
reaches it through the layer's keyword arguments. The caches and masks of transformers are not
involved.
"""

from __future__ import annotations

from typing import Any

import torch

from swarm.node.engine.ragged import RaggedBatch
from swarm.node.engine.training_batch import TrainingBatch

ATTENTION_NAME = "swarm_ragged"


def register_attention() -> None:
    """Make ``ATTENTION_NAME`` known to transformers; a second call does nothing new."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, ragged_attention)


def ragged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    ragged_batch: RaggedBatch | TrainingBatch,
    block_offset: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """``query`` ``[1, heads, total, dim]``, key and value ``[1, kv_heads, total, dim]``.

    Returns ``[1, total, heads, dim]`` and no weights. ``block_offset`` is the first block of the
    batch inside the span: layers know their own index inside the span only.
    """
    attended = ragged_batch.attend(
        module.layer_idx - block_offset,
        query[0].transpose(0, 1).contiguous(),
        torch.stack((key[0], value[0])).permute(2, 0, 1, 3),
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return attended.unsqueeze(0), None
