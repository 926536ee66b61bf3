"""What a training chain is opened for, and how its hops are asked."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.compute.lora import AdapterShape, Method
from swarm.compute.training_terms import TrainingTerms
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import OpenTraining
from swarm.protocol.policy import Policy
from swarm.protocol.tensors import DType
from swarm.routing import Hop as PlannedHop


@dataclass(frozen=True, slots=True)
class TrainingChainRequest:
    """What a chain is opened for."""

    model_revision: bytes
    number_of_blocks: int
    hidden_size: int
    wire_dtype: DType
    terms: TrainingTerms
    maximum_state_elements_per_block: int
    """More elements in a block's state are refused."""
    policy: Policy | None = None
    """Which peers may see anything of the training; None: all. Every hop checks it as well."""
    audited_micro_batches: int = 0
    """So many of a step can be looked at in an audit; 0: hops are believed."""


def open_message(request: TrainingChainRequest, hop: PlannedHop, previous: PeerId) -> OpenTraining:
    terms: TrainingTerms = request.terms
    shape: AdapterShape = terms.adapter
    trains = shape.method is not Method.NONE
    return OpenTraining(
        model_revision=request.model_revision,
        first_block=hop.first_block,
        end_block=hop.end_block,
        wire_dtype=int(request.wire_dtype),
        previous_peer=previous,
        maximum_tokens=terms.maximum_tokens,
        micro_batches_in_flight=terms.micro_batches_in_flight,
        method=int(shape.method),
        optimizer=int(terms.optimizer.kind),
        rank=shape.rank if trains else 0,
        alpha=float(shape.alpha) if trains else 0.0,
        target_modules=shape.target_modules if trains else (),
        dropout=float(terms.dropout),
        seed=terms.seed,
        beta1=float(terms.optimizer.beta1),
        beta2=float(terms.optimizer.beta2),
        epsilon=float(terms.optimizer.epsilon),
        weight_decay=float(terms.optimizer.weight_decay),
        policy=b"" if request.policy is None else request.policy.to_bytes(),
        audited_micro_batches=request.audited_micro_batches,
    )
