"""What a step consists of: micro-batches out of examples, and the loss of each.

``Objective`` is all that the trainer knows of a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from swarm.client.finetune.ends import TrainingEnds
from swarm.client.finetune.examples import Example, Pair, pack
from swarm.client.finetune.losses import (
    answer_log_probabilities,
    learned_tokens,
    next_token_loss,
    preference_loss,
)
from swarm.protocol.errors import UsageError


@dataclass(frozen=True, slots=True)
class Work:
    """One micro-batch."""

    examples: tuple[Example, ...]
    scale: float
    """What the sum over the micro-batch is multiplied with, so that all of a step are a mean."""
    pairs: tuple[int, ...] = ()
    """DPO: indices of the pairs whose answers the examples are."""


class Objective(Protocol):
    """A loss over training data that is indexed from 0."""

    @property
    def size(self) -> int:
        """How many examples, or pairs, there are."""

    @property
    def longest(self) -> int:
        """Tokens that one indivisible piece of work may have."""

    def works(self, indices: Sequence[int]) -> list[Work]:
        """The micro-batches of a step over these examples."""

    def needs_reference(self, work: Work) -> bool:
        """Whether the frozen model's outputs for ``work`` are wanted before its loss."""

    def learn_reference(self, ends: TrainingEnds, work: Work, output: torch.Tensor) -> None:
        """Take over the frozen model's outputs ``[1, tokens, hidden]``, without virtual tokens."""

    def loss(
        self, ends: TrainingEnds, work: Work, output: torch.Tensor, *, needs_gradient: bool = True
    ) -> tuple[float, torch.Tensor | None]:
        """Loss and its gradient with respect to ``output`` ``[1, tokens, hidden]``."""


class SupervisedFineTuning:
    """The mean cross entropy of all learned tokens of a step."""

    def __init__(
        self, examples: Sequence[Example], *, micro_batch_tokens: int, prefix: int
    ) -> None:
        self._examples = examples
        self._maximum = micro_batch_tokens
        self._prefix = prefix

    @property
    def size(self) -> int:
        return len(self._examples)

    @property
    def longest(self) -> int:
        return self._prefix + max(len(example.token_ids) for example in self._examples)

    def works(self, indices: Sequence[int]) -> list[Work]:
        examples = [self._examples[index] for index in indices]
        learned = learned_tokens(examples, self._prefix)
        sizes = [len(example.token_ids) + self._prefix for example in examples]
        return [
            Work(tuple(examples[member] for member in group), 1.0 / learned)
            for group in pack(sizes, self._maximum)
        ]

    def needs_reference(self, work: Work) -> bool:
        return False

    def learn_reference(self, ends: TrainingEnds, work: Work, output: torch.Tensor) -> None:
        raise UsageError("supervised fine-tuning has no reference")

    def loss(
        self, ends: TrainingEnds, work: Work, output: torch.Tensor, *, needs_gradient: bool = True
    ) -> tuple[float, torch.Tensor | None]:
        return next_token_loss(
            ends,
            output,
            work.examples,
            prefix=self._prefix,
            scale=work.scale,
            needs_gradient=needs_gradient,
        )


class DirectPreferenceOptimization:
    """The mean over the pairs of a step; what the frozen model says of a pair is asked once."""

    def __init__(
        self, pairs: Sequence[Pair], *, beta: float, micro_batch_tokens: int, prefix: int
    ) -> None:
        self._pairs = pairs
        self._beta = beta
        self._maximum = micro_batch_tokens
        self._prefix = prefix
        self._reference: dict[int, torch.Tensor] = {}

    @property
    def size(self) -> int:
        return len(self._pairs)

    @property
    def longest(self) -> int:
        return max(self._tokens(pair) for pair in self._pairs)

    def works(self, indices: Sequence[int]) -> list[Work]:
        pairs = [self._pairs[index] for index in indices]
        works = []
        for group in pack([self._tokens(pair) for pair in pairs], self._maximum):
            answers: list[Example] = []
            for member in group:
                answers += (pairs[member].chosen, pairs[member].rejected)
            named = tuple(indices[member] for member in group)
            works.append(Work(tuple(answers), 1.0 / len(pairs), named))
        return works

    def needs_reference(self, work: Work) -> bool:
        return any(index not in self._reference for index in work.pairs)

    @torch.no_grad()
    def learn_reference(self, ends: TrainingEnds, work: Work, output: torch.Tensor) -> None:
        answers = answer_log_probabilities(ends, output, work.examples)
        for place, index in enumerate(work.pairs):
            self._reference[index] = answers[2 * place : 2 * place + 2].clone()

    def loss(
        self, ends: TrainingEnds, work: Work, output: torch.Tensor, *, needs_gradient: bool = True
    ) -> tuple[float, torch.Tensor | None]:
        reference = torch.cat([self._reference[index] for index in work.pairs])
        with torch.set_grad_enabled(needs_gradient):
            leaf = output.detach().requires_grad_(needs_gradient)
            policy = answer_log_probabilities(ends, leaf, work.examples, prefix=self._prefix)
            total, _ = preference_loss(policy, reference, self._beta)
            loss = total * work.scale
            gradient = torch.autograd.grad(loss, leaf)[0] if needs_gradient else None
        return float(loss.detach()), gradient

    def _tokens(self, pair: Pair) -> int:
        both = len(pair.chosen.token_ids) + len(pair.rejected.token_ids)
        return both + 2 * self._prefix
