"""Safetensors files of strangers: the header is checked whole before a single tensor is read.

Stricter than the format: bounded header, known dtypes, names by an allow-list, tensors that follow
on each other without gaps or overlaps and end with the file. ``checkpoint`` is for the owner's own
models, this for what somebody published.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from swarm.protocol.bounded_json import parse_json
from swarm.protocol.errors import AdapterError, DecodeError
from swarm.protocol.tensors import ITEM_BYTES, DType

MAX_HEADER_BYTES = 1024 * 1024
MAX_FILE_BYTES = 512 * 1024 * 1024
MAX_METADATA_BYTES = 64 * 1024
_DEPTH = 4
_MAX_DIMENSION = 1 << 24
_DTYPES = {"F32": DType.FLOAT32, "F16": DType.FLOAT16, "BF16": DType.BFLOAT16}
_READ_BYTES = 1024 * 1024
_FOREIGN_FORMATS = (
    (b"PK", "is a zip archive, as torch.save writes; it may run code when it is loaded"),
    (b"\x80", "is a pickle; it may run code when it is loaded"),
    (b"GGUF", "is a GGUF file"),
    (b"\x1f\x8b", "is compressed by gzip"),
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor at ``offset`` of the file, row-major, little endian."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class SafetensorsFile:
    """A file whose header was found to be in order."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path, allowed_name: re.Pattern[str]) -> SafetensorsFile:
        """Read and check the header; every name must match ``allowed_name`` fully.

        Raises AdapterError that says what is wrong.
        """
        try:
            size_bytes = path.stat().st_size
            with path.open("rb") as stream:
                start = stream.read(8)
                header_bytes = int.from_bytes(start, "little")
                if len(start) < 8 or header_bytes > MAX_HEADER_BYTES:
                    raise AdapterError(
                        f"{path.name} {_foreign_format(start)}; only safetensors files with a "
                        f"header of at most {MAX_HEADER_BYTES} bytes are accepted"
                    )
                if size_bytes > MAX_FILE_BYTES:
                    raise AdapterError(
                        f"{path.name} has {size_bytes} bytes; at most {MAX_FILE_BYTES} are allowed"
                    )
                header = stream.read(header_bytes)
        except OSError as error:
            raise AdapterError(f"cannot read {path}: {error.strerror}") from error
        if len(header) < header_bytes:
            raise AdapterError(f"{path.name} is cut short: its header is not all there")
        try:
            tensors, metadata = _read_header(header, size_bytes - 8 - header_bytes, allowed_name)
        except (AdapterError, DecodeError) as error:
            detail = error.detail if isinstance(error, DecodeError) else str(error)
            raise AdapterError(f"{path.name}: {detail}") from None
        placed = {
            name: StoredTensor(name, tensor.dtype, tensor.shape, tensor.offset + 8 + header_bytes)
            for name, tensor in tensors.items()
        }
        return cls(path, placed, metadata)

    def read(self, tensor: StoredTensor) -> bytes:
        """The tensor's bytes. Raises AdapterError."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(tensor.offset)
                data = stream.read(tensor.size_bytes)
        except OSError as error:
            raise AdapterError(f"cannot read {self.path}: {error.strerror}") from error
        if len(data) != tensor.size_bytes:
            raise AdapterError(f"{self.path.name} is cut short")
        return data

    def sha256(self, tensor: StoredTensor) -> bytes:
        return hashlib.sha256(self.read(tensor)).digest()


def _foreign_format(start: bytes) -> str:
    """What a file is that does not begin like a safetensors file."""
    for magic, what in _FOREIGN_FORMATS:
        if start.startswith(magic):
            return what
    return f"claims a header of {int.from_bytes(start, 'little')} bytes"


def _read_header(
    header: bytes, data_bytes: int, allowed_name: re.Pattern[str]
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    value = parse_json(header, maximum_bytes=MAX_HEADER_BYTES, maximum_depth=_DEPTH)
    if not isinstance(value, dict):
        raise AdapterError("the header is no JSON object")
    metadata = value.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterError("the metadata are no texts")
    if sum(len(key) + len(text) for key, text in metadata.items()) > MAX_METADATA_BYTES:
        raise AdapterError("too many metadata")
    tensors = [_read_entry(name, entry, allowed_name) for name, entry in value.items()]
    tensors.sort(key=lambda tensor: tensor.offset)
    reached = 0
    for tensor in tensors:
        if tensor.offset != reached:
            raise AdapterError(f"{tensor.name} does not begin where the tensor before it ends")
        reached += tensor.size_bytes
    if reached != data_bytes:
        raise AdapterError(f"the tensors take {reached} bytes, the file has {data_bytes}")
    return {tensor.name: tensor for tensor in tensors}, metadata


def _read_entry(name: str, entry: object, allowed_name: re.Pattern[str]) -> StoredTensor:
    shown = name[:120]
    if len(name) > 256 or not allowed_name.fullmatch(name):
        raise AdapterError(f"a tensor of the name {shown!r} has no place in an adapter")
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end], **rest}:
            if rest:
                raise AdapterError(f"{shown}: unknown entries in the header")
        case _:
            raise AdapterError(f"{shown}: malformed header")
    if dtype not in _DTYPES:
        raise AdapterError(f"{shown} is stored as {dtype[:16]!r}; allowed are {', '.join(_DTYPES)}")
    if not 1 <= len(shape) <= 2 or not all(
        type(size) is int and 0 < size <= _MAX_DIMENSION for size in shape
    ):
        raise AdapterError(f"{shown} has the shape {shape[:4]}")
    tensor = StoredTensor(name, _DTYPES[dtype], tuple(shape), start)
    if type(start) is not int or type(end) is not int or start < 0:
        raise AdapterError(f"{shown}: malformed offsets")
    if end - start != tensor.size_bytes:
        raise AdapterError(f"{shown}: {end - start} bytes for the shape {shape}")
    return tensor
