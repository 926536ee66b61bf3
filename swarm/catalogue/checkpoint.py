"""A model's checkpoint directory: where it is, which tensors it has, which belong to which block.

Reads ``config.json`` and the headers of the safetensors files; knows nothing of torch. How tensors
become modules: ``swarm.node.engine.span_loader`` and ``swarm.client.model``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from swarm.catalogue.resolve import models_directory, resolve_checkpoint
from swarm.protocol.errors import CheckpointError

__all__ = ["Checkpoint", "TensorInfo", "models_directory", "resolve_checkpoint"]

ITEM_BYTES: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
_SAFETENSORS_DTYPES: dict[str, str] = {
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
_MAX_CONFIG_BYTES = 4 * 1024 * 1024
_MAX_INDEX_BYTES = 64 * 1024 * 1024
_MAX_HEADER_BYTES = 100 * 1000 * 1000
"""What the safetensors format itself allows."""
_MAX_BLOCKS = 1024
_SAMPLE_BYTES = 4096
_BLOCK_NAME = re.compile(
    r"^(?:model\.|language_model\.model\.|model\.language_model\.)layers\.(\d{1,5})\.(.+)$"
)
_CONFIG_KEYS_WITHOUT_MEANING = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "_attn_implementation",
        "output_attentions",
        "output_hidden_states",
    }
)


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


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory: the configuration and a table of all tensors."""

    path: Path
    config: Mapping[str, Any]
    """``config.json`` as it is."""
    tensors: Mapping[str, TensorInfo]
    _blocks: Mapping[int, Mapping[str, TensorInfo]] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read configuration and headers, no weights. Raises CheckpointError in plain words."""
        directory = Path(path)
        config = _read_json(directory / "config.json", _MAX_CONFIG_BYTES)
        if not isinstance(config, dict):
            raise CheckpointError(f"{directory / 'config.json'} is no JSON object")
        tensors: dict[str, TensorInfo] = {}
        for file, expected in _weight_files(directory).items():
            found = _read_header(file)
            missing = sorted(expected - found.keys())
            if missing:
                raise CheckpointError(
                    f"checkpoint incomplete: {file} lacks {len(missing)} tensors that the index "
                    f"lists ({missing[0]}, ...)"
                )
            tensors.update(found)
        blocks: dict[int, dict[str, TensorInfo]] = {}
        for name, info in tensors.items():
            match = _BLOCK_NAME.match(name)
            if match:
                blocks.setdefault(int(match[1]), {})[match[2]] = info
        checkpoint = cls(directory, config, tensors, blocks)
        for block in range(checkpoint.number_of_blocks):
            if block not in blocks:
                raise CheckpointError(
                    f"checkpoint incomplete: {directory} has no tensors for block {block} of "
                    f"{checkpoint.number_of_blocks}"
                )
        return checkpoint

    @property
    def name(self) -> str:
        """The directory's name, or the model's name for a snapshot in the Hugging Face cache."""
        if self.path.parent.name == "snapshots":
            return self.path.parent.parent.name.removeprefix("models--").replace("--", "/")
        return self.path.resolve().name

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the configuration that describes the decoder."""
        text = self.config.get("text_config")
        return text if isinstance(text, dict) else self.config

    @property
    def model_type(self) -> str:
        """The family, as transformers calls it: ``llama``, ``qwen3``, ``gemma3_text`` ..."""
        return str(self.text_config.get("model_type", ""))

    @property
    def number_of_blocks(self) -> int:
        return self._integer("num_hidden_layers", _MAX_BLOCKS)

    @property
    def hidden_size(self) -> int:
        return self._integer("hidden_size", 1 << 20)

    @cached_property
    def dtype(self) -> str:
        """The dtype of most of the blocks' bytes."""
        sizes: dict[str, int] = {}
        for info in (info for block in self._blocks.values() for info in block.values()):
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.size_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def is_quantized(self) -> bool:
        return bool(self.config.get("quantization_config"))

    def block_tensors(self, block: int) -> Mapping[str, TensorInfo]:
        """The tensors of one block; keys are names inside the block (``mlp.up_proj.weight``)."""
        if block not in self._blocks:
            raise CheckpointError(f"{self.name} has no block {block}")
        return self._blocks[block]

    def block_bytes(self, block: int, dtype: str | None = None) -> int:
        """Size of one block's tensors, as stored or converted to ``dtype``."""
        return sum(
            info.size_bytes if dtype is None else prod(info.shape) * ITEM_BYTES[dtype]
            for info in self.block_tensors(block).values()
        )

    def client_tensors(self) -> Mapping[str, TensorInfo]:
        """Everything outside of the blocks, by full name: embeddings, final norm, head."""
        return {name: info for name, info in self.tensors.items() if not _BLOCK_NAME.match(name)}

    def read_into(self, info: TensorInfo, buffer: memoryview) -> None:
        """Fill ``buffer`` (``info.size_bytes`` writable bytes) with the tensor's bytes."""
        try:
            with info.file.open("rb", buffering=0) as stream:
                stream.seek(info.offset)
                filled = 0
                while filled < info.size_bytes:
                    count = stream.readinto(buffer[filled:])
                    if not count:
                        raise CheckpointError(f"checkpoint incomplete: {info.file} is cut short")
                    filled += count
        except OSError as error:
            raise CheckpointError(f"cannot read {info.file}: {error.strerror}") from error

    @cached_property
    def revision(self) -> bytes:
        """32 bytes that identify the model among honest peers, in milliseconds for any size.

        SHA-256 over the configuration (without what does not change the result) and over name,
        dtype, shape and three samples of 4 KiB of each tensor. It does not depend on how tensors
        are spread over files. It identifies, it does not verify: a signed manifest does that.
        """
        config = {k: v for k, v in self.config.items() if k not in _CONFIG_KEYS_WITHOUT_MEANING}
        digest = hashlib.sha256(b"sovereign-swarm revision 1\n")
        digest.update(json.dumps(config, sort_keys=True).encode())
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(json.dumps([name, info.dtype, info.shape]).encode())
            for sample in _read_samples(info):
                digest.update(hashlib.sha256(sample).digest())
        return digest.digest()

    def _integer(self, key: str, maximum: int) -> int:
        value = self.text_config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= maximum:
            raise CheckpointError(f"{self.path / 'config.json'} has no usable {key}: {value!r}")
        return value


def _read_samples(info: TensorInfo) -> Iterable[bytes]:
    last = max(0, info.size_bytes - _SAMPLE_BYTES)
    with info.file.open("rb", buffering=0) as stream:
        for start in (0, last // 2, last):
            stream.seek(info.offset + start)
            yield stream.read(min(_SAMPLE_BYTES, info.size_bytes - start))


def _read_json(file: Path, maximum_bytes: int) -> Any:
    try:
        with file.open("rb") as stream:
            content = stream.read(maximum_bytes + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint incomplete: {file} is missing") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    if len(content) > maximum_bytes:
        raise CheckpointError(f"{file} is larger than {maximum_bytes} bytes")
    return _parse_json(content, file)


def _parse_json(content: bytes, file: Path) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint damaged: {file} is no valid JSON") from error


def _weight_files(directory: Path) -> dict[Path, set[str]]:
    """The safetensors files, each with the names of the tensors that the index expects in it."""
    index_file = directory / "model.safetensors.index.json"
    single_file = directory / "model.safetensors"
    if not index_file.exists():
        if not single_file.exists():
            raise CheckpointError(
                f"checkpoint incomplete: {directory} has neither {single_file.name} nor "
                f"{index_file.name}"
            )
        return {single_file: set()}
    index = _read_json(index_file, _MAX_INDEX_BYTES)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"checkpoint damaged: {index_file} has no weight_map")
    files: dict[Path, set[str]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(f"checkpoint damaged: {index_file} points outside: {file_name!r}")
        files.setdefault(directory / file_name, set()).add(name)
    return files


def _read_header(file: Path) -> dict[str, TensorInfo]:
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
    header = _parse_json(content, file)
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
    dtype = _SAFETENSORS_DTYPES.get(str(entry.get("dtype")))
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
