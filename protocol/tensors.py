"""Tensors as they travel: a dtype code, an encoding, a shape and bytes.

Pure: knows nothing of torch or numpy. ``swarm.compute.wire_tensors`` turns them into torch tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import prod


class DType(IntEnum):
    """Element types on the wire, little endian."""

    FLOAT32 = 1
    BFLOAT16 = 2
    FLOAT16 = 3


ITEM_BYTES: dict[DType, int] = {DType.FLOAT32: 4, DType.BFLOAT16: 2, DType.FLOAT16: 2}


class Encoding(IntEnum):
    """How the payload holds the elements."""

    RAW = 0
    ZSTD = 1


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A contiguous row-major tensor.

    ``data`` holds the elements uncompressed and little endian; the codec compresses and
    decompresses. ``len(data) == prod(shape) * ITEM_BYTES[dtype]`` always holds (a memoryview has
    one-byte items).
    """

    dtype: DType
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview
    encoding: Encoding = Encoding.RAW

    @property
    def size_bytes(self) -> int:
        """Size of the elements, uncompressed."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]
