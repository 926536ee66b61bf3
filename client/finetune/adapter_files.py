"""Writes a trained adapter as PEFT does, so that PEFT, and every node, can read it.

Reading, and the checks of what strangers made, are in ``swarm.catalogue``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from swarm.client.finetune.settings import FinetuneSettings
from swarm.compute.lora import LORA_A, LORA_B, Method, peft_name, split_name
from swarm.protocol.errors import UsageError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
REVISION_KEY = "base_model_revision"
PROMPT = "prompt_embeddings"


def write_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    settings: FinetuneSettings,
    *,
    model_name: str,
    model_type: str,
    model_revision: bytes,
    model_config: Any,
) -> None:
    """``tensors`` are flat, by the names of a state; the optimizer's are left out."""
    if settings.method == "prompt":
        prompt = tensors[PROMPT].reshape(settings.virtual_tokens, -1)
        weights = {PROMPT: prompt}
        config = _prompt_config(settings, prompt.shape[1], model_config)
    else:
        weights = {
            peft_name(name): _shaped(name, tensor, settings.rank)
            for name, tensor in tensors.items()
            if "#" not in name and name != PROMPT
        }
        config = _lora_config(settings, model_type)
    config |= {
        "base_model_name_or_path": model_name,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        "revision": None,
    }
    metadata = {"format": "pt", REVISION_KEY: model_revision.hex()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{WEIGHTS}.unfinished"
        contiguous = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
        save_file(contiguous, unfinished, metadata)
        unfinished.replace(folder / WEIGHTS)
        unfinished = folder / f"{CONFIG}.unfinished"
        unfinished.write_text(json.dumps(config, indent=2, sort_keys=True) + os.linesep)
        unfinished.replace(folder / CONFIG)
    except OSError as error:
        raise UsageError(f"cannot write the adapter to {folder}: {error.strerror}") from error


def _shaped(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    _, _, part = split_name(name)
    if part == LORA_A:
        return tensor.reshape(rank, -1)
    if part == LORA_B:
        return tensor.reshape(-1, rank)
    return tensor.reshape(-1)


def _lora_config(settings: FinetuneSettings, model_type: str) -> dict[str, Any]:
    shape = settings.adapter_shape(model_type)
    return {
        "peft_type": "LORA",
        "r": shape.rank,
        "lora_alpha": int(shape.alpha) if float(shape.alpha).is_integer() else shape.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": sorted(shape.target_modules),
        "use_dora": shape.method is Method.DORA,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _prompt_config(
    settings: FinetuneSettings, hidden_size: int, model_config: Any
) -> dict[str, Any]:
    return {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": settings.virtual_tokens,
        "token_dim": hidden_size,
        "num_layers": model_config.num_hidden_layers,
        "num_attention_heads": model_config.num_attention_heads,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }
