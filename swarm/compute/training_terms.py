"""What a training session does at a block, as client and nodes agree on it. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from swarm.compute.lora import AdapterShape
from swarm.protocol.errors import UsageError


class OptimizerKind(IntEnum):
    """Which rule turns gradients into changes."""

    ADAMW = 1
    """Loshchilov and Hutter 2019; that of ``torch.optim``."""
    LION = 2
    """Chen et al. 2023."""
    ADAFACTOR = 3
    """Shazeer and Stern 2018; that of ``torch.optim``."""


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """The learning rate is no part of it: it comes with every step."""

    kind: OptimizerKind = OptimizerKind.ADAMW
    beta1: float = 0.9
    beta2: float = 0.999
    """Adafactor: the decay is ``-beta2`` as an exponent of the step, 0.8 in the paper."""
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta1 < 1 or not 0 <= self.beta2 < 1:
            raise UsageError("the betas of an optimizer are at least 0 and below 1")
        if self.epsilon < 0 or self.weight_decay < 0:
            raise UsageError("epsilon and weight decay of an optimizer are at least 0")


@dataclass(frozen=True, slots=True)
class TrainingTerms:
    """The same for every hop of a session."""

    adapter: AdapterShape
    optimizer: OptimizerSettings
    dropout: float
    """Probability with which an input of the low-rank path is left out."""
    seed: int
    """Of initial values and dropout; with a tensor's name it decides its values wherever it is."""
    maximum_tokens: int
    """Most tokens of one micro-batch, all sequences together."""
    micro_batches_in_flight: int
    """Most micro-batches that wait for their gradient at a hop."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise UsageError("dropout is at least 0 and below 1")
        if self.maximum_tokens < 1 or self.micro_batches_in_flight < 1:
            raise UsageError("a training session needs room for one micro-batch of one token")
