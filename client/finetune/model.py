"""The frozen model as a training client knows it, and what its chains are asked for."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.finetune.chain_request import TrainingChainRequest
from swarm.client.finetune.settings import FinetuneSettings
from swarm.protocol.tensors import DType

MOST_AUDITED_MICRO_BATCHES = 16
"""Hops keep so many of a step; of steps with more the rest and the optimizer are not audited."""
_STATE_TENSORS = 3
"""Parameter and moments."""
_LINEARS = 32
"""More than any block has."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What decides names, sizes and precision."""

    name: str
    model_type: str
    revision: bytes
    number_of_blocks: int
    hidden_size: int
    intermediate_size: int
    wire_dtype: DType
    node_dtype: DType | None = None
    """Only nodes that compute in this precision; None takes any."""


def base_model(checkpoint: Checkpoint, dtype: str) -> BaseModel:
    """``dtype`` as users say it: ``auto`` takes any node and sends bfloat16."""
    exact = {"float32": DType.FLOAT32, "bfloat16": DType.BFLOAT16}.get(dtype)
    return BaseModel(
        name=checkpoint.name,
        model_type=checkpoint.model_type,
        revision=checkpoint.revision,
        number_of_blocks=checkpoint.number_of_blocks,
        hidden_size=checkpoint.hidden_size,
        intermediate_size=int(checkpoint.text_config.get("intermediate_size") or 0),
        wire_dtype=exact or DType.BFLOAT16,
        node_dtype=exact,
    )


def chain_request(
    base: BaseModel, settings: FinetuneSettings, maximum_tokens: int
) -> TrainingChainRequest:
    """A chain for this training; ``maximum_tokens`` is the room for one micro-batch."""
    widest = 2 * (base.hidden_size + base.intermediate_size)
    elements = _LINEARS * _STATE_TENSORS * widest * (settings.rank + 1)
    return TrainingChainRequest(
        model_revision=base.revision,
        number_of_blocks=base.number_of_blocks,
        hidden_size=base.hidden_size,
        wire_dtype=base.wire_dtype,
        terms=settings.terms(base.model_type, maximum_tokens),
        maximum_state_elements_per_block=elements,
        audited_micro_batches=min(settings.batch_size, MOST_AUDITED_MICRO_BATCHES),
    )
