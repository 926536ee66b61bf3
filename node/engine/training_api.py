"""What the rest of a node knows of training. Free of torch: simulations plug in a toy.

A training session computes micro-batches forward and backward through the blocks of one hop and
keeps their gradients; it changes its adapter when it is told to. Nothing of it is seen by other
sessions but the time and the memory that it takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from swarm.compute.training_terms import TrainingTerms
from swarm.protocol.tensors import DType, WireTensor


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """Blocks ``[first_block, end_block)``, numbered as in the model."""

    first_block: int
    end_block: int
    wire_dtype: DType
    terms: TrainingTerms
    audited_micro_batches: int = 0
    """So many are kept by the session's owner, who needs memory for that."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences that lie one after the other in ``[1, sum(lengths), hidden]``.

    ``number`` grows from one to the next; with the session's seed it decides the dropout.
    """

    number: int
    lengths: tuple[int, ...]
    use_adapter: bool = True
    needs_gradient: bool = True


class TrainingSession(Protocol):
    """One session's adapter, its gradients and its micro-batches in flight.

    Calls are computed one after the other, in their order. Any of them may raise ProtocolError:
    UNKNOWN_SESSION after ``close``, INPUT_NOT_FINITE and NOT_FINITE as in inference.
    """

    @property
    def reserved_bytes(self) -> int: ...

    @property
    def dtype_class(self) -> str:
        """The precision that it computes in, by the names of audits."""

    @property
    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of all tensors that a state may have."""

    async def forward(self, micro_batch: MicroBatch, activations: WireTensor) -> WireTensor:
        """``[1, tokens, hidden]`` through the blocks; same shape."""

    async def backward(self, number: int, gradients: WireTensor) -> WireTensor:
        """The gradient of the outputs to that of the inputs; those of the adapter are added up.

        Raises ProtocolError(UNKNOWN_MICRO_BATCH) for one that is not kept.
        """

    async def forget(self, number: int) -> None:
        """Drop what is kept of a micro-batch."""

    async def gradient_square_sum(self) -> float:
        """Of all gradients added up since the last change."""

    async def apply(self, scale: float, learning_rate: float) -> None:
        """Multiply the gradients by ``scale``, let the optimizer take a step, forget them."""

    async def export_state(self) -> Sequence[tuple[str, WireTensor]]:
        """Adapter and optimizer, float32, each tensor flat as ``[1, 1, elements]``."""

    async def import_state(self, tensors: Mapping[str, WireTensor]) -> None:
        """Take over a state; what was in flight is forgotten.

        Raises ProtocolError(BAD_STATE), and then nothing changed.
        """

    async def close(self) -> None:
        """Free everything once what runs has ended; a second call does nothing."""


@runtime_checkable
class TrainingEngine(Protocol):
    """An engine that can train."""

    async def open_training(self, request: TrainingRequest) -> TrainingSession:
        """Reserve memory and load what training needs, which may take seconds.

        Raises ProtocolError: NO_CAPACITY, BLOCKS_NOT_HOSTED, TRAINING_NOT_OFFERED.
        """
