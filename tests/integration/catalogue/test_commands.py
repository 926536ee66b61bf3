"""``swarm models`` and ``swarm-node seed --models`` as people use them, with real processes."""

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
from typer.testing import CliRunner, Result

from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.safetensors_file import header_for
from swarm.client.cli import app
from swarm.protocol.manifest import Tensor

LOOPBACK = ("--listen", "/ip4/127.0.0.1/tcp/0")
BLOCKS = 3


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Random bytes in the shape of a model; nobody computes here."""
    folder = tmp_path / "Karibu"
    folder.mkdir()
    config = {"model_type": "llama", "num_hidden_layers": BLOCKS, "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = [Tensor("model.embed_tokens.weight", "bfloat16", (512, 64))]
    tensors += [
        Tensor(f"model.layers.{block}.mlp.up_proj.weight", "bfloat16", (1 << 13, 64))
        for block in range(BLOCKS)
    ]
    body = b"".join(os.urandom(tensor.size_bytes) for tensor in tensors)
    (folder / "model.safetensors").write_bytes(header_for(tuple(tensors)) + body)
    return folder


def environment(home: Path) -> dict[str, str]:
    home.mkdir(exist_ok=True)
    return {
        **os.environ,
        "HOME": str(home),
        "XDG_DATA_HOME": str(home / "share"),
        "SWARM_NODE_DATA_DIR": str(home / "data"),
        "SWARM_NODE_ANNOUNCE_PERIOD_S": "3",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    started: list[subprocess.Popen[str]] = []

    def run(name: str, module: str, *arguments: str) -> tuple[subprocess.Popen[str], Any]:
        """A process, and the first JSON object that it prints (after states)."""
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=environment(tmp_path / name),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            if said.get("event") != "status":
                return process, said
        raise AssertionError(process.communicate()[1])

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def seed(start: Callable[..., Any], name: str, *arguments: str) -> str:
    _, ready = start(
        name, "swarm.node.cli", "seed", *LOOPBACK, "--json", "--no-metrics", *arguments
    )
    return str(ready["addresses"][0])


def test_publish_hold_list_pull_mirror(
    start: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    def swarm(name: str, *command: str) -> Result:
        return CliRunner().invoke(app, ["models", *command], env=environment(tmp_path / name))

    address = seed(start, "meeting")
    publishing, described = start(
        "publisher",
        "swarm.client.cli",
        *("models", "publish", str(checkpoint), "--licence", "MIT", "--json"),
        *("--peers", address),
    )
    revision = Checkpoint.open(checkpoint).revision.hex()
    assert described["revision"] == revision
    seed(start, "holder", "--models", "Karibu", "--peers", address)
    # It serves until somebody else has everything.
    _, explanation = publishing.communicate(timeout=90)
    assert publishing.returncode == 0, explanation
    listed = swarm("user", "list", "--peers", address, "--json")
    assert listed.exit_code == 0, listed.output
    (row,) = json.loads(listed.stdout)["manifests"]
    assert (row["name"], row["revision"], row["publishers"]) == (
        "Karibu",
        revision,
        described["publishers"],
    )
    shown = swarm("user", "show", "Karibu", "--peers", address, "--json")
    assert json.loads(shown.stdout)["licence"] == "MIT"
    target = tmp_path / "pulled"
    pulled = swarm(
        "user", "pull", f"Karibu@{revision[:8]}", "--to", str(target), "--peers", address, "--json"
    )
    assert pulled.exit_code == 0, pulled.output
    assert Checkpoint.open(target).revision.hex() == revision
    (target / "manifest.json").unlink()
    assert Checkpoint.open(target).revision.hex() == revision
    stick = tmp_path / "stick"
    mirrored = swarm("user", "mirror", str(stick), "Karibu", "--peers", address)
    assert mirrored.exit_code == 0, mirrored.output
    # Another computer, another swarm: all that it has is the stick.
    lonely = seed(start, "lonely")
    from_stick = swarm(
        *("islander", "pull", "Karibu", "--blocks", "0:1"),
        *("--peers", lonely, "--mirror", str(stick), "--json"),
    )
    assert from_stick.exit_code == 0, from_stick.output
    here = json.loads(from_stick.stdout)
    assert 0 < here["chunks_here"] < here["chunks"]
    unknown = swarm("islander", "show", "Kwaheri", "--peers", lonely)
    assert unknown.exit_code == 2
    assert "nobody knows" in unknown.stderr
