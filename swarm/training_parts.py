"""Micro-batches and adapter states in parts that fit into messages, and whole again. Pure bytes.

A receiver allocates what its session's terms allow and no more; parts come in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from swarm.ledger.transcript import tensor_hash
from swarm.pieces import pieces
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.messages import (
    BackwardPart,
    ForwardPart,
    MicroBatchDone,
    ShownPart,
    StateEnd,
    StatePart,
)
from swarm.protocol.tensors import ITEM_BYTES, DType, WireTensor

PART_BYTES = 1 << 20
"""Of one part: pings do not wait long behind it."""


def tokens_per_part(hidden_size: int, dtype: DType) -> int:
    return max(1, PART_BYTES // (hidden_size * ITEM_BYTES[dtype]))


def forward_parts(
    micro_batch: int,
    lengths: tuple[int, ...],
    activations: WireTensor,
    *,
    use_adapter: bool,
    needs_gradient: bool,
) -> Iterator[ForwardPart]:
    """``[1, tokens, hidden]`` as messages."""
    size = tokens_per_part(activations.shape[2], activations.dtype)
    for first_token, part in pieces(activations, size):
        yield ForwardPart(
            micro_batch=micro_batch,
            lengths=lengths,
            first_token=first_token,
            activations=part,
            use_adapter=int(use_adapter),
            needs_gradient=int(needs_gradient),
        )


def backward_parts(micro_batch: int, gradients: WireTensor) -> Iterator[BackwardPart]:
    """``[1, tokens, hidden]`` as messages."""
    size = tokens_per_part(gradients.shape[2], gradients.dtype)
    for first_token, part in pieces(gradients, size):
        yield BackwardPart(micro_batch=micro_batch, first_token=first_token, gradients=part)


def state_messages(
    step: int, tensors: Sequence[tuple[str, WireTensor]]
) -> Iterator[StatePart | StateEnd]:
    """A whole state; each tensor is flat, ``[1, 1, elements]``, float32."""
    per_part = PART_BYTES // ITEM_BYTES[DType.FLOAT32]
    for name, tensor in tensors:
        elements, data = tensor.shape[2], memoryview(tensor.data)
        for first in range(0, elements, per_part):
            end = min(first + per_part, elements)
            values = WireTensor(DType.FLOAT32, (1, 1, end - first), data[first * 4 : end * 4])
            yield StatePart(name=name, elements=elements, first_element=first, values=values)
    yield StateEnd(step=step, tensors=len(tensors))


def state_hash(tensors: Mapping[str, WireTensor]) -> bytes:
    """SHA-256 of a state, as GradientsApplied has it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(name.encode() + b"\0" + tensor.shape[2].to_bytes(8, "big"))
        digest.update(tensor.data)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class HandledMicroBatch:
    """What a hop was given for a micro-batch and what it sent on, each ``[1, tokens, hidden]``."""

    activations_in: WireTensor
    activations_out: WireTensor
    gradients_in: WireTensor
    gradients_out: WireTensor

    @property
    def tensors(self) -> tuple[WireTensor, WireTensor, WireTensor, WireTensor]:
        return (
            self.activations_in,
            self.activations_out,
            self.gradients_in,
            self.gradients_out,
        )

    def done(self, micro_batch: int) -> MicroBatchDone:
        """What binds a hop to it. Hashes: not for an event loop."""
        return MicroBatchDone(micro_batch, *map(tensor_hash, self.tensors))


def shown_parts(micro_batch: int, handled: HandledMicroBatch) -> Iterator[ShownPart]:
    """The answer to ShowMicroBatch."""
    for which, tensor in enumerate(handled.tensors):
        size = tokens_per_part(tensor.shape[2], tensor.dtype)
        for first_token, part in pieces(tensor, size):
            yield ShownPart(
                micro_batch=micro_batch, which=which, first_token=first_token, values=part
            )


class TensorAssembly:
    """One micro-batch's tensor ``[1, tokens, hidden]`` out of its parts."""

    def __init__(self, tokens: int, hidden_size: int, dtype: DType) -> None:
        """The caller has bounded ``tokens``."""
        self._shape = (1, tokens, hidden_size)
        self._dtype = dtype
        self._token_bytes = hidden_size * ITEM_BYTES[dtype]
        self._data = bytearray()

    def add(self, first_token: int, part: WireTensor) -> WireTensor | None:
        """The whole tensor with its last part. Raises ProtocolError(GAP or BAD_TENSOR)."""
        rows, tokens, hidden = part.shape
        if first_token * self._token_bytes != len(self._data):
            raise ProtocolError(ErrorCode.GAP, "a part of a micro-batch is missing")
        if part.dtype is not self._dtype or rows != 1 or hidden != self._shape[2]:
            raise ProtocolError(ErrorCode.BAD_TENSOR, f"part {part.shape} of {self._shape}")
        if first_token + tokens > self._shape[1]:
            raise ProtocolError(ErrorCode.BAD_TENSOR, "more tokens than announced")
        if not self._data and tokens == self._shape[1]:
            return part
        self._data += part.data
        if first_token + tokens < self._shape[1]:
            return None
        return WireTensor(self._dtype, self._shape, self._data)


class ShownAssembly:
    """The four tensors of a micro-batch out of their parts."""

    def __init__(self, micro_batch: int, tokens: int, hidden_size: int, dtype: DType) -> None:
        self._micro_batch = micro_batch
        self._assemblies = [TensorAssembly(tokens, hidden_size, dtype) for _ in range(4)]
        self._whole: list[WireTensor] = []

    def add(self, part: ShownPart) -> HandledMicroBatch | None:
        """All of it with the last part. Raises ProtocolError(GAP or BAD_TENSOR)."""
        if (part.micro_batch, part.which) != (self._micro_batch, len(self._whole)):
            raise ProtocolError(ErrorCode.GAP, "a part of what was shown is missing")
        whole = self._assemblies[part.which].add(part.first_token, part.values)
        if whole is not None:
            self._whole.append(whole)
        return HandledMicroBatch(*self._whole) if len(self._whole) == 4 else None


class StateAssembly:
    """An adapter's state out of its parts: only tensors that are expected, each once."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._elements = {name: prod(shape) for name, shape in shapes.items()}
        self._whole: dict[str, WireTensor] = {}
        self._name = ""
        self._data = bytearray()

    def expect(self, name: str, elements: int) -> None:
        """One tensor more may come."""
        self._elements[name] = elements

    def add(self, part: StatePart) -> None:
        """Raises ProtocolError(BAD_STATE)."""
        elements = self._elements.get(part.name)
        values = part.values
        if elements is None or elements != part.elements or part.name in self._whole:
            raise ProtocolError(ErrorCode.BAD_STATE, "an unknown tensor, or one of another size")
        if self._name not in ("", part.name) or part.first_element * 4 != len(self._data):
            raise ProtocolError(ErrorCode.BAD_STATE, "a part is missing")
        if values.shape[:2] != (1, 1) or values.dtype is not DType.FLOAT32:
            raise ProtocolError(ErrorCode.BAD_STATE, "flat float32 tensors are expected")
        end = part.first_element + values.shape[2]
        if end > elements:
            raise ProtocolError(ErrorCode.BAD_STATE, "more elements than announced")
        self._name = part.name
        self._data += values.data
        if end == elements:
            self._whole[part.name] = WireTensor(DType.FLOAT32, (1, 1, elements), self._data)
            self._name, self._data = "", bytearray()

    def finish(self, end: StateEnd) -> dict[str, WireTensor]:
        """All tensors. Raises ProtocolError(BAD_STATE) when some are missing."""
        if self._name or end.tensors != len(self._whole):
            raise ProtocolError(ErrorCode.BAD_STATE, "tensors are missing")
        return self._whole
