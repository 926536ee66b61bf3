"""What loading reads and takes, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swarm.catalogue.checkpoint import Checkpoint, TensorInfo
from swarm.node.engine.capacity import blocks_that_fit
from swarm.node.engine.engine import load_engine_blocking
from swarm.node.engine.span_loader import load_span
from swarm.protocol.errors import CheckpointError

CPU = torch.device("cpu")


def test_only_the_tensors_of_the_span_are_read(
    make_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_tiny("llama").checkpoint
    read: list[str] = []
    read_into = Checkpoint.read_into

    def recording(self: Checkpoint, info: TensorInfo, buffer: memoryview) -> None:
        read.append(info.name)
        read_into(self, info, buffer)

    monkeypatch.setattr(Checkpoint, "read_into", recording)
    span = load_span(checkpoint, 2, 4, device=CPU, dtype=torch.float32)
    wanted = [info.name for block in (2, 3) for info in checkpoint.block_tensors(block).values()]
    assert sorted(read) == sorted(wanted)
    assert span.weight_bytes == sum(checkpoint.block_bytes(block) for block in (2, 3))


MEASURE = """
import sys, threading, time, psutil, torch
from swarm.catalogue.checkpoint import Checkpoint
from swarm.node.engine.span_loader import load_span
from transformers.models.llama import modeling_llama
torch.set_num_threads(1)
process, peak, done = psutil.Process(), 0, threading.Event()
checkpoint = Checkpoint.open(sys.argv[1])
load_span(checkpoint, 0, 1, device=torch.device("cpu"), dtype=torch.float32)
before = process.memory_info().rss
def watch(loaded, blocks):
    global peak
    peak = max(peak, process.memory_info().rss)
span = load_span(checkpoint, 2, 10, device=torch.device("cpu"), dtype=torch.float32, progress=watch)
print(peak - before, process.memory_info().rss - before, span.weight_bytes)
"""


def test_memory_while_loading_is_that_of_the_span(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    peak_bytes, kept_bytes, weight_bytes = (int(number) for number in output.split())
    assert weight_bytes > 90_000_000
    assert kept_bytes < 1.15 * weight_bytes
    assert peak_bytes < 1.25 * weight_bytes


@pytest.mark.parametrize("family", ["mixtral"])
def test_checkpoints_with_fused_experts_load_too(
    family: str, make_tiny: Any, tmp_path: Path
) -> None:
    """transformers writes experts one by one; files with fused experts are also about."""
    tiny = make_tiny(family)
    tensors = {
        name: tensor.clone()
        for name, tensor in tiny.model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(tiny.checkpoint.path / "config.json", tmp_path / "config.json")
    fused = load_span(Checkpoint.open(tmp_path), 1, 3, device=CPU, dtype=torch.float32)
    split = load_span(tiny.checkpoint, 1, 3, device=CPU, dtype=torch.float32)
    for one, other in zip(fused.layers, split.layers, strict=True):
        assert torch.equal(
            one.get_parameter("mlp.experts.gate_up_proj"),
            other.get_parameter("mlp.experts.gate_up_proj"),
        )


def edit_config(source: Path, target: Path, **changes: object) -> Checkpoint:
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return Checkpoint.open(target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2', which is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"intermediate_size": 97}, "has shape"),
        ({"attention_bias": True}, "no tensor self_attn"),
    ],
)
def test_what_cannot_be_served_is_refused_in_plain_words(
    changes: dict[str, object], message: str, make_tiny: Any, tmp_path: Path
) -> None:
    checkpoint = edit_config(make_tiny("llama").checkpoint.path, tmp_path / "edited", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_span(checkpoint, 0, 2, device=CPU, dtype=torch.float32)


def test_a_stored_dtype_is_converted(make_tiny: Any, tmp_path: Path) -> None:
    source = make_tiny("llama").checkpoint.path
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
    )
    shutil.copy(source / "config.json", tmp_path / "config.json")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.dtype == "bfloat16"
    span = load_span(checkpoint, 0, 1, device=CPU, dtype=torch.float32, replace=False)
    name = "self_attn.q_proj.weight"
    expected = tensors[f"model.layers.0.{name}"].to(torch.bfloat16).float()
    assert torch.equal(span.layers[0].get_parameter(name), expected)


async def test_progress_and_bfloat16(make_tiny: Any) -> None:
    seen: list[tuple[int, int]] = []
    engine = await asyncio.to_thread(
        load_engine_blocking,
        make_tiny("llama").checkpoint,
        1,
        4,
        device="cpu",
        dtype="bfloat16",
        cache_bytes=1 << 20,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    described = engine.describe()
    assert described["dtype"] == "bfloat16"
    assert described["packed_linears"] == 12
    assert described["cache_bytes"] == 1 << 20
    await engine.close()


def test_counting_blocks_that_fit(make_tiny: Any) -> None:
    checkpoint = make_tiny("llama").checkpoint
    block_bytes = checkpoint.block_bytes(0)
    assert blocks_that_fit(checkpoint, torch.float32, 0) == 0
    assert blocks_that_fit(checkpoint, torch.float32, block_bytes * 4) == 3
    assert blocks_that_fit(checkpoint, torch.bfloat16, block_bytes * 4) == 6
