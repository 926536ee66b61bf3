"""The ends of a model with gradients: frozen weights, through which gradients pass."""

from __future__ import annotations

from typing import Any

import torch

from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.ends import ModelEnds, read_config, read_tensors


class TrainingEnds:
    """Embeddings below, norm and head above, in float32."""

    def __init__(self, ends: ModelEnds) -> None:
        """``ends`` with ordinary linears, whose gradient torch knows."""
        self._ends = ends
        self.config: Any = ends.config
        self._softcap: float | None = getattr(ends.config, "final_logit_softcapping", None)

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> TrainingEnds:
        """Read the tensors of the two ends. Blocks for a second. Raises CheckpointError."""
        config = read_config(checkpoint.path)
        tensors = read_tensors(checkpoint, config)
        return cls(ModelEnds.from_tensors(config, tensors, dtype=torch.float32))

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """``[tokens]`` ids to ``[1, tokens, hidden]``, without a gradient."""
        return self._ends.embed(token_ids.unsqueeze(0))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., hidden]`` out of the last block to ``[..., vocabulary]``, with a gradient."""
        logits: torch.Tensor = self._ends.head(self._ends.norm(hidden))
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits
