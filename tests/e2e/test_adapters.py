"""Adapters as users meet them: real processes, the real model, PEFT as the reference."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.local_swarm import LocalSwarm, Span, SwarmPlan
from scripts.process_keeper import KeptProcess
from swarm.catalogue.adapter import AdapterFiles
from swarm.catalogue.checkpoint import Checkpoint
from swarm.client import SwarmModelForCausalLM
from swarm.client.adapters import AUTO, FoundAdapter, find_adapter
from swarm.client.app import SwarmClient
from swarm.client.config import ClientSettings, SamplingSettings
from swarm.client.generate import LocalModel, TextSession
from swarm.protocol.errors import AdapterError
from tests.adapter_making import make_adapter

SPANS = (Span(0, 15), Span(15, 30), Span(0, 15))
PROMPT = "The market by the lake opens at dawn, and"
NEW_TOKENS = 16
LONG_PROMPT_TOKENS = 448
SWARM = Path(sys.executable).parent / "swarm"


@dataclass
class Reference:
    directory: Path | None
    """None: the bare model."""
    token_ids: list[int]


@pytest.fixture(scope="module")
def references(
    smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Reference]:
    """Two adapters and the bare model, each with what it says by PEFT alone."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.set_num_threads(1)  # more are slower while anything else runs
    whole: Any = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}

    def say(model: Any) -> list[int]:
        with torch.inference_mode():
            output = model.generate(**inputs, **options)
        return [int(token) for token in output[0, inputs["input_ids"].shape[1] :]]

    found = {"bare": Reference(None, say(whole))}
    for seed, (name, settings) in enumerate(
        {
            "lora": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 8},
            "dora": {"target_modules": ["k_proj", "o_proj", "up_proj"], "use_dora": True},
        }.items()
    ):
        adapted = make_adapter(whole, folder / name, seed=seed, std=0.05, **settings)
        found[name] = Reference(folder / name, say(adapted))
    assert len({tuple(reference.token_ids) for reference in found.values()}) == 3
    return found


@pytest.fixture(scope="module")
def swarm(smollm2_path: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(SwarmPlan(smollm2_path, SPANS)) as swarm:
        yield swarm


def batches_of_three(swarm: LocalSwarm) -> float:
    """How many batches of any node held at least three steps."""
    total = 0.0
    for node in swarm.nodes:
        assert node.metrics_url is not None
        with urllib.request.urlopen(node.metrics_url, timeout=10) as response:  # noqa: S310
            text = response.read().decode()
        count = re.findall(r"^swarm_node_batch_size_steps_count (\S+)$", text, re.MULTILINE)
        small = re.findall(r'steps_bucket\{le="2.0"\} (\S+)$', text, re.MULTILINE)
        total += float(count[0]) - float(small[0])
    return total


def test_two_adapters_and_the_bare_model_side_by_side_while_a_node_is_lost(
    swarm: LocalSwarm, smollm2_path: Path, references: dict[str, Reference]
) -> None:
    """Each user gets what it gets alone; the replacement is brought both adapters."""

    async def main() -> dict[str, list[int]]:
        local = LocalModel.load(str(smollm2_path), dtype="float32")
        half_way = asyncio.Barrier(len(references) + 1)
        all_together = asyncio.Barrier(len(references) + 1)

        async def answer(client: SwarmClient, name: str) -> list[int]:
            directory = references[name].directory
            adapter = None if directory is None else AdapterFiles.open(directory)
            tokens: list[int] = []
            settings = SamplingSettings(max_new_tokens=NEW_TOKENS)
            async with TextSession(client, local, 128, adapter=adapter) as session:
                async for piece in session.stream(local.encode(PROMPT), settings):
                    tokens += piece.token_ids
                    if len(tokens) == NEW_TOKENS // 2:
                        plans.append(session._chain.plan if session._chain else None)
                        await half_way.wait()
                        await half_way.wait()  # the node is gone
                    elif len(tokens) == NEW_TOKENS // 2 + 1:
                        await all_together.wait()
            return tokens

        async def keep_nodes_busy(client: SwarmClient) -> None:
            """With a long prompt, in pieces: the steps of the others meet while one is computed."""
            await all_together.wait()
            ids = local.encode(PROMPT * 50)[:LONG_PROMPT_TOKENS]
            async with TextSession(client, local, LONG_PROMPT_TOKENS + 1) as session:
                async for _ in session.stream(ids, SamplingSettings(max_new_tokens=1)):
                    pass

        async def break_something() -> None:
            await half_way.wait()
            first = next(plan.hops[0].peer_id for plan in plans if plan is not None)
            node = next(node for node in swarm.nodes if node.peer_id == first)
            node.process.kill()
            await half_way.wait()

        plans: list[Any] = []
        async with (
            await SwarmClient.connect(ClientSettings(peers=tuple(swarm.peers))) as client,
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(break_something())
            tasks.create_task(keep_nodes_busy(client))
            answering = [tasks.create_task(answer(client, name)) for name in references]
        answers = [task.result() for task in answering]
        local.close()
        return dict(zip(references, answers, strict=True))

    answers = asyncio.run(main())
    for name, reference in references.items():
        assert answers[name] == reference.token_ids[: len(answers[name])], name
        assert len(answers[name]) == NEW_TOKENS
    swarm.nodes = [node for node in swarm.nodes if node.process.poll() is None]
    assert len(swarm.nodes) == len(SPANS) - 1
    assert batches_of_three(swarm) > 0


def test_the_sdk(swarm: LocalSwarm, smollm2_path: Path, references: dict[str, Reference]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with SwarmModelForCausalLM.from_swarm(
        str(smollm2_path), peers=swarm.peers, dtype="float32", adapter=references["dora"].directory
    ) as model:
        output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    new = [int(token) for token in output[0, inputs["input_ids"].shape[1] :]]
    assert new == references["dora"].token_ids[: len(new)]


def run_swarm(*arguments: str, home: Path) -> tuple[int, dict[str, Any]]:
    """One command of somebody whose files are in ``home``; its exit code and JSON."""
    done = subprocess.run(
        [str(SWARM), *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "XDG_DATA_HOME": str(home)},
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def asked(swarm: LocalSwarm, smollm2_path: Path) -> list[str]:
    """A question as a user asks it, without the adapter."""
    limit = ["--max-new-tokens", str(NEW_TOKENS), "--peers", swarm.peers[0]]
    return ["generate", str(smollm2_path), PROMPT, "--raw", "--dtype", "float32", *limit]


@contextmanager
def published(
    directory: Path, swarm: LocalSwarm, smollm2_path: Path, home: Path
) -> Iterator[dict[str, Any]]:
    """Somebody publishes an adapter and serves it; what the manifest says."""
    command = [str(SWARM), "adapters", "publish", str(directory), "--name", "swahili-instruct"]
    command += ["--base", str(smollm2_path), "--language", "sw", "--licence", "CC-BY-4.0"]
    command += ["--data", "speeches", "--copies", "9", "--peers", swarm.peers[0], "--json"]
    with KeptProcess(
        command,
        environment={**os.environ, "XDG_DATA_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.stop()


def test_published_listed_and_asked_by_name(
    swarm: LocalSwarm,
    smollm2_path: Path,
    references: dict[str, Reference],
    asked: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the README shows, by two people with a home of their own."""
    reference = references["lora"]
    assert reference.directory is not None
    text = AutoTokenizer.from_pretrained(smollm2_path).decode(reference.token_ids)
    user = tmp_path / "user"
    with published(reference.directory, swarm, smollm2_path, tmp_path / "author") as manifest:
        assert manifest["adapter_id"] == AdapterFiles.open(reference.directory).adapter_id.hex()
        deadline_s = time.monotonic() + 60
        rows: list[dict[str, Any]] = []
        while not rows and time.monotonic() < deadline_s:
            code, listed = run_swarm("adapters", "list", "--peers", swarm.peers[0], home=user)
            assert code == 0, listed
            rows = listed["adapters"]
        (row,) = rows
        assert row["languages"] == ["sw"]
        assert row["licence"] == "CC-BY-4.0"
        assert row["publishers"] == manifest["publishers"]
        code, answer = run_swarm(*asked, "--adapter", "swahili-instruct", home=user)
        assert (code, answer.get("text")) == (0, text), answer
        assert answer["adapter"]["id"] == manifest["adapter_id"]
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another user"))
        swahili, english, unknown = asyncio.run(ask_for_adapters(swarm, smollm2_path))
    assert swahili.name == "swahili-instruct"
    assert "the prompt is in sw" in swahili.reason
    assert swahili.files is not None
    assert swahili.files.adapter_id.hex() == manifest["adapter_id"]
    assert english.files is None
    assert "no served adapter is for en" in english.reason
    assert "neither a folder nor in the catalogue" in unknown
    # What was fetched chunk by chunk is a folder that PEFT loads.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel

        whole = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32)
        loaded: Any = PeftModel.from_pretrained(whole, str(swahili.files.directory)).eval()
    inputs = AutoTokenizer.from_pretrained(smollm2_path)(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        first = loaded(**inputs, use_cache=False).logits[0, -1].argmax()
    assert int(first) == reference.token_ids[0]


async def ask_for_adapters(
    swarm: LocalSwarm, model: Path
) -> tuple[FoundAdapter, FoundAdapter, str]:
    """What ``--adapter auto`` finds for two prompts, and the error for a name that is not there."""
    checkpoint = Checkpoint.open(model)
    async with await SwarmClient.connect(ClientSettings(peers=tuple(swarm.peers))) as client:
        library = client.library()
        prompts = (
            "Habari za asubuhi, ninaomba unisaidie kuandika barua kwa mwalimu wangu.",
            "Why is the sky blue in the morning?",
        )
        found = [await find_adapter(AUTO, checkpoint, library, prompt=prompt) for prompt in prompts]
        with pytest.raises(AdapterError) as error:
            await find_adapter("nobody-knows", checkpoint, library)
    return found[0], found[1], str(error.value)
