"""A small model on disk."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from swarm.catalogue.safetensors_file import header_for
from swarm.protocol.manifest import Tensor

MIB = 1024 * 1024


def write_model(folder: Path, *, blocks: int = 2, seed: int = 0, files: int = 1) -> Path:
    """A checkpoint directory of ``files`` safetensors files with random bytes for weights."""
    dice = random.Random(seed)
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "num_hidden_layers": blocks, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"words": []}')
    (folder / "notes.txt").write_text("not part of the model")
    tensors = [Tensor("model.embed_tokens.weight", "float32", (5, 8))]
    for block in range(blocks):
        tensors.append(Tensor(f"model.layers.{block}.a.weight", "bfloat16", (MIB // 16, 8)))
        tensors.append(Tensor(f"model.layers.{block}.b.weight", "float32", (MIB // 32, 4)))
    content = {tensor.name: dice.randbytes(tensor.size_bytes) for tensor in tensors}
    names = [f"part-{index}.safetensors" for index in range(files)]
    if files == 1:
        names = ["model.safetensors"]
    weight_map: dict[str, str] = {}
    for index, name in enumerate(names):
        members = tuple(tensors[index::files])
        weight_map |= {tensor.name: name for tensor in members}
        body = b"".join(content[tensor.name] for tensor in members)
        (folder / name).write_bytes(header_for(members) + body)
    if files > 1:
        index_file = folder / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny")


@pytest.fixture
def sharded_directory(tmp_path: Path) -> Path:
    """The same model, spread over files in another way."""
    return write_model(tmp_path / "sharded", files=3)
