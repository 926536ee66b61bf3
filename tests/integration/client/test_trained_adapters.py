"""What ``swarm finetune`` writes is what nodes and clients serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swarm.catalogue.adapter import AdapterFiles
from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.prompt_adapter import PromptFiles, check_fits_model, open_any_adapter
from swarm.client.finetune.adapter_files import PROMPT, write_adapter
from swarm.client.finetune.settings import FinetuneSettings
from swarm.compute.lora import LORA_A, LORA_B, MAGNITUDE, tensor_name
from swarm.protocol.errors import AdapterError

RANK, ALPHA = 4, 6.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return Checkpoint.open(folder)


def write(folder: Path, checkpoint: Checkpoint, method: str, tensors: Any) -> None:
    write_adapter(
        folder,
        tensors,
        FinetuneSettings(
            method=method, rank=RANK, alpha=ALPHA, target_modules=("q_proj",), virtual_tokens=3
        ),
        model_name="tiny",
        model_type="llama",
        model_revision=checkpoint.revision,
        model_config=LlamaConfig(num_hidden_layers=2, num_attention_heads=4),
    )


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_and_dora(tmp_path: Path, checkpoint: Checkpoint, method: str) -> None:
    tensors = {}
    for block in range(2):
        parts = {LORA_A: RANK * 32, LORA_B: 32 * RANK}
        if method == "dora":
            parts[MAGNITUDE] = 32
        for part, size in parts.items():
            tensors[tensor_name(block, "self_attn.q_proj", part)] = torch.randn(size)
    write(tmp_path, checkpoint, method, tensors)
    files = open_any_adapter(tmp_path)
    assert isinstance(files, AdapterFiles)
    check_fits_model(files, checkpoint)
    assert files.model_revision == checkpoint.revision
    for module in files.index.modules:
        assert module.scaling == ALPHA / RANK
        assert (module.magnitude is not None) == (method == "dora")
        flat = tensors[tensor_name(module.block, module.name, LORA_A)]
        assert files.read(module)[0] == flat.numpy().tobytes()


def test_prompt(tmp_path: Path, checkpoint: Checkpoint) -> None:
    write(tmp_path, checkpoint, "prompt", {PROMPT: torch.randn(3 * 32)})
    files = open_any_adapter(tmp_path)
    assert isinstance(files, PromptFiles)
    assert (files.virtual_tokens, files.hidden_size) == (3, 32)
    check_fits_model(files, checkpoint)


def test_trained_for_another_revision(tmp_path: Path, checkpoint: Checkpoint) -> None:
    write(tmp_path, checkpoint, "prompt", {PROMPT: torch.randn(3 * 32)})
    other = tmp_path / "other"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).save_pretrained(other)
    with pytest.raises(AdapterError, match="another revision"):
        check_fits_model(open_any_adapter(tmp_path), Checkpoint.open(other))
