"""Losses over the outputs of the last block, and their gradients with respect to these.

Everything here is about one micro-batch: sequences that lie one after the other, each with
``prefix`` virtual tokens before it (prompt tuning; else 0). Only positions whose next token is
learned go through the head, some at a time: logits are by far the largest tensors of a training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from swarm.client.finetune.ends import TrainingEnds
from swarm.client.finetune.examples import Example

HEAD_TOKENS = 512
"""Positions whose logits are in memory at the same time."""


def learned_positions(
    examples: Sequence[Example], prefix: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where in the micro-batch, which token is next there, and of which example it is."""
    positions: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    start = 0
    for owner, example in enumerate(examples):
        start += prefix
        first = max(example.first_learned, 0 if prefix else 1)
        for index in range(first, len(example.token_ids)):
            positions.append(start + index - 1)
            targets.append(example.token_ids[index])
            owners.append(owner)
        start += len(example.token_ids)
    return torch.tensor(positions), torch.tensor(targets), torch.tensor(owners)


def learned_tokens(examples: Sequence[Example], prefix: int = 0) -> int:
    """How many positions :func:`learned_positions` has."""
    return sum(
        len(example.token_ids) - max(example.first_learned, 0 if prefix else 1)
        for example in examples
    )


def next_token_loss(
    ends: TrainingEnds,
    output: torch.Tensor,
    examples: Sequence[Example],
    *,
    prefix: int = 0,
    scale: float = 1.0,
    needs_gradient: bool = True,
) -> tuple[float, torch.Tensor | None]:
    """Supervised fine-tuning: the sum of cross entropies, times ``scale``; and its gradient.

    ``output`` and the gradient are ``[1, tokens, hidden]``. With ``scale`` one over the learned
    tokens of a whole step, the losses of its micro-batches add up to the mean.
    """
    positions, targets, _ = learned_positions(examples, prefix)
    gradient = torch.zeros_like(output) if needs_gradient else None
    total = 0.0
    for first in range(0, len(positions), HEAD_TOKENS):
        chosen = positions[first : first + HEAD_TOKENS]
        with torch.set_grad_enabled(needs_gradient):
            hidden = output[0, chosen].detach().requires_grad_(needs_gradient)
            logits = ends.logits(hidden).float()
            wanted = targets[first : first + HEAD_TOKENS]
            loss = F.cross_entropy(logits, wanted, reduction="sum") * scale
            if gradient is not None:
                (into_hidden,) = torch.autograd.grad(loss, hidden)
                gradient[0].index_add_(0, chosen, into_hidden)
        total += float(loss.detach())
    return total, gradient


def answer_log_probabilities(
    ends: TrainingEnds, output: torch.Tensor, examples: Sequence[Example], *, prefix: int = 0
) -> torch.Tensor:
    """``[examples]``: of each one's learned tokens together; with a gradient into ``output``."""
    positions, targets, owners = learned_positions(examples, prefix)
    parts = [
        -F.cross_entropy(
            ends.logits(output[0, positions[first : first + HEAD_TOKENS]]).float(),
            targets[first : first + HEAD_TOKENS],
            reduction="none",
        )
        for first in range(0, len(positions), HEAD_TOKENS)
    ]
    return torch.zeros(len(examples)).index_add(0, owners, torch.cat(parts))


def preference_loss(
    policy: torch.Tensor, reference: torch.Tensor, beta: float
) -> tuple[torch.Tensor, float]:
    """Direct preference optimization (Rafailov et al. 2023, equation 7), summed over pairs.

    Both are log-probabilities ``[2 x pairs]``: chosen, rejected, chosen, ... Also returns how many
    pairs are told apart rightly.
    """
    margins = (policy - reference)[0::2] - (policy - reference)[1::2]
    return -F.logsigmoid(beta * margins).sum(), float((margins > 0).sum())
