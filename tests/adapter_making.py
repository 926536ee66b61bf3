"""Random adapters, made by PEFT itself on a copy of a tiny model."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
PHI3_LINEAR = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def make_adapter(
    model: Any, directory: Path, *, seed: int = 1, std: float = 0.3, **settings: Any
) -> Any:
    """Save a random LoRA adapter as PEFT does; returns the ``PeftModel`` with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

        settings = {"r": 4, "lora_alpha": 8, "target_modules": list(ALL_LINEAR), **settings}
        torch.manual_seed(seed)
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**settings)).eval()
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" not in name:
                    continue
                if "magnitude" in name:
                    parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
                else:
                    parameter.normal_(std=std)
        adapted.save_pretrained(str(directory))
    return adapted


def peft_logits(adapted: Any, tokens: torch.Tensor) -> torch.Tensor:
    """``[rows, tokens, vocabulary]`` of the whole model by PEFT alone."""
    with torch.no_grad():
        logits: torch.Tensor = adapted(tokens, use_cache=False).logits
    return logits
