"""Adapters on disk in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Whatever is read here may come from a stranger. Nothing is loaded that was not checked before: the
header of the file, names by an allow-list, ranks against the configuration, shapes against the
model, that all numbers are finite. Knows nothing of torch; what a node makes of it:
``swarm.node.engine.adapters``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from swarm.catalogue.checked_safetensors import SafetensorsFile, StoredTensor
from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.peft_config import PeftLoraConfig, lora_config, read_peft_json
from swarm.protocol.adapter_index import (
    MODULE_NAME,
    AdapterIndex,
    ModuleSpec,
    TensorSpec,
    check_index,
)
from swarm.protocol.errors import AdapterError, DecodeError
from swarm.protocol.messages import REVISION_BYTES
from swarm.protocol.tensors import DType

WEIGHTS_NAME = "adapter_model.safetensors"
REVISION_KEY = "base_model_revision"
"""In the metadata of the file: the revision of the model, in hexadecimal. PEFT ignores it."""

TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<path>(?:model\.|language_model\.model\.|model\.language_model\.)"
    rf"layers\.(?P<block>\d{{1,4}})\.(?P<module>{MODULE_NAME.pattern}))"
    r"\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.ckpt")
_EXPONENTS: dict[DType, tuple[str, int]] = {
    DType.FLOAT32: ("<u4", 0x7F800000),
    DType.FLOAT16: ("<u2", 0x7C00),
    DType.BFLOAT16: ("<u2", 0x7F80),
}


def is_finite(dtype: DType, data: bytes | bytearray) -> bool:
    """Whether none of the numbers is NaN or infinite: their exponents are not all ones."""
    kind, exponent = _EXPONENTS[dtype]
    values = np.frombuffer(data, kind)
    return not bool(np.equal(values & exponent, exponent).any())


@dataclass(frozen=True, slots=True)
class _StoredModule:
    path: str
    """In the whole model, as the configuration's patterns see it."""
    parts: dict[str, StoredTensor]


@dataclass(frozen=True)
class AdapterFiles:
    """A directory that holds a LoRA or DoRA adapter."""

    directory: Path
    config: PeftLoraConfig
    file: SafetensorsFile
    _modules: Mapping[tuple[int, str], _StoredModule]
    catalogue_name: str = ""
    """``NAME@REVISION``, when it came from the catalogue."""

    @classmethod
    def open(cls, directory: str | Path) -> AdapterFiles:
        """Check configuration and header. Raises AdapterError that says what is wrong."""
        path = Path(directory)
        config = lora_config(read_peft_json(path))
        file = open_weights(path, TENSOR_NAME)
        modules: dict[tuple[int, str], _StoredModule] = {}
        matches = ((TENSOR_NAME.fullmatch(name), tensor) for name, tensor in file.tensors.items())
        for match, tensor in matches:
            if match is None:
                continue  # not possible: the header was checked against these names
            place = (int(match["block"]), match["module"])
            module = modules.setdefault(place, _StoredModule(match["path"], {}))
            part = match["part"].removesuffix(".weight")
            if part in module.parts or module.path != match["path"]:
                raise AdapterError(f"block {place[0]}, {place[1]}: {part} stands twice")
            module.parts[part] = tensor
        if not modules:
            raise AdapterError(f"{file.path.name} has no tensors")
        for module in modules.values():
            _check_parts(config, module.path, module.parts)
        return cls(path, config, file, modules)

    @property
    def base_model(self) -> str:
        """As its author calls the model; may be empty."""
        return self.config.base_model

    @property
    def model_revision(self) -> bytes:
        """Of the model that the adapter was made for; empty when the file does not say."""
        return revision_in(self.file)

    @cached_property
    def index(self) -> AdapterIndex:
        """Reads and hashes all tensors. Raises AdapterError, also for numbers that are none."""
        modules = []
        for block, name in sorted(self._modules):
            path, parts = self._modules[block, name].path, self._modules[block, name].parts
            magnitude = parts.get("lora_magnitude_vector")
            modules.append(
                ModuleSpec(
                    block,
                    name,
                    self.config.scaling_of(path),
                    self._spec(parts["lora_A"]),
                    self._spec(parts["lora_B"]),
                    None if magnitude is None else self._spec(magnitude),
                )
            )
        index = AdapterIndex(self.model_revision, tuple(modules))
        try:
            check_index(index)
        except DecodeError as error:
            raise AdapterError(error.detail) from None
        return index

    @property
    def adapter_id(self) -> bytes:
        return self.index.adapter_id

    def read(self, module: ModuleSpec) -> list[bytes]:
        """The bytes of the module's tensors, in the order of ``ModuleSpec.tensors``."""
        parts = self._modules[module.block, module.name].parts
        names = ("lora_A", "lora_B", "lora_magnitude_vector")
        return [self.file.read(parts[name]) for name in names if name in parts]

    def _spec(self, tensor: StoredTensor) -> TensorSpec:
        data = self.file.read(tensor)
        if not is_finite(tensor.dtype, data):
            raise AdapterError(f"{tensor.name} holds numbers that are not finite")
        return TensorSpec(tensor.dtype, tensor.shape, self.file.sha256(tensor))


def revision_in(file: SafetensorsFile) -> bytes:
    """The model's revision in the metadata of a file; may be empty. Raises AdapterError."""
    text = file.metadata.get(REVISION_KEY, "")
    try:
        revision = bytes.fromhex(text)
    except ValueError:
        revision = b"?"
    if len(revision) not in (0, REVISION_BYTES):
        raise AdapterError(f"{REVISION_KEY} is no revision of a model: {text[:80]!r}")
    return revision


def open_weights(directory: Path, allowed_name: re.Pattern[str]) -> SafetensorsFile:
    """The weights of a PEFT adapter; anything but safetensors is refused. Raises AdapterError."""
    path = directory / WEIGHTS_NAME
    if not path.exists():
        for name in _PICKLES:
            if (directory / name).exists():
                raise AdapterError(
                    f"{name} is a pickle, which may run code when it is loaded; save the adapter "
                    f"as {WEIGHTS_NAME} (PEFT's default)"
                )
        raise AdapterError(f"{directory} is no adapter: it has no {WEIGHTS_NAME}")
    return SafetensorsFile.open(path, allowed_name)


def _check_parts(config: PeftLoraConfig, path: str, parts: Mapping[str, StoredTensor]) -> None:
    """Complete, of the configured rank, and a place where PEFT would put an adapter too."""
    wanted = {"lora_A", "lora_B"}
    if config.use_dora:
        wanted.add("lora_magnitude_vector")
    if parts.keys() != wanted:
        raise AdapterError(f"{path} has {sorted(parts)} where {sorted(wanted)} belong")
    if any(
        len(tensor.shape) != (1 if part == "lora_magnitude_vector" else 2)
        for part, tensor in parts.items()
    ):
        raise AdapterError(f"{path}: tensors of a wrong number of dimensions")
    rank = config.rank_of(path)
    a, b = parts["lora_A"].shape, parts["lora_B"].shape
    if a[0] != rank or b[1] != rank:
        raise AdapterError(
            f"{path}: A {list(a)} and B {list(b)} are not of the configured rank {rank}"
        )
    if not config.targets(path):
        raise AdapterError(f"{path} is not among the configured target modules")


def check_fits(
    index: AdapterIndex,
    checkpoint: Checkpoint,
    *,
    blocks: range | None = None,
) -> None:
    """Raises AdapterError unless every module is one of the model's linear layers, shape by shape.

    ``blocks`` are those to be looked at; None: all.
    """
    if index.model_revision and index.model_revision != checkpoint.revision:
        raise AdapterError(
            "the adapter was made for another model, or another revision of it: "
            f"{index.model_revision.hex()[:16]}… and not {checkpoint.revision.hex()[:16]}…"
        )
    for module in index.modules:
        if blocks is not None and module.block not in blocks:
            continue
        where = f"block {module.block}, {module.name}"
        if module.block >= checkpoint.number_of_blocks:
            raise AdapterError(
                f"{where}: the model has {checkpoint.number_of_blocks} blocks only; "
                "the adapter is for another one"
            )
        layer = checkpoint.block_tensors(module.block).get(f"{module.name}.weight")
        if layer is None or len(layer.shape) != 2:
            raise AdapterError(f"{where}: the model has no such linear layer")
        if layer.shape != (module.out_features, module.in_features):
            raise AdapterError(
                f"{where}: made for a layer {[module.out_features, module.in_features]}, the "
                f"model's is {list(layer.shape)}; the adapter is for another model"
            )
