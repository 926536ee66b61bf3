"""The two ends of a model that stay with the client: embeddings below, final norm and head above.

Token ids never leave this process; only activations do. The modules are those of the model's own
family in transformers, built with no decoder layer at all, so that scaled embeddings and the like
come out right without a line per family.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from swarm.catalogue.checkpoint import Checkpoint, TensorInfo
from swarm.client.remote_blocks import ChainOpener, RemoteBlocks
from swarm.compute.devices import choose_device, choose_dtype
from swarm.compute.packed_linear import PackedLinear, pack_linears
from swarm.compute.wire_tensors import WIRE_DTYPES
from swarm.ledger.calibrated import read_limits
from swarm.protocol.errors import CheckpointError
from swarm.protocol.tensors import DType

SUPPORTED_FAMILIES = ("gemma3_text", "llama", "mistral", "mixtral", "qwen2", "qwen3")

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
_MULTIMODAL_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.", ""),
)


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

    @classmethod
    def load(cls, checkpoint: Checkpoint, *, dtype: str = "auto", device: str = "cpu") -> ModelEnds:
        """Read only the tensors of the two ends.

        ``dtype`` is ``auto`` (bfloat16 where the device computes in it), ``float32`` or
        ``bfloat16``. Raises CheckpointError when the family is not supported or tensors are
        missing, ConfigError for unknown dtypes and devices.
        """
        config = read_config(checkpoint.path)
        ends_device = choose_device(device)
        ends = cls.from_tensors(
            config, read_tensors(checkpoint, config), dtype=choose_dtype(dtype, ends_device)
        ).to(ends_device)
        pack_linears(ends)
        if config.tie_word_embeddings and isinstance(ends.head, PackedLinear):
            # Its plain weight is the embeddings, which are here anyway: so several rows get the
            # packed layout as well.
            ends.head.pack(keep_plain=True)
        return ends

    @classmethod
    def from_tensors(
        cls, config: PretrainedConfig, tensors: dict[str, torch.Tensor], *, dtype: torch.dtype
    ) -> ModelEnds:
        """Build from tensors under the family's own names (``model.embed_tokens.weight``)."""
        hollow_config = copy.deepcopy(config)
        hollow_config.num_hidden_layers = 0
        if getattr(hollow_config, "layer_types", None) is not None:
            hollow_config.layer_types = []
        family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with no_progress_bars():
            hollow_model, report = family.from_pretrained(
                None,
                config=hollow_config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
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
    def dtype(self) -> torch.dtype:
        weight: torch.Tensor = self.embedding.weight  # type: ignore[assignment]
        return weight.dtype

    @property
    def device(self) -> torch.device:
        weight: torch.Tensor = self.embedding.weight  # type: ignore[assignment]
        return weight.device


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


def read_generation_config(checkpoint: Checkpoint, config: PretrainedConfig) -> GenerationConfig:
    """The model's own defaults: end of text tokens, and sampling if its makers advise any."""
    try:
        return GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except OSError:
        return GenerationConfig.from_model_config(config)


def read_tensors(checkpoint: Checkpoint, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Embeddings, final norm and (unless tied) head, under the names of the text-only family.

    Raises CheckpointError when one is missing.
    """
    wanted = {EMBEDDING, NORM} if config.tie_word_embeddings else {EMBEDDING, NORM, HEAD}
    found: dict[str, torch.Tensor] = {}
    for full_name, info in checkpoint.client_tensors().items():
        name = _text_only_name(full_name)
        if name in wanted:
            found[name] = read_tensor(checkpoint, info)
    if missing := sorted(wanted - found.keys()):
        raise CheckpointError(
            f"checkpoint incomplete: {checkpoint.path} lacks {', '.join(missing)}"
        )
    return found


def read_tensor(checkpoint: Checkpoint, info: TensorInfo) -> torch.Tensor:
    """One tensor as stored, read straight into its own memory."""
    tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
    view: Any = tensor.view(-1).view(torch.uint8).numpy()
    checkpoint.read_into(info, memoryview(view))
    return tensor


def _text_only_name(name: str) -> str:
    for prefix, replacement in _MULTIMODAL_PREFIXES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Three tensors need no progress bar in the user's terminal."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def remote_blocks(
    client: ChainOpener, checkpoint: Checkpoint, ends: ModelEnds, dtype: str
) -> RemoteBlocks:
    """The blocks between ``ends``; ``dtype`` is what the user asked for.

    With ``auto`` any node will do, and activations travel as bfloat16 (never float16, which their
    outliers overflow). An explicit dtype is taken at its word on the wire and on the nodes, so that
    float32 is exact.
    """
    own = WIRE_DTYPES[ends.dtype]
    return RemoteBlocks(
        client=client,
        model_name=checkpoint.name,
        revision=checkpoint.revision,
        number_of_blocks=checkpoint.number_of_blocks,
        hidden_size=checkpoint.hidden_size,
        wire_dtype=DType.BFLOAT16 if dtype == "auto" else own,
        node_dtype=None if dtype == "auto" else own,
        audit_limits=read_limits(checkpoint.path),
    )
