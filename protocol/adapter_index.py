"""The index of an adapter: what it changes in which block, tensor by tensor with their SHA-256.

The SHA-256 of the index's bytes is the adapter's *id*: sessions, nodes and manifests name an
adapter by it. Since each tensor has its own hash, a node takes only those of its blocks, from
whomever, and still knows that it has the adapter that was named.

An adapter adds ``scaling * B A x`` to the output of a linear layer (LoRA, arXiv 2106.09685), with a
magnitude per output where it is a DoRA (arXiv 2402.09353). How PEFT's files become an index:
``swarm.catalogue.adapter``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from math import prod

from swarm.protocol.bounded_json import parse_json
from swarm.protocol.errors import DecodeError, ErrorCode
from swarm.protocol.messages import DIGEST_BYTES, MAX_BLOCKS, REVISION_BYTES
from swarm.protocol.tensors import ITEM_BYTES, DType

ADAPTER_ID_BYTES = DIGEST_BYTES
MAX_INDEX_BYTES = 512 * 1024
MAX_ADAPTER_BYTES = 512 * 1024 * 1024
"""All tensors of one adapter."""
MAX_MODULES = 4096
MAX_RANK = 1024
MAX_FEATURES = 1 << 20
MAX_SCALING = 4096.0
MODULE_NAME = re.compile(r"(?:self_attn|mlp)\.[a-z0-9_]{1,32}")
"""A linear layer inside a decoder block, as transformers and PEFT name it."""

_FORMAT = "sovereign-swarm adapter 1"
_DEPTH = 6


@dataclass(frozen=True, slots=True)
class TensorSpec:
    dtype: DType
    shape: tuple[int, ...]
    sha256: bytes
    """Of the elements, row-major and little endian."""

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """What is added to one linear layer ``[out, in]`` of one block."""

    block: int
    name: str
    scaling: float
    a: TensorSpec
    """``[rank, in]``."""
    b: TensorSpec
    """``[out, rank]``."""
    magnitude: TensorSpec | None = None
    """DoRA: ``[out]``."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def in_features(self) -> int:
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        return self.b.shape[0]

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """A, B and, if there is one, the magnitude."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)


@dataclass(frozen=True)
class AdapterIndex:
    """All modules, ordered by block and name. ``model_revision`` is empty when it is not known."""

    model_revision: bytes
    modules: tuple[ModuleSpec, ...]

    @cached_property
    def encoded(self) -> bytes:
        """The bytes that the id is the hash of."""
        value = {
            "format": _FORMAT,
            "model_revision": self.model_revision.hex(),
            "modules": [
                [
                    module.block,
                    module.name,
                    float(module.scaling),
                    [
                        [tensor.dtype.name, list(tensor.shape), tensor.sha256.hex()]
                        for tensor in module.tensors
                    ],
                ]
                for module in self.modules
            ],
        }
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def adapter_id(self) -> bytes:
        return hashlib.sha256(self.encoded).digest()

    def of_blocks(self, first_block: int, end_block: int) -> tuple[ModuleSpec, ...]:
        """The modules of blocks ``[first_block, end_block)``."""
        return tuple(module for module in self.modules if first_block <= module.block < end_block)

    @property
    def size_bytes(self) -> int:
        return size_bytes(self.modules)

    @property
    def rank(self) -> int:
        """The highest."""
        return max((module.rank for module in self.modules), default=0)


def size_bytes(modules: tuple[ModuleSpec, ...]) -> int:
    return sum(tensor.size_bytes for module in modules for tensor in module.tensors)


def check_index(index: AdapterIndex) -> None:
    """Raises DecodeError unless order, names, shapes and sizes are within all bounds."""
    if len(index.model_revision) not in (0, REVISION_BYTES):
        raise _bad("a model revision has 32 bytes")
    if not 1 <= len(index.modules) <= MAX_MODULES:
        raise _bad(f"{len(index.modules)} modules; an adapter has 1 to {MAX_MODULES}")
    places = [(module.block, module.name) for module in index.modules]
    if places != sorted(set(places)):
        raise _bad("modules are out of order, or one stands twice")
    for module in index.modules:
        where = f"block {module.block}, {module.name}"
        if not 0 <= module.block < MAX_BLOCKS or not MODULE_NAME.fullmatch(module.name):
            raise _bad(f"no such module in a decoder: {where}")
        if not math.isfinite(module.scaling) or abs(module.scaling) > MAX_SCALING:
            raise _bad(f"{where}: scaling {module.scaling} is beyond {MAX_SCALING:.0f}")
        shapes = [tensor.shape for tensor in module.tensors]
        if [len(shape) for shape in shapes] != [2, 2, 1][: len(shapes)]:
            raise _bad(f"{where}: shapes {shapes}")
        sizes = [size for shape in shapes for size in shape]
        if not all(0 < size <= MAX_FEATURES for size in sizes):
            raise _bad(f"{where}: shapes {shapes}")
        if not 1 <= module.rank <= MAX_RANK:
            raise _bad(f"{where}: rank {module.rank}; 1 to {MAX_RANK} are allowed")
        if module.b.shape[1] != module.rank:
            raise _bad(f"{where}: A is of rank {module.rank} and B of {module.b.shape[1]}")
        if module.magnitude is not None and module.magnitude.shape != (module.out_features,):
            raise _bad(f"{where}: a magnitude {module.magnitude.shape}")
    if index.size_bytes > MAX_ADAPTER_BYTES:
        raise DecodeError(
            ErrorCode.TOO_LARGE,
            f"{index.size_bytes} bytes of tensors; at most {MAX_ADAPTER_BYTES} are allowed",
        )


def decode_index(data: bytes) -> AdapterIndex:
    """Read and check an index of a stranger. Raises DecodeError, whatever the bytes."""
    value = parse_json(data, maximum_bytes=MAX_INDEX_BYTES, maximum_depth=_DEPTH)
    try:
        if value["format"] != _FORMAT or len(value) != 3:
            raise _bad("of another format")
        index = AdapterIndex(
            bytes.fromhex(value["model_revision"]), tuple(map(_read_module, value["modules"]))
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _bad(f"malformed: {error!r}") from None
    check_index(index)
    if index.encoded != data:
        raise _bad("not in the one form that an index has")
    return index


def _read_module(value: object) -> ModuleSpec:
    match value:
        case [block, str(name), float(scaling), [a, b, *rest]] if (
            type(block) is int and len(rest) <= 1
        ):
            magnitude = _read_tensor(rest[0]) if rest else None
            return ModuleSpec(block, name, scaling, _read_tensor(a), _read_tensor(b), magnitude)
    raise ValueError("a module is block, name, scaling and two or three tensors")


def _read_tensor(value: object) -> TensorSpec:
    match value:
        case [str(dtype), [*sizes], str(digest)]:
            sha256 = bytes.fromhex(digest)
            shape = tuple(size for size in sizes if type(size) is int)
            if len(sha256) == DIGEST_BYTES and len(shape) == len(sizes):
                return TensorSpec(DType[dtype], shape, sha256)
    raise ValueError("a tensor is dtype, shape and SHA-256")


def _bad(text: str) -> DecodeError:
    return DecodeError(ErrorCode.BAD_FIELD, f"adapter: {text}")
