"""Prompt-tuning adapters in PEFT's format: embeddings of virtual tokens before every prompt.

They change nothing on the nodes: clients send them ahead of prompts (``client.prefixed_chain``).
arXiv 2104.08691. Checked like every adapter, see ``adapter``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from swarm.catalogue.adapter import (
    AdapterFiles,
    check_fits,
    is_finite,
    open_weights,
    revision_in,
)
from swarm.catalogue.checked_safetensors import SafetensorsFile, StoredTensor
from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.peft_config import read_peft_json
from swarm.protocol.errors import AdapterError
from swarm.protocol.tensors import WireTensor

PROMPT_NAME = "prompt_embeddings"
MAX_VIRTUAL_TOKENS = 1024
_INERT: tuple[object, ...] = (None, False, "none", [], {})
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "num_attention_heads",
        "num_layers",
        "peft_type",
        "peft_version",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "revision",
        "task_type",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)
"""How they were trained; and ``num_virtual_tokens`` and the like, which are read."""


@dataclass(frozen=True)
class PromptFiles:
    """A directory that holds a prompt-tuning adapter."""

    directory: Path
    base_model: str
    file: SafetensorsFile
    tensor: StoredTensor
    catalogue_name: str = ""

    @classmethod
    def open(cls, directory: Path, config: Mapping[str, Any]) -> PromptFiles:
        """Check everything. Raises AdapterError that says what is wrong."""
        for key, setting in config.items():
            known = key in _WITHOUT_EFFECT or key in ("num_virtual_tokens", "token_dim")
            if key == "num_transformer_submodules" and setting in (None, 1):
                continue
            if not known and setting not in _INERT:
                raise AdapterError(f"the setting {key} = {str(setting)[:60]!r} is not supported")
        file = open_weights(directory, re.compile(PROMPT_NAME))
        tensor = file.tensors.get(PROMPT_NAME)
        if tensor is None or len(tensor.shape) != 2:
            raise AdapterError(f"{file.path.name} has no {PROMPT_NAME} of two dimensions")
        tokens = config.get("num_virtual_tokens")
        if tokens != tensor.shape[0] or not 1 <= tensor.shape[0] <= MAX_VIRTUAL_TOKENS:
            raise AdapterError(
                f"{tensor.shape[0]} virtual tokens, and {tokens} by the configuration; "
                f"at most {MAX_VIRTUAL_TOKENS} are allowed"
            )
        if not is_finite(tensor.dtype, file.read(tensor)):
            raise AdapterError(f"{PROMPT_NAME} holds numbers that are not finite")
        base_model = str(config.get("base_model_name_or_path") or "")[:256]
        return cls(directory, base_model, file, tensor)

    @property
    def model_revision(self) -> bytes:
        """Of the model that it was made for; empty when the file does not say."""
        return revision_in(self.file)

    @property
    def virtual_tokens(self) -> int:
        return self.tensor.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.tensor.shape[1]

    @cached_property
    def adapter_id(self) -> bytes:
        """Names it in catalogues; nodes never see it."""
        text = f"sovereign-swarm prompt 1\n{self.tensor.dtype.name} {list(self.tensor.shape)}\n"
        return hashlib.sha256(text.encode() + self.file.sha256(self.tensor)).digest()

    def embeddings(self) -> WireTensor:
        """``[1, virtual tokens, hidden]`` as stored."""
        shape = (1, self.virtual_tokens, self.hidden_size)
        return WireTensor(self.tensor.dtype, shape, self.file.read(self.tensor))


AnyAdapter = AdapterFiles | PromptFiles


def open_any_adapter(directory: str | Path) -> AnyAdapter:
    """An adapter of whichever kind. Raises AdapterError that says what is wrong."""
    config = read_peft_json(Path(directory))
    if config.get("peft_type") == "PROMPT_TUNING":
        return PromptFiles.open(Path(directory), config)
    return AdapterFiles.open(directory)


def check_fits_model(files: AnyAdapter, checkpoint: Checkpoint) -> None:
    """Raises AdapterError unless the adapter is one for this model."""
    if isinstance(files, AdapterFiles):
        check_fits(files.index, checkpoint)
        return
    if files.model_revision not in (b"", checkpoint.revision):
        raise AdapterError("the adapter was made for another model, or another revision of it")
    if files.hidden_size != checkpoint.hidden_size:
        raise AdapterError(
            f"virtual tokens of {files.hidden_size} numbers, the model's have "
            f"{checkpoint.hidden_size}; the adapter is for another model"
        )
