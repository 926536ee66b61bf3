"""The two ends of a model that stay with the client: embeddings below, final norm and head above.

Token ids never leave this process; only activations do. The modules are those of the model's own
family in transformers, built with no decoder layer at all, so that scaled embeddings and the like
come out right without a line per family.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from swarm.catalogue.checkpoint import Checkpoint
from swarm.compute.packed_linear import pack_linears
from swarm.protocol.errors import CheckpointError, ConfigError
from swarm.protocol.tensors import DType

SUPPORTED_FAMILIES = ("gemma3_text", "llama", "mistral", "mixtral", "qwen2", "qwen3")

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIRE_DTYPES = {
    torch.float32: DType.FLOAT32,
    torch.bfloat16: DType.BFLOAT16,
    torch.float16: DType.FLOAT16,
}


class ModelEnds(nn.Module):
    """Embeddings, final norm and head of one model, in one dtype on one device."""

    def __init__(self, config: PretrainedConfig, hollow_model: nn.Module) -> None:
        """``hollow_model`` is the family's causal language model without decoder layers."""
        super().__init__()
        base: Any = hollow_model.get_decoder()  # type: ignore[operator]
        self.config = config
        self.embedding: nn.Module = base.embed_tokens
        self.norm: nn.Module = base.norm
        self.head: nn.Module = hollow_model.lm_head  # type: ignore[assignment]
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        weight: torch.Tensor = base.embed_tokens.weight
        self.dtype, self.device = weight.dtype, weight.device

    @classmethod
    def load(cls, checkpoint: Checkpoint, *, dtype: str = "auto", device: str = "cpu") -> ModelEnds:
        """Read only the tensors of the two ends.

        ``dtype`` is ``auto`` (the checkpoint's), ``float32`` or ``bfloat16``. Raises CheckpointError
        when the family is not supported or tensors are missing, ConfigError for other dtypes.
        """
        config = read_config(checkpoint.path)
        ends = cls.from_tensors(
            config, checkpoint.client_tensors(), dtype=choose_dtype(config, dtype, device)
        )
        ends = ends.to(device)
        if device == "cpu":
            pack_linears(ends)
        return ends

    @classmethod
    def from_tensors(
        cls, config: PretrainedConfig, tensors: dict[str, torch.Tensor], *, dtype: torch.dtype
    ) -> ModelEnds:
        """Build from tensors under the names that the family uses (``model.embed_tokens.weight``)."""
        hollow_config = copy.deepcopy(config)
        hollow_config.num_hidden_layers = 0
        if getattr(hollow_config, "layer_types", None) is not None:
            hollow_config.layer_types = []
        family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        hollow_model, report = family.from_pretrained(
            None, config=hollow_config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):
            raise CheckpointError(
                f"the checkpoint lacks {', '.join(missing)}; download the model again"
            )
        return cls(config, hollow_model.eval().requires_grad_(False))

    @torch.no_grad()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """``[rows, tokens]`` ids to ``[rows, tokens, hidden]`` activations for block 0."""
        embedded: torch.Tensor = self.embedding(token_ids)
        return embedded

    @torch.no_grad()
    def logits(self, activations: torch.Tensor) -> torch.Tensor:
        """``[rows, tokens, hidden]`` out of the last block to ``[rows, tokens, vocabulary]``."""
        logits: torch.Tensor = self.head(self.norm(activations))
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    @property
    def wire_dtype(self) -> DType:
        return WIRE_DTYPES[self.dtype]


def read_config(checkpoint_path: Path) -> PretrainedConfig:
    """The text model's configuration. Raises CheckpointError."""
    try:
        config = AutoConfig.from_pretrained(checkpoint_path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the model's config.json: {error}") from error
    config = config.get_text_config()
    if config.model_type not in SUPPORTED_FAMILIES:
        raise CheckpointError(
            f"models of the family {config.model_type!r} are not supported; "
            f"supported are {', '.join(SUPPORTED_FAMILIES)}"
        )
    return config


def choose_dtype(config: PretrainedConfig, dtype: str, device: str) -> torch.dtype:
    """What ``auto`` means. fp16 on a CPU becomes fp32: there it is slow and overflows."""
    if dtype == "auto":
        declared = getattr(config, "dtype", None)
        chosen = declared if declared in WIRE_DTYPES else torch.float32
    elif dtype in TORCH_DTYPES:
        chosen = TORCH_DTYPES[dtype]
    else:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose auto, float32 or bfloat16")
    return torch.float32 if chosen is torch.float16 and device == "cpu" else chosen
