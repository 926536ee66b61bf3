"""Whether hops begin with the adapter that the seed decides.

One that begins with another could hide something in it, or one that never learns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from swarm.compute.initial_values import initial_a
from swarm.compute.lora import LORA_A, LORA_B
from swarm.compute.training_terms import TrainingTerms

_TOLERANCE = 1e-6


def wrong_beginning(state: Mapping[str, torch.Tensor], terms: TrainingTerms) -> str | None:
    """The name of a tensor that is not as it should be before the first step; None if all are.

    Of the magnitudes of DoRA nothing is known here: they follow from the weights.
    """
    for name, tensor in state.items():
        if name.endswith(LORA_A):
            rank = terms.adapter.rank
            if tensor.numel() % rank:
                return name
            right = initial_a((rank, tensor.numel() // rank), terms.seed, name).reshape(-1)
        elif name.endswith(LORA_B):
            right = torch.zeros_like(tensor)
        elif "#" in name:
            return name
        else:
            continue
        if not torch.allclose(tensor.reshape(-1), right, rtol=0.0, atol=_TOLERANCE):
            return name
    return None
