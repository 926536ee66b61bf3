"""Adapters: a client brings one to a node that lacks it."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.protocol.messages.fields import (
    DIGEST_BYTES,
    MAX_BLOCKS,
    REVISION_BYTES,
    Array,
    Bytes,
    Message,
    TensorField,
    Text,
    Uint,
    wire,
)
from swarm.protocol.tensors import WireTensor


@dataclass(frozen=True, slots=True)
class PushAdapter(Message):
    """First message of a stream: I have this adapter for you; its index has so many bytes."""

    TAG = 35
    adapter_id: bytes = wire(1, Bytes(DIGEST_BYTES, DIGEST_BYTES))
    model_revision: bytes = wire(2, Bytes(REVISION_BYTES, REVISION_BYTES))
    index_bytes: int = wire(3, Uint(512 * 1024))
    catalogue_name: str = wire(4, Text(256), "")
    """``NAME@REVISION`` in the catalogue, from where the node may fetch the tensors itself."""


@dataclass(frozen=True, slots=True)
class AdapterStatus(Message):
    """Node to client: send the index, or the tensors of these blocks; or: it is loaded."""

    TAG = 36
    loaded: int = wire(1, Uint(1))
    first_block: int = wire(2, Uint(MAX_BLOCKS), 0)
    end_block: int = wire(3, Uint(MAX_BLOCKS), 0)


@dataclass(frozen=True, slots=True)
class AdapterIndexPart(Message):
    """The next bytes of the index, in pieces that follow each other."""

    TAG = 37
    pieces: tuple[bytes, ...] = wire(1, Array(Bytes(1, 4096), 15))


@dataclass(frozen=True, slots=True)
class AdapterTensor(Message):
    """Rows of one tensor, ``[1, rows, columns]``; tensors and rows come in the index's order."""

    TAG = 38
    module: int = wire(1, Uint(4095))
    """Its place in the index."""
    tensor: int = wire(2, Uint(2))
    """0 is A, 1 is B, 2 is the magnitude, which has one row."""
    values: WireTensor = wire(3, TensorField())
