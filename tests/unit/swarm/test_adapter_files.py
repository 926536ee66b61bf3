"""What of an adapter's files is accepted, and with which reason the rest is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm.catalogue.adapter import REVISION_KEY, WEIGHTS_NAME, AdapterFiles, check_fits, is_finite
from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.peft_config import CONFIG_NAME
from swarm.protocol.adapter_index import decode_index
from swarm.protocol.errors import AdapterError, DecodeError
from swarm.protocol.tensors import DType

PREFIX = "base_model.model.model.layers."
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "down_proj"],
    "lora_dropout": 0.1,
    "bias": "none",
    "use_dora": False,
    "peft_version": "0.21.2",
}
TENSORS: dict[str, np.ndarray[Any, Any]] = {
    f"{PREFIX}0.self_attn.q_proj.lora_A.weight": np.ones((2, 8), np.float32),
    f"{PREFIX}0.self_attn.q_proj.lora_B.weight": np.ones((8, 2), np.float32),
    f"{PREFIX}1.mlp.down_proj.lora_A.weight": np.ones((2, 12), np.float16),
    f"{PREFIX}1.mlp.down_proj.lora_B.weight": np.ones((8, 2), np.float16),
}
DTYPES = {"float32": "F32", "float16": "F16"}


def safetensors_bytes(
    tensors: dict[str, np.ndarray[Any, Any]],
    metadata: dict[str, str] | None = None,
    change: Callable[[dict[str, Any]], None] = lambda header: None,
) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        start = len(data)
        data += values.tobytes()
        header[name] = {
            "dtype": DTYPES[str(values.dtype)],
            "shape": list(values.shape),
            "data_offsets": [start, len(data)],
        }
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write(directory: Path, config: dict[str, Any] | None = None, weights: bytes = b"") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / CONFIG_NAME).write_text(json.dumps(CONFIG if config is None else config))
    (directory / WEIGHTS_NAME).write_bytes(weights or safetensors_bytes(TENSORS))
    return directory


def test_an_adapter_is_read(tmp_path: Path) -> None:
    files = AdapterFiles.open(write(tmp_path))
    index = files.index
    assert [(m.block, m.name, m.scaling, m.rank) for m in index.modules] == [
        (0, "self_attn.q_proj", 2.0, 2),
        (1, "mlp.down_proj", 2.0, 2),
    ]
    assert index.modules[1].a.dtype is DType.FLOAT16
    assert decode_index(index.encoded) == index
    assert files.read(index.modules[0])[0] == np.ones((2, 8), np.float32).tobytes()
    assert index.of_blocks(1, 2) == index.modules[1:]


def test_the_id_is_of_what_is_computed(tmp_path: Path) -> None:
    """Order in the file and settings of the training do not matter; numbers and scaling do."""
    own = AdapterFiles.open(write(tmp_path / "one")).adapter_id
    reordered = safetensors_bytes(dict(reversed(TENSORS.items())))
    other_config = CONFIG | {"lora_dropout": 0.5, "task_type": "CAUSAL_LM"}
    same = AdapterFiles.open(write(tmp_path / "two", other_config, reordered))
    assert same.adapter_id == own
    scaled = AdapterFiles.open(write(tmp_path / "three", CONFIG | {"lora_alpha": 5}))
    assert scaled.adapter_id != own
    name, values = next(iter(TENSORS.items()))
    changed = safetensors_bytes(TENSORS | {name: values * 2})
    assert AdapterFiles.open(write(tmp_path / "four", None, changed)).adapter_id != own


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "IA3"}, "'IA3' are not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"a_setting_of_tomorrow": 3}, "a_setting_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "changes the base model"),
        ({"r": 0}, "a rank of 0"),
        ({"r": 100_000}, "a rank of 100000"),
        ({"r": True}, "a rank of True"),
        ({"r": 3}, "not of the configured rank 3"),
        ({"lora_alpha": "2"}, "lora_alpha is no number"),
        ({"rank_pattern": {"(a*)*b": 2}}, "too complicated"),
        ({"rank_pattern": {"a*b*c*": 2}}, "too complicated"),
        ({"rank_pattern": {"[": 2}}, "no regular expression"),
        ({"rank_pattern": {"q_proj": 4}}, "not of the configured rank 4"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"target_modules": ["v_proj"]}, "not among the configured target modules"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, change: Any, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        AdapterFiles.open(write(tmp_path, CONFIG | change))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", "no valid JSON"),
        (b'{"r": 1, "r": 2}', "a key is repeated"),
        (b"[" * 100 + b"]" * 100, "nested deeper"),
        (b'{"r": NaN}', "NaN"),
        (b"[1]", "no JSON object"),
        (b" " * 300_000, "at most"),
        (b"\xff", "no valid JSON"),
    ],
)
def test_config_files_that_are_refused(tmp_path: Path, text: bytes, reason: str) -> None:
    (write(tmp_path) / CONFIG_NAME).write_bytes(text)
    with pytest.raises(AdapterError, match=reason):
        AdapterFiles.open(tmp_path)


def test_patterns_mean_what_they_mean_in_peft(tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 2},
        "alpha_pattern": {"^model.layers.1.mlp.down_proj": 10, "self_attn.q_proj": 6},
        "r": 7,
        "use_rslora": True,
    }
    index = AdapterFiles.open(write(tmp_path, CONFIG | patterns)).index
    assert [module.scaling for module in index.modules] == [6 / 2**0.5, 10 / 2**0.5]


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[new] = header.pop(next(name for name in header if old in name))

    return change


def set_entry(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[next(name for name in header if "q_proj.lora_A" in name)][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (rename("q_proj.lora_A", "base_model.model.lm_head.lora_A.weight"), "no place"),
        (rename("q_proj.lora_A", f"{PREFIX}0.self_attn.q_proj.weight"), "no place"),
        (rename("q_proj.lora_A", f"{PREFIX}0.self_attn.q_proj.lora_A.weight\n"), "no place"),
        (rename("q_proj.lora_A", f"{PREFIX}0../../etc.lora_A.weight"), "no place"),
        (rename("q_proj.lora_A", "x" * 3000), "no place"),
        (rename("q_proj.lora_A", f"{PREFIX}00.self_attn.q_proj.lora_B.weight"), "twice|where"),
        (set_entry("dtype", "F64"), "stored as 'F64'"),
        (set_entry("dtype", "I8"), "stored as 'I8'"),
        (set_entry("dtype", 3), "malformed"),
        (set_entry("shape", [2, -8]), "the shape"),
        (set_entry("shape", [2, 8, 1]), "the shape"),
        (set_entry("shape", [16]), "dimensions"),
        (set_entry("shape", [True, 16]), "the shape"),
        (set_entry("shape", [2, 9]), "bytes for the shape"),
        (set_entry("shape", [1, 16]), "not of the configured rank"),
        (set_entry("data_offsets", [0, 68]), "bytes for the shape"),
        (set_entry("data_offsets", [4, 68]), "does not begin"),
        (set_entry("data_offsets", [10**30, 10**30 + 64]), "no valid JSON"),
        (set_entry("data_offsets", ["0", 64]), "malformed"),
        (set_entry("more", 1), "unknown entries"),
        (lambda header: header.update(extra={"a": {"b": {"c": {}}}}), "nested deeper"),
        (lambda header: header.update(__metadata__={"a": 1}), "no texts"),
        (lambda header: header.update(__metadata__={"a": "x" * 100_000}), "too many metadata"),
        (lambda header: header.update(__metadata__={REVISION_KEY: "zz"}), "no revision"),
        (lambda header: header.pop(next(n for n in header if "lora_B" in n)), "does not begin"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, change: Any, reason: str) -> None:
    write(tmp_path, None, safetensors_bytes(TENSORS, change=change))
    with pytest.raises(AdapterError, match=reason):
        _ = AdapterFiles.open(tmp_path).index


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (b"\x80\x02}q\x00(X\x01\x00\x00\x00" + bytes(50), "pickle"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"\x1f\x8b\x08\x00\x9a\x8b\x1c\x67rest", "gzip"),
        (b"\xff" * 100, "claims a header"),
        (b"abc", "only safetensors"),
        (struct.pack("<Q", 500) + b"{}", "cut short"),
        (struct.pack("<Q", 1 << 40) + b"{}", "claims a header of 1099511627776 bytes"),
        (safetensors_bytes(TENSORS)[:-1], "the file has"),
        (safetensors_bytes(TENSORS) + b"x", "the file has"),
        (safetensors_bytes({}), "no tensors"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, weights: bytes, reason: str) -> None:
    write(tmp_path, None, weights)
    with pytest.raises(AdapterError, match=reason):
        AdapterFiles.open(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.ckpt"])
def test_pickles_beside_a_configuration_are_refused(tmp_path: Path, name: str) -> None:
    (write(tmp_path) / WEIGHTS_NAME).rename(tmp_path / name)
    with pytest.raises(AdapterError, match=f"{name} is a pickle"):
        AdapterFiles.open(tmp_path)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    for wrong in (np.nan, np.inf, -np.inf):
        for name, values in TENSORS.items():
            spoilt = values.copy()
            spoilt.flat[-1] = wrong
            write(tmp_path, None, safetensors_bytes(TENSORS | {name: spoilt}))
            with pytest.raises(AdapterError, match="not finite"):
                _ = AdapterFiles.open(tmp_path).index


def test_finite_numbers_by_their_exponents() -> None:
    largest = struct.pack("<f", 3.4e38)
    assert is_finite(DType.FLOAT32, largest + bytes(4))
    assert not is_finite(DType.FLOAT32, bytes(4) + struct.pack("<f", float("nan")))
    assert is_finite(DType.BFLOAT16, largest[2:])
    assert not is_finite(DType.BFLOAT16, struct.pack("<f", float("-inf"))[2:])
    assert not is_finite(DType.FLOAT16, struct.pack("<e", float("inf")))
    assert is_finite(DType.FLOAT16, struct.pack("<e", 65504.0))


def small_checkpoint(directory: Path, hidden: int = 8, blocks: int = 2) -> Checkpoint:
    directory.mkdir()
    (directory / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_hidden_layers": blocks, "hidden_size": hidden})
    )
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for block in range(blocks):
        tensors[f"model.layers.{block}.self_attn.q_proj.weight"] = np.ones((hidden, hidden), "f4")
        tensors[f"model.layers.{block}.mlp.down_proj.weight"] = np.ones((hidden, 12), "f4")
        tensors[f"model.layers.{block}.input_layernorm.weight"] = np.ones(hidden, "f4")
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return Checkpoint.open(directory)


def test_an_adapter_for_another_model_is_refused(tmp_path: Path) -> None:
    index = AdapterFiles.open(write(tmp_path / "adapter")).index
    check_fits(index, small_checkpoint(tmp_path / "right"))
    with pytest.raises(AdapterError, match=r"made for a layer \[8, 8\], the model's is \[16, 16\]"):
        check_fits(index, small_checkpoint(tmp_path / "wide", hidden=16))
    with pytest.raises(AdapterError, match="the model has 1 blocks only"):
        check_fits(index, small_checkpoint(tmp_path / "short", blocks=1))
    norm = f"{PREFIX}0.self_attn.input_layernorm.lora_"
    tensors = {
        f"{norm}A.weight": np.ones((2, 8), np.float32),
        f"{norm}B.weight": np.ones((8, 2), np.float32),
    }
    config = CONFIG | {"target_modules": ["input_layernorm"]}
    write(tmp_path / "norm", config, safetensors_bytes(tensors))
    with pytest.raises(AdapterError, match="no such linear layer"):
        check_fits(AdapterFiles.open(tmp_path / "norm").index, Checkpoint.open(tmp_path / "right"))


def test_a_declared_revision_must_be_the_models(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path / "model")
    for revision, fits in ((checkpoint.revision, True), (bytes(32), False)):
        weights = safetensors_bytes(TENSORS, {REVISION_KEY: revision.hex()})
        index = AdapterFiles.open(write(tmp_path / "adapter", None, weights)).index
        assert index.model_revision == revision
        if fits:
            check_fits(index, checkpoint)
        else:
            with pytest.raises(AdapterError, match="another model, or another revision"):
                check_fits(index, checkpoint)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    place=st.integers(0, 700), value=st.integers(0, 255), cut=st.one_of(st.none(), st.integers(0))
)
def test_damaged_files_are_refused_or_read(
    tmp_path: Path, place: int, value: int, cut: int | None
) -> None:
    weights = bytearray(safetensors_bytes(TENSORS))
    weights[place % len(weights)] = value
    if cut is not None:
        del weights[cut % len(weights) :]
    write(tmp_path, None, bytes(weights) or b"\0")
    try:
        index = AdapterFiles.open(tmp_path).index
    except AdapterError:
        return
    assert decode_index(index.encoded) == index


INDEX_TEXT = (
    b'{"format":"sovereign-swarm adapter 1","model_revision":"","modules":[[0,"mlp.up_proj",2.0,'
    b'[["FLOAT32",[2,8],"' + b"ab" * 32 + b'"],["FLOAT32",[8,2],"' + b"cd" * 32 + b'"]]]]}'
)


def test_the_sample_index_is_in_order() -> None:
    assert decode_index(INDEX_TEXT).encoded == INDEX_TEXT


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"adapter 1", b"adapter 2"),
        (b'"model_revision":""', b'"model_revision":"ab"'),
        (b'"model_revision":""', b'"model_revision":3'),
        (b"2.0", b"2"),
        (b"2.0", b"1e999"),
        (b"2.0", b"2.00"),
        (b"2.0", b"5000.0"),
        (b"mlp.up_proj", b"lm_head"),
        (b"[0,", b"[-1,"),
        (b"[0,", b"[1024,"),
        (b"[0,", b"[0.0,"),
        (b"[0,", b"[true,"),
        (b"[2,8]", b"[0,8]"),
        (b"[2,8]", b"[2,8,1]"),
        (b"[2,8]", b"[3,8]"),
        (b"[2,8]", b"[2,true]"),
        (b"[2,8]", b"[[2],8]"),
        (b"[2,8]", b"[2,1048577]"),
        (b"FLOAT32", b"FLOAT64"),
        (b"ab" * 32, b"ab" * 31),
        (b"ab" * 32, b"AB" * 32),
        (b'"modules":[', b'"modules":[3,'),
        (b"]]]]}", b'],["FLOAT32",[9],"' + b"ef" * 32 + b'"]]]]}'),
        (b"}", b" }"),
        (b"}", b""),
        (b"}", b',"more":1}'),
    ],
)
def test_indices_that_are_refused(old: bytes, new: bytes) -> None:
    text = INDEX_TEXT.replace(old, new, 1)
    assert text != INDEX_TEXT
    with pytest.raises(DecodeError):
        decode_index(text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200) | st.text(alphabet='[]{}",:01.e-FLOAT', max_size=200))
def test_any_bytes_are_an_index_or_an_error(data: bytes | str) -> None:
    with pytest.raises(DecodeError):
        decode_index(data.encode() if isinstance(data, str) else data)
