"""A model's checkpoint directory: where it is, which tensors it has, which belong to which block.

Reads ``config.json`` and the headers of the safetensors files; knows nothing of torch. How tensors
become modules: ``swarm.node.engine.span_loader`` and ``swarm.client.model``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from swarm.catalogue.hashed_parts import HashedParts, config_digest, hashed_parts
from swarm.catalogue.resolve import models_directory, resolve_checkpoint
from swarm.catalogue.safetensors_file import TensorInfo, header_for, read_header, read_json
from swarm.protocol.errors import CheckpointError
from swarm.protocol.manifest import (
    ITEM_BYTES,
    MAX_MANIFEST_BYTES,
    Manifest,
    ManifestError,
    Part,
    parse_manifest,
)

__all__ = ["Checkpoint", "TensorInfo", "models_directory", "resolve_checkpoint"]

MANIFEST_FILE = "manifest.json"
_MAX_CONFIG_BYTES = 4 * 1024 * 1024
_MAX_INDEX_BYTES = 64 * 1024 * 1024
_MAX_BLOCKS = 1024
_BLOCK_NAME = re.compile(
    r"^(?:model\.|language_model\.model\.|model\.language_model\.)layers\.(\d{1,5})\.(.+)$"
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory: the configuration and a table of all tensors."""

    path: Path
    config: Mapping[str, Any]
    """``config.json`` as it is."""
    tensors: Mapping[str, TensorInfo]
    blocks: Mapping[int, Mapping[str, TensorInfo]] = field(repr=False)
    """The tensors of each block; keys are names inside the block."""
    manifest: Manifest | None = None
    """By which the directory was fetched; parts of it may still be missing on disk."""

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read configuration and headers, no weights. Raises CheckpointError in plain words."""
        directory = Path(path)
        config = read_json(directory / "config.json", _MAX_CONFIG_BYTES)
        if not isinstance(config, dict):
            raise CheckpointError(f"{directory / 'config.json'} is no JSON object")
        manifest = read_manifest(directory)
        if manifest is not None:
            return cls._described(directory, config, manifest)
        tensors: dict[str, TensorInfo] = {}
        for file, expected in _weight_files(directory).items():
            found = read_header(file)
            missing = sorted(expected - found.keys())
            if missing:
                raise CheckpointError(
                    f"checkpoint incomplete: {file} lacks {len(missing)} tensors that the index "
                    f"lists ({missing[0]}, ...)"
                )
            tensors.update(found)
        return _whole(cls(directory, config, tensors, _by_block(tensors)))

    @classmethod
    def _described(
        cls, directory: Path, config: Mapping[str, Any], manifest: Manifest
    ) -> Checkpoint:
        if config_digest(config) != manifest.config_digest:
            raise CheckpointError(f"{directory}: config.json is not that of the manifest")
        tensors = {
            info.name: info for part in manifest.parts for info in part_tensors(directory, part)
        }
        return _whole(cls(directory, config, tensors, _by_block(tensors), manifest))

    @property
    def name(self) -> str:
        """As its manifest says; else the directory's, or the model's in the Hugging Face cache."""
        if self.manifest is not None:
            return self.manifest.name
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
        for info in (info for block in self.blocks.values() for info in block.values()):
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.size_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def is_quantized(self) -> bool:
        return bool(self.config.get("quantization_config"))

    def block_tensors(self, block: int) -> Mapping[str, TensorInfo]:
        """The tensors of one block; keys are names inside the block (``mlp.up_proj.weight``)."""
        if block not in self.blocks:
            raise CheckpointError(f"{self.name} has no block {block}")
        return self.blocks[block]

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
        """32 bytes that identify configuration and weights (``swarm.protocol.manifest``).

        For a directory with a manifest it is the manifest's. Otherwise all weights are read and
        hashed, about 1 GB/s and core, once: the hashes are kept until a file changes. It does not
        depend on how tensors are spread over files.
        """
        return self.parts.revision

    @cached_property
    def parts(self) -> HashedParts:
        """The tensors as parts of a manifest, with the hashes of their chunks."""
        if self.manifest is not None:
            return HashedParts.of_manifest(self.manifest)
        return hashed_parts(self.path, self.config, self.tensors, block_of_tensor)

    def _integer(self, key: str, maximum: int) -> int:
        value = self.text_config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= maximum:
            raise CheckpointError(f"{self.path / 'config.json'} has no usable {key}: {value!r}")
        return value


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
    index = read_json(index_file, _MAX_INDEX_BYTES)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"checkpoint damaged: {index_file} has no weight_map")
    files: dict[Path, set[str]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(f"checkpoint damaged: {index_file} points outside: {file_name!r}")
        files.setdefault(directory / file_name, set()).add(name)
    return files


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest that lies in a fetched directory, or None. Raises CheckpointError."""
    file = directory / MANIFEST_FILE
    try:
        with file.open("rb") as stream:
            return parse_manifest(stream.read(MAX_MANIFEST_BYTES + 1))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except ManifestError as error:
        raise CheckpointError(f"{file} is no valid manifest: {error.detail}") from error


def part_tensors(directory: Path, part: Part) -> list[TensorInfo]:
    """Where the tensors of a fetched part lie, or will lie, in the file of the part."""
    offset = len(header_for(part.tensors))
    infos = []
    for tensor in part.tensors:
        size_bytes = tensor.size_bytes
        infos.append(
            TensorInfo(
                tensor.name, directory / part.name, tensor.dtype, tensor.shape, offset, size_bytes
            )
        )
        offset += size_bytes
    return infos


def block_of_tensor(name: str) -> int | None:
    """The block that a tensor belongs to by its full name; None for those of no block."""
    match = _BLOCK_NAME.match(name)
    return int(match[1]) if match else None


def _by_block(tensors: Mapping[str, TensorInfo]) -> dict[int, dict[str, TensorInfo]]:
    blocks: dict[int, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        match = _BLOCK_NAME.match(name)
        if match:
            blocks.setdefault(int(match[1]), {})[match[2]] = info
    return blocks


def _whole(checkpoint: Checkpoint) -> Checkpoint:
    for block in range(checkpoint.number_of_blocks):
        if block not in checkpoint.blocks:
            raise CheckpointError(
                f"checkpoint incomplete: {checkpoint.path} has no tensors for block {block} of "
                f"{checkpoint.number_of_blocks}"
            )
    return checkpoint
