"""A node and a user without a single file of the model: both get what they need from a peer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from swarm.client.cli import app
from tests.letters_tokenizer import LETTERS, save_letters_tokenizer

BLOCKS = 4


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "Tiny-Letters"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(LETTERS),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_letters_tokenizer(folder)
    return folder


def environment(home: Path) -> dict[str, str]:
    home.mkdir(exist_ok=True)
    return {
        **os.environ,
        "HOME": str(home),
        "XDG_DATA_HOME": str(home / "share"),
        "SWARM_NODE_DATA_DIR": str(home / "data"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    started: list[subprocess.Popen[str]] = []

    def run(name: str, *arguments: str) -> dict[str, Any]:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "swarm.node.cli", "join", *arguments, "--json"),
                *("--listen", "/ip4/127.0.0.1/tcp/0", "--no-metrics", "--no-hub"),
                *("--dtype", "float32"),
            ],
            env=environment(tmp_path / name),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] != "status":
                return event
        raise AssertionError(f"{name} said nothing")

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_join_and_generate_by_name(
    join: Callable[..., dict[str, Any]], checkpoint: Path, tmp_path: Path
) -> None:
    first = join("owner", str(checkpoint), "--blocks", "0:2")
    peers = ("--peers", first["addresses"][0])
    second = join("volunteer", "Tiny-Letters", "--blocks", "2:4", *peers)
    assert (second["first_block"], second["end_block"]) == (2, 4)
    (store,) = (tmp_path / "volunteer" / "data" / "store").iterdir()
    blocks = {path.name for path in store.glob("block-*")}
    assert blocks == {"block-00002.safetensors", "block-00003.safetensors"}
    options = ("--raw", "--json", "--dtype", "float32", "--max-new-tokens", "8", *peers)
    answer = CliRunner().invoke(
        app,
        ["generate", "Tiny-Letters", "habari yako", *options],
        env=environment(tmp_path / "user"),
    )
    assert answer.exit_code == 0, answer.output
    said = json.loads(answer.stdout)
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    prompt = torch.tensor([[LETTERS.index(letter) for letter in "habari yako"]])
    with torch.inference_mode():
        expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert said["token_ids"] == expected[0, prompt.shape[1] :].tolist()
    assert sum(path.name.startswith("block-") for path in (tmp_path / "user").rglob("*")) == 0
