"""How a federation begins, and what its commands refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from swarm.client.cli import app
from swarm.client.finetune.adapter_files import write_adapter
from swarm.client.finetune.federation.files import (
    DoneRound,
    FederationFiles,
    Progress,
    read_common_adapter,
)
from swarm.client.finetune.federation.process import beginning_of
from swarm.client.finetune.federation.runs import check_members, check_same, found
from swarm.client.finetune.settings import FinetuneSettings
from swarm.compute.lora import LORA_A, LORA_B, MAGNITUDE, tensor_name
from swarm.protocol.errors import AdapterError, ConfigError, UsageError
from swarm.protocol.identity import Identity

RECIPE = FinetuneSettings(rank=2, target_modules=("q_proj",))
PEERS = [Identity.generate().peer_id for _ in range(3)]


def make_adapter(
    folder: Path, method: str = "lora", revision: bytes = bytes(32)
) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    module = "self_attn.q_proj"
    sizes = {LORA_A: 2 * 6, LORA_B: 4 * 2} | ({MAGNITUDE: 4} if method == "dora" else {})
    tensors = {
        tensor_name(block, module, part): torch.randn(size)
        for block in range(2)
        for part, size in sizes.items()
    }
    settings = FinetuneSettings(method=method, rank=2, alpha=3.0, target_modules=("q_proj",))
    write_adapter(
        folder,
        tensors,
        settings,
        model_name="tiny",
        model_type="llama",
        model_revision=revision,
        model_config=None,
    )
    return tensors


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_of_swarm_finetune_is_a_beginning(tmp_path: Path, method: str) -> None:
    tensors = make_adapter(tmp_path, method)
    beginning = beginning_of(tmp_path, FinetuneSettings(epochs=5))
    assert beginning.recipe.rank == 2
    assert beginning.recipe.alpha == 3.0
    assert beginning.recipe.method == method
    assert beginning.recipe.target_modules == ("q_proj",)
    assert beginning.recipe.epochs == 5
    assert beginning.model_revision == bytes(32)
    assert beginning.adapter.keys() == tensors.keys()
    assert all(torch.equal(beginning.adapter[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "change", [{"rank_pattern": {"q_proj": 2}}, {"use_rslora": True}, {"target_modules": "q_proj"}]
)
def test_adapters_that_cannot_be_averaged(tmp_path: Path, change: dict[str, object]) -> None:
    make_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError):
        beginning_of(tmp_path, RECIPE)


def test_what_is_on_disk_comes_back(tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter")
    beginning = beginning_of(tmp_path / "adapter", RECIPE)
    files = FederationFiles(tmp_path / "federation")
    assert not files.exists
    found(files, beginning, invited=PEERS, rounds=4, minimum=None, train_s=60.0, answer_s=5.0)
    again = FederationFiles(tmp_path / "federation")
    assert again.exists
    assert again.terms().minimum == 2
    progress = again.progress()
    read = again.read_adapter(progress.adapter)
    assert all(torch.equal(read[name], beginning.adapter[name]) for name in read)
    after = again.write_adapter({name: tensor + 1 for name, tensor in read.items()})
    again.write_progress(Progress(after, (DoneRound(1, 3, 70, 1),)))
    assert files.progress() == Progress(after, (DoneRound(1, 3, 70, 1),))
    assert not files.adapter_path(progress.adapter).exists()
    with again.only_process(), pytest.raises(ConfigError), files.only_process():
        pass
    check_same(files.terms(), PEERS[::-1], 4)
    for invited, rounds in ((PEERS[:2], 4), (PEERS, 5)):
        with pytest.raises(UsageError):
            check_same(files.terms(), invited, rounds)


def test_common_adapters_of_strangers(tmp_path: Path) -> None:
    files = FederationFiles(tmp_path)
    name = tensor_name(0, "self_attn.q_proj", LORA_A)
    good = files.write_adapter({name: torch.ones(4)})
    path = files.adapter_path(good)
    assert torch.equal(read_common_adapter(path, good)[name], torch.ones(4))
    for bad in (
        {name: torch.tensor([1.0, float("nan")])},
        {name: torch.ones(4, dtype=torch.float16)},
        {"lm_head.weight": torch.ones(4)},
    ):
        stored = files.write_adapter(bad)
        with pytest.raises(AdapterError):
            read_common_adapter(files.adapter_path(stored), stored)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(AdapterError, match="damaged"):
        read_common_adapter(path, good)


def test_who_takes_part_is_checked_by_participants_too(tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter")
    files = FederationFiles(tmp_path)
    beginning = beginning_of(tmp_path / "adapter", RECIPE)
    found(files, beginning, invited=PEERS, rounds=1, minimum=3, train_s=60.0, answer_s=5.0)
    terms = files.terms()
    check_members(terms, PEERS[0], None)
    check_members(terms, PEERS[0], PEERS[1:])
    for own, others in (
        (Identity.generate().peer_id, None),
        (PEERS[0], PEERS[1:2]),
        (PEERS[0], [*PEERS[1:], Identity.generate().peer_id]),
    ):
        with pytest.raises(UsageError):
            check_members(terms, own, others)


def run(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["federate", *map(str, arguments)])
    return done.exit_code, done.output


def test_commands_refuse_what_makes_no_sense(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    make_adapter(adapter)
    code, text = run("run", tmp_path / "a", "--json")
    assert code == 2
    assert "--adapter" in json.loads(text)["error"]
    code, text = run("run", tmp_path / "b", "--adapter", adapter, "--invite", PEERS[0], "--json")
    assert code == 2
    assert "invited" in json.loads(text)["error"]
    assert not FederationFiles(tmp_path / "b").exists
    out = ("tiny", "--data", "mine.jsonl", "--out", tmp_path / "out", "--key", tmp_path / "me.key")
    peer = ("--peers", f"/ip4/127.0.0.1/tcp/1/p2p/{PEERS[0]}")
    assert run("join", "ftp://127.0.0.1", *out, *peer)[0] == 2
    assert run("join", "http://127.0.0.1:1", *out, *peer)[0] == 4  # nobody listens there
    code, first = run("id", "--key", tmp_path / "me.key", "--json")
    assert code == 0
    assert run("id", "--key", tmp_path / "me.key")[1].strip() == json.loads(first)["peer_id"]
