"""Embeddings, norm and head out of a checkpoint directory, and what is built on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.app import SwarmClient
from swarm.client.ends import ModelEnds
from swarm.client.model import SwarmModelForCausalLM
from swarm.protocol.errors import CheckpointError, ConfigError, UsageError
from swarm.protocol.tensors import DType

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "mixtral")
IDS = torch.tensor([[5, 17, 33, 9, 60]])
PEER = "/ip4/192.0.2.7/tcp/31330/p2p/12D3KooWA"


@pytest.fixture
def make_checkpoint(tmp_path: Path, make_whole_model: Any) -> Callable[..., tuple[Any, Path]]:
    """A tiny model, and the directory that it was saved to."""

    def make(family: str, **changes: Any) -> tuple[Any, Path]:
        whole = make_whole_model(family, seed=4, **changes)
        directory = tmp_path / family
        whole.save_pretrained(directory)
        return whole, directory

    return make


def check_ends(ends: ModelEnds, whole: Any) -> None:
    with torch.no_grad():
        hidden = whole.model(IDS).last_hidden_state
        torch.testing.assert_close(ends.embed(IDS), whole.get_input_embeddings()(IDS))
        normed = torch.randn(1, 5, hidden.shape[-1])
        expected = whole.lm_head(whole.model.norm(normed))
        softcap = getattr(whole.config, "final_logit_softcapping", None)
        if softcap:
            expected = torch.tanh(expected / softcap) * softcap
    torch.testing.assert_close(ends.logits(normed), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_family(make_checkpoint: Any, family: str, tied: bool) -> None:
    whole, directory = make_checkpoint(family, tie_word_embeddings=tied)
    check_ends(ModelEnds.load(Checkpoint.open(directory), dtype="float32"), whole)


def test_only_the_ends_are_read(make_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, directory = make_checkpoint("llama")
    read: list[str] = []
    read_into = Checkpoint.read_into

    def record(self: Checkpoint, info: Any, buffer: memoryview) -> None:
        read.append(info.name)
        read_into(self, info, buffer)

    monkeypatch.setattr(Checkpoint, "read_into", record)
    ModelEnds.load(Checkpoint.open(directory))
    assert sorted(read) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_text_part_of_a_multimodal_checkpoint(make_checkpoint: Any, prefix: str) -> None:
    whole, directory = make_checkpoint("gemma3")
    tensors = load_file(directory / "model.safetensors")
    tensors = {
        prefix + (name if prefix.startswith("lang") else name.removeprefix("model.")): tensor
        for name, tensor in tensors.items()
    } | {"vision_tower.patches.weight": torch.ones(2, 2)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text})
    )
    check_ends(ModelEnds.load(Checkpoint.open(directory), dtype="float32"), whole)


def test_bfloat16(make_checkpoint: Any) -> None:
    _, directory = make_checkpoint("gemma3")
    ends = ModelEnds.load(Checkpoint.open(directory), dtype="bfloat16")
    assert ends.dtype is torch.bfloat16
    assert ends.logits(ends.embed(IDS)).dtype is torch.bfloat16


def test_missing_head(make_checkpoint: Any) -> None:
    _, directory = make_checkpoint("llama", tie_word_embeddings=False)
    tensors = load_file(directory / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        ModelEnds.load(Checkpoint.open(directory))


def test_unknown_family_and_dtype(make_checkpoint: Any) -> None:
    _, directory = make_checkpoint("llama")
    with pytest.raises(ConfigError, match="unknown dtype"):
        ModelEnds.load(Checkpoint.open(directory), dtype="int3")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "opt"}))
    with pytest.raises(CheckpointError, match="'opt' are not supported"):
        ModelEnds.load(Checkpoint.open(directory))


@pytest.mark.parametrize(("dtype", "node_dtype"), [(torch.float32, DType.FLOAT32), ("auto", None)])
def test_from_swarm(
    make_checkpoint: Any,
    make_swarm: Any,
    monkeypatch: pytest.MonkeyPatch,
    dtype: Any,
    node_dtype: DType | None,
) -> None:
    whole, directory = make_checkpoint("llama")
    whole.generation_config.max_new_tokens = 7
    whole.generation_config.save_pretrained(directory)
    client = make_swarm("llama").client
    requests = []

    async def connect(settings: Any) -> Any:
        assert settings.peers == (PEER,)
        return client

    async def open_chain(request: Any, **options: Any) -> Any:
        requests.append((request, options))
        return await type(client).open_chain(client, request, **options)

    monkeypatch.setattr(SwarmClient, "connect", connect)
    monkeypatch.setattr(client, "open_chain", open_chain)
    with SwarmModelForCausalLM.from_swarm(str(directory), peers=[PEER], dtype=dtype) as model:
        client.decoder.to(torch.bfloat16 if dtype == "auto" else torch.float32)
        output = model.generate(IDS, do_sample=False, eos_token_id=None)
    assert output.shape[1] == IDS.shape[1] + 7
    assert client.closed
    ((request, options),) = requests
    assert request.model_revision == Checkpoint.open(directory).revision
    assert request.wire_dtype == (DType.FLOAT32 if dtype is torch.float32 else DType.BFLOAT16)
    assert options == {"number_of_blocks": 3, "dtype": node_dtype, "model_name": "llama"}


def test_from_swarm_settings_are_not_mixed(make_checkpoint: Any) -> None:
    from swarm.client.config import ClientSettings

    _, directory = make_checkpoint("llama")
    with pytest.raises(UsageError, match="not both"):
        SwarmModelForCausalLM.from_swarm(
            str(directory), peers=[PEER], settings=ClientSettings((PEER,))
        )
    shutil.rmtree(directory)
    with pytest.raises(CheckpointError):
        SwarmModelForCausalLM.from_swarm(str(directory), peers=[PEER])
