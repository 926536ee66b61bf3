from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm.catalogue.checkpoint import Checkpoint, resolve_checkpoint
from swarm.protocol.errors import CheckpointError

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 4}


def safetensors(tensors: dict[str, tuple[list[int], bytes]], dtype: str = "F32") -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def block(number: int, value: int = 1) -> dict[str, tuple[list[int], bytes]]:
    return {f"model.layers.{number}.mlp.up_proj.weight": ([2, 4], bytes([value]) * 32)}


REST = {
    "model.embed_tokens.weight": ([3, 4], b"e" * 48),
    "model.norm.weight": ([4], b"n" * 16),
}


def write_single(directory: Path, tensors: dict[str, tuple[list[int], bytes]]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "model.safetensors").write_bytes(safetensors(tensors))
    return directory


def write_sharded(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    parts = {"one.safetensors": {**block(0), **REST}, "two.safetensors": block(1)}
    for name, tensors in parts.items():
        (directory / name).write_bytes(safetensors(tensors))
    weight_map = {tensor: name for name, tensors in parts.items() for tensor in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_what_it_tells(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_single(tmp_path / "tiny", {**block(0), **block(1), **REST}))
    assert (checkpoint.name, checkpoint.model_type, checkpoint.dtype) == (
        "tiny",
        "llama",
        "float32",
    )
    assert (checkpoint.number_of_blocks, checkpoint.hidden_size) == (2, 4)
    assert list(checkpoint.block_tensors(1)) == ["mlp.up_proj.weight"]
    assert (checkpoint.block_bytes(1), checkpoint.block_bytes(1, "bfloat16")) == (32, 16)
    assert set(checkpoint.client_tensors()) == set(REST)
    info = checkpoint.client_tensors()["model.norm.weight"]
    buffer = bytearray(info.size_bytes)
    checkpoint.read_into(info, memoryview(buffer))
    assert buffer == b"n" * 16


def test_revision_identifies_content_not_files(tmp_path: Path) -> None:
    single = Checkpoint.open(write_single(tmp_path / "a", {**block(0), **block(1), **REST}))
    sharded = Checkpoint.open(write_sharded(tmp_path / "b"))
    other = Checkpoint.open(write_single(tmp_path / "c", {**block(0), **block(1, 2), **REST}))
    assert len(single.revision) == 32
    assert single.revision == sharded.revision != other.revision


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "two.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_sharded(tmp_path) / name).unlink()
    with pytest.raises(CheckpointError, match="checkpoint incomplete") as caught:
        Checkpoint.open(tmp_path)
    assert name.removesuffix(".index.json") in str(caught.value)


def test_a_file_cut_short_at_any_byte_is_refused(tmp_path: Path) -> None:
    file = write_sharded(tmp_path) / "two.safetensors"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"two\.safetensors"):
            Checkpoint.open(tmp_path)


def test_a_missing_block_is_named(tmp_path: Path) -> None:
    write_single(tmp_path, {**block(0), **REST})
    with pytest.raises(CheckpointError, match="no tensors for block 1 of 2"):
        Checkpoint.open(tmp_path)


def test_a_missing_tensor_of_the_index_is_named(tmp_path: Path) -> None:
    (write_sharded(tmp_path) / "two.safetensors").write_bytes(safetensors(REST))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .*layers\.1\.mlp"):
        Checkpoint.open(tmp_path)


def test_an_index_that_points_outside_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../../etc/passwd"}}
    (write_sharded(tmp_path) / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="points outside"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"dtype": "F32", "shape": [2, 4]},
        {"dtype": "F32", "shape": [2, -4], "data_offsets": [0, 32]},
        {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 31]},
        {"dtype": "F32", "shape": [2, 4], "data_offsets": [32, 0]},
        {"dtype": "F32", "shape": [True, 8], "data_offsets": [0, 32]},
        {"dtype": "F32", "shape": [1 << 60, 1 << 60], "data_offsets": [0, 1 << 124]},
        {"dtype": "F32", "shape": [2.0, 4], "data_offsets": [0, 32]},
        {"dtype": "X1", "shape": [32], "data_offsets": [0, 32]},
    ],
)
def test_hostile_tensor_entries(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"model.layers.0.x": entry}).encode()
    write_single(tmp_path, {})
    content = len(header).to_bytes(8, "little") + header + bytes(64)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(content=st.binary(max_size=200), framed=st.booleans())
def test_any_bytes_give_a_checkpoint_error(tmp_path: Path, content: bytes, framed: bool) -> None:
    write_single(tmp_path, {})
    head = len(content).to_bytes(8, "little") if framed else b""
    (tmp_path / "model.safetensors").write_bytes(head + content)
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("config", ["", "[]", "[" * 5000, '{"hidden_size": true}', "{}"])
def test_hostile_configurations(tmp_path: Path, config: str) -> None:
    write_single(tmp_path, {**block(0), **block(1)})
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(tmp_path)


def test_resolving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    ours = tmp_path / "share" / "sovereign-swarm" / "models" / "Tiny-1M"
    ours.mkdir(parents=True)
    assert resolve_checkpoint("Tiny-1M") == ours
    assert resolve_checkpoint(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match=r"Other-1M.*Hugging Face cache"):
        resolve_checkpoint("Other-1M", allow_download=False)
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve_checkpoint("./not-there")
