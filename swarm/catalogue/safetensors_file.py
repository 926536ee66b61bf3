"""Safetensors files: where their tensors lie, read from the header alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from swarm.protocol.errors import CheckpointError
from swarm.protocol.manifest import ITEM_BYTES, Tensor

SAFETENSORS_DTYPES: dict[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_DTYPE_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
_MAX_HEADER_BYTES = 100 * 1000 * 1000
"""What the safetensors format itself allows."""
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: row-major, little endian, ``size_bytes`` at ``offset`` of ``file``."""

    name: str
    file: Path
    dtype: str
    """As torch spells it: ``float32``, ``bfloat16``, ..."""
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def read_json(file: Path, maximum_bytes: int) -> Any:
    try:
        with file.open("rb") as stream:
            content = stream.read(maximum_bytes + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint incomplete: {file} is missing") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    if len(content) > maximum_bytes:
        raise CheckpointError(f"{file} is larger than {maximum_bytes} bytes")
    return parse_json(content, file)


def parse_json(content: bytes, file: Path) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint damaged: {file} is no valid JSON") from error


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensor table of one safetensors file, checked against the file's size."""
    try:
        file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(f"checkpoint incomplete: {file} is cut short or damaged")
            content = stream.read(header_bytes)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint incomplete: {file} is missing") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    header = parse_json(content, file)
    if not isinstance(header, dict):
        raise CheckpointError(f"checkpoint damaged: {file} has no valid header")
    data_start = 8 + header_bytes
    return {
        name: _tensor_info(name, entry, file, data_start, file_bytes)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _tensor_info(
    name: str, entry: object, file: Path, data_start: int, file_bytes: int
) -> TensorInfo:
    damaged = CheckpointError(f"checkpoint damaged: {file} describes {name} wrongly")
    if not isinstance(entry, dict):
        raise damaged
    dtype = SAFETENSORS_DTYPES.get(str(entry.get("dtype")))
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if dtype is None:
        raise CheckpointError(f"{file}: tensor {name} has an unknown dtype {entry.get('dtype')!r}")
    if not _are_naturals(shape) or not _are_naturals(offsets) or len(offsets) != 2:
        raise damaged
    begin, end = offsets
    size_bytes = prod(shape) * ITEM_BYTES[dtype]
    if end - begin != size_bytes:
        raise damaged
    if data_start + end > file_bytes:
        raise CheckpointError(
            f"checkpoint incomplete: {file} is cut short ({file_bytes} bytes, {name} ends at "
            f"{data_start + end})"
        )
    return TensorInfo(name, file, dtype, tuple(shape), data_start + begin, size_bytes)


def _are_naturals(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 48 for v in values)
    )


def header_for(tensors: tuple[Tensor, ...]) -> bytes:
    """What comes before the bytes of these tensors, which follow each other in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.size_bytes
        header[tensor.name] = {
            "dtype": _DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    content = json.dumps(header, separators=(",", ":")).encode("ascii")
    content += b" " * (-len(content) % _ALIGNMENT)
    return len(content).to_bytes(8, "little") + content
