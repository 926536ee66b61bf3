"""Which families of models are supported, and how their checkpoints name the tensors of a block.

A family is a module of transformers: its decoder layer, its rotary embedding. Nothing of a family's
computation is written down here.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from swarm.catalogue.checkpoint import Checkpoint
from swarm.node.engine.attention import ATTENTION_NAME
from swarm.protocol.errors import CheckpointError

_STATEFUL_ROPE_TYPES = frozenset({"dynamic", "longrope"})
"""Their frequencies depend on the longest sequence seen, which a ragged batch does not have."""


@dataclass(frozen=True, slots=True)
class Family:
    """``package`` below ``transformers.models`` and the prefix of its classes."""

    package: str
    prefix: str
    rotary_takes_layer_type: bool = False
    names_in_checkpoint: Callable[[str, int], Sequence[str]] | None = None
    """Names that make up a parameter (see ``checkpoint_names``), where they differ from its own."""

    def decoder_layer(self, config: Any, index: int) -> nn.Module:
        layer: nn.Module = getattr(self._module(), f"{self.prefix}DecoderLayer")(config, index)
        return layer

    def rotary_embedding(self, config: Any) -> nn.Module:
        rotary: nn.Module = getattr(self._module(), f"{self.prefix}RotaryEmbedding")(config)
        return rotary

    def _module(self) -> Any:
        # The one file that is needed: importing all of transformers would cost hundreds of MB.
        return importlib.import_module(
            f"transformers.models.{self.package}.modeling_{self.package}"
        )


def _mixtral_names(parameter: str, experts: int) -> Sequence[str]:
    if parameter == "mlp.experts.gate_up_proj":
        return [
            f"block_sparse_moe.experts.{expert}.{part}.weight"
            for expert in range(experts)
            for part in ("w1", "w3")
        ]
    if parameter == "mlp.experts.down_proj":
        return [f"block_sparse_moe.experts.{expert}.w2.weight" for expert in range(experts)]
    return [parameter.replace("mlp.", "block_sparse_moe.", 1)]


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", "Llama"),
    "mistral": Family("mistral", "Mistral"),
    "qwen2": Family("qwen2", "Qwen2"),
    "qwen3": Family("qwen3", "Qwen3"),
    "phi3": Family("phi3", "Phi3"),
    "gemma3_text": Family("gemma3", "Gemma3", rotary_takes_layer_type=True),
    "mixtral": Family("mixtral", "Mixtral", names_in_checkpoint=_mixtral_names),
}


def family_of(checkpoint: Checkpoint) -> Family:
    """Raises CheckpointError when the family, or a setting of it, is not supported."""
    family = FAMILIES.get(checkpoint.model_type)
    if family is None:
        raise CheckpointError(
            f"{checkpoint.name} is of the family {checkpoint.model_type!r}, which is not "
            f"supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    if checkpoint.is_quantized:
        raise CheckpointError(f"{checkpoint.name} is quantized, which is not supported yet")
    rope = json.dumps(
        [checkpoint.text_config.get(key) for key in ("rope_parameters", "rope_scaling")]
    )
    for rope_type in _STATEFUL_ROPE_TYPES:
        if f'"{rope_type}"' in rope:
            raise CheckpointError(
                f"{checkpoint.name} uses rotary embeddings of type {rope_type!r}, which are not "
                "supported yet"
            )
    if checkpoint.text_config.get("use_bidirectional_attention"):
        raise CheckpointError(f"{checkpoint.name} attends in both directions: no decoder")
    return family


def span_config(checkpoint: Checkpoint, first_block: int, end_block: int) -> Any:
    """The family's configuration, cut to a span: block ``first_block`` becomes layer 0."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[checkpoint.model_type].from_dict(dict(checkpoint.text_config))
    blocks = checkpoint.number_of_blocks
    for key, value in vars(config).items():
        # layer_types and its kin; read after the whole model's defaults have been filled in
        if "layer" in key and isinstance(value, (list, tuple)) and len(value) == blocks:
            setattr(config, key, list(value)[first_block:end_block])
    config.num_hidden_layers = end_block - first_block
    config._attn_implementation = ATTENTION_NAME  # noqa: SLF001 (transformers' documented way)
    return config


def layer_types(config: Any) -> Sequence[str]:
    """The attention type of each layer of ``config``."""
    types = getattr(config, "layer_types", None)
    return list(types) if types else ["full_attention"] * config.num_hidden_layers


def checkpoint_names(family: Family, parameter: str, shape: torch.Size) -> Sequence[str]:
    """Names, inside a block of the checkpoint, whose tensors make up ``parameter``.

    One name is the tensor itself. Several are stacked in their order along the first axes: their
    bytes, one after the other, are the parameter's.
    """
    if family.names_in_checkpoint is None:
        return [parameter]
    return family.names_in_checkpoint(parameter, shape[0])
