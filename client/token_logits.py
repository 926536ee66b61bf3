"""What is done to the scores of the next token before one is chosen: samplers, penalties, bias.

The samplers are transformers' own, in the order in which ``generate`` applies them. Penalties and
bias are those of OpenAI's API, which transformers does not have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from swarm.client.config import SamplingSettings


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model held a token: natural logarithm, before samplers, penalties and bias."""

    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at this place with theirs, the likeliest first."""


def logits_processors(settings: SamplingSettings, prompt_tokens: int) -> LogitsProcessorList:
    """Everything that the settings ask for; called with ids ``[1, tokens]``, the prompt's first."""
    processors = LogitsProcessorList()
    if settings.logit_bias:
        processors.append(_Bias(settings.logit_bias))
    if settings.presence_penalty or settings.frequency_penalty:
        processors.append(
            _Penalties(settings.presence_penalty, settings.frequency_penalty, prompt_tokens)
        )
    if settings.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.samples:
        if settings.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k:
            processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            processors.append(TopPLogitsWarper(settings.top_p))
    return processors


def token_logprob(logits: torch.Tensor, token_id: int, alternatives: int) -> TokenLogprob:
    """Of one token by ``logits`` ``[1, vocabulary]``, float32."""
    logprobs = torch.log_softmax(logits[0], dim=-1)
    values, ids = torch.topk(logprobs, min(alternatives, logprobs.numel()))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return TokenLogprob(token_id, float(logprobs[token_id]), tuple(pairs))


class _Bias(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, bias: tuple[tuple[int, float], ...]) -> None:
        self._ids = torch.tensor([token_id for token_id, _ in bias])
        self._values = torch.tensor([value for _, value in bias])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        known = self._ids < scores.shape[-1]
        return scores.index_add(-1, self._ids[known], self._values[known][None])


class _Penalties(LogitsProcessor):  # type: ignore[misc]
    """Lowers tokens of the answer so far: once, and once more for each time that they occurred."""

    def __init__(self, presence: float, frequency: float, prompt_tokens: int) -> None:
        self._presence = presence
        self._frequency = frequency
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, self._prompt_tokens :], minlength=scores.shape[-1])
        return scores - (self._presence * (counts > 0) + self._frequency * counts)
