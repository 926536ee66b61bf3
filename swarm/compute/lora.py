"""Low-rank adapters: which linears they change, the names and shapes of their tensors.

One definition for training, serving and files, so that a tensor has one name everywhere. Inside a
block the names are those of PEFT without its prefix; with the prefix of :func:`peft_name` they are
the keys of ``adapter_model.safetensors``.

LoRA (Hu et al. 2021): ``y = W x + alpha / rank * B A x``. DoRA (Liu et al. 2024) also gives every
output a learned magnitude.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum

from swarm.protocol.errors import UsageError

LORA_A = "lora_A.weight"
LORA_B = "lora_B.weight"
MAGNITUDE = "lora_magnitude_vector"
"""As PEFT writes it to files; its modules append ``.weight``."""

_PEFT_PREFIX = "base_model.model."

DEFAULT_TARGETS: Mapping[str, tuple[str, ...]] = {
    "phi3": ("qkv_proj",),
}
"""PEFT's own choice by family; where nothing is said, queries and values."""
_DEFAULT = ("q_proj", "v_proj")


class Method(IntEnum):
    """What is trained at the blocks."""

    NONE = 0
    """Nothing: the blocks only pass gradients on, as for prompt tuning."""
    LORA = 1
    DORA = 2


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What decides names, shapes and the arithmetic of an adapter."""

    method: Method
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    """As in PEFT: a linear is meant whose dotted name is, or ends with, one of these."""

    def __post_init__(self) -> None:
        if self.method is Method.NONE:
            return
        if self.rank < 1:
            raise UsageError("the rank of an adapter is at least 1")
        if not self.target_modules:
            raise UsageError("an adapter changes at least one kind of module")

    @property
    def scaling(self) -> float:
        """The factor of ``B A x``."""
        return self.alpha / self.rank if self.rank else 0.0

    def targets(self, module: str) -> bool:
        """Whether the adapter changes the linear ``module`` (``self_attn.q_proj``)."""
        return self.method is not Method.NONE and is_targeted(module, self.target_modules)

    def tensor_shapes(
        self, linears: Mapping[str, tuple[int, int]]
    ) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shapes of the adapter's tensors for one block.

        ``linears`` are all linears of the block with (outputs, inputs). The result has, for each
        targeted one, ``LORA_A`` ``[rank, inputs]``, ``LORA_B`` ``[outputs, rank]`` and, for DoRA,
        ``MAGNITUDE`` ``[outputs]``.
        """
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for module, (outputs, inputs) in linears.items():
            if not self.targets(module):
                continue
            shapes[module] = {LORA_A: (self.rank, inputs), LORA_B: (outputs, self.rank)}
            if self.method is Method.DORA:
                shapes[module][MAGNITUDE] = (outputs,)
        return shapes


def is_targeted(module: str, target_modules: Iterable[str]) -> bool:
    """PEFT's rule for lists of target modules."""
    return any(module == target or module.endswith(f".{target}") for target in target_modules)


def default_targets(model_type: str) -> tuple[str, ...]:
    """What PEFT adapts in a family when nothing is said."""
    return DEFAULT_TARGETS.get(model_type, _DEFAULT)


def tensor_name(block: int, module: str, part: str) -> str:
    """The name of a tensor within one adapter; ``block`` is the model's number.

    ``tensor_name(3, "self_attn.q_proj", LORA_A)`` is
    ``model.layers.3.self_attn.q_proj.lora_A.weight``.
    """
    return f"model.layers.{block}.{module}.{part}"


def split_name(name: str) -> tuple[int, str, str]:
    """Inverse of :func:`tensor_name`. Raises UsageError."""
    for part in (LORA_A, LORA_B, MAGNITUDE):
        if name.startswith("model.layers.") and name.endswith(f".{part}"):
            block, _, module = name[len("model.layers.") : -len(part) - 1].partition(".")
            if block.isascii() and block.isdigit() and module and str(int(block)) == block:
                return int(block), module, part
    raise UsageError(f"{name!r} is no tensor of an adapter")


def peft_name(name: str) -> str:
    """The key in ``adapter_model.safetensors`` of the tensor with this ``tensor_name``."""
    return _PEFT_PREFIX + name


def name_from_peft(key: str) -> str:
    """Inverse of :func:`peft_name`. Raises UsageError."""
    if not key.startswith(_PEFT_PREFIX):
        raise UsageError(f"{key!r} does not start with {_PEFT_PREFIX}")
    return key.removeprefix(_PEFT_PREFIX)
