"""Nodes and a seed as volunteers start them: real processes on loopback, a tiny random model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swarm.catalogue.checkpoint import Checkpoint
from swarm.hivemind_network import HivemindNetwork, NetworkSettings
from swarm.membership import read_nodes
from swarm.node.control import running_node
from swarm.node.view import NodeStatus
from swarm.protocol.identity import Identity
from swarm.protocol.records import NodeRecord, NodeState
from swarm.virtual_time import LoopClock

BLOCKS = 4
EXIT_TIMEOUT_S = 60


@dataclass
class Running:
    """A started ``swarm-node`` and the first event that is no status."""

    process: subprocess.Popen[str]
    first_event: dict[str, Any]

    @property
    def address(self) -> str:
        return str(self.first_event["addresses"][0])

    @property
    def daemon(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def ended(self) -> tuple[int, list[dict[str, Any]]]:
        """Exit code and the last events."""
        output, _ = self.process.communicate(timeout=EXIT_TIMEOUT_S)
        return self.process.returncode, [json.loads(line) for line in output.splitlines()]


Start = Callable[..., Running]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start(command: str, name: str, *arguments: str) -> Running:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "swarm.node.cli", command, *arguments, "--json"),
                *("--identity", str(tmp_path / f"{name}.key"), "--name", name),
                *("--listen", "/ip4/127.0.0.1/tcp/0"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        started.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] != "status":
                return Running(process, event)
        raise AssertionError(f"{name} ended with {process.wait()} and said nothing")

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 (our own loopback URL)
        return str(answer.read().decode())


def wait_for_text(path: Path, text: str) -> None:
    """Wait until the file is there and contains the text."""
    while not (path.exists() and text in path.read_text()):
        time.sleep(0.1)


async def announced(seed: Running, checkpoint: Path, tmp_path: Path) -> dict[str, NodeRecord]:
    """What the directory says of the model's nodes, by name."""
    key = tmp_path / "reader.key"
    Identity.generate().save(key)
    settings = NetworkSettings(
        listen_addresses=("/ip4/127.0.0.1/tcp/0",),
        initial_peers=(seed.address,),
        serve_directory=False,
    )
    network = await HivemindNetwork.create(key, settings)
    try:
        records = await read_nodes(network, Checkpoint.open(checkpoint).revision, LoopClock())
    finally:
        await network.close()
        key.unlink()
    return {record.display_name: record for record in records}


async def test_a_restarted_node_finds_the_swarm_without_peers(
    start: Start, checkpoint: Path, tmp_path: Path
) -> None:
    arguments = (str(checkpoint), "--num-blocks", "2", "--organisation", "UoN", "--country", "KE")
    first = start("join", "first", *arguments)
    second = start("join", "second", *arguments, "--peers", first.address)
    peers_file = tmp_path / "second.peers"
    await asyncio.to_thread(wait_for_text, peers_file, first.first_event["peer_id"])
    before = (await announced(first, checkpoint, tmp_path))["second"]
    second.process.kill()
    second.process.wait()
    start("join", "second", *arguments)
    after = (await announced(first, checkpoint, tmp_path))["second"]
    assert after.started_unix_s > before.started_unix_s
    assert (after.organisation, after.country) == ("UoN", "KE")


async def test_nodes_fill_the_gaps_serve_metrics_and_leave_on_ctrl_c(
    start: Start, checkpoint: Path, tmp_path: Path
) -> None:
    seed = start("seed", "seed")
    arguments = (str(checkpoint), "--peers", seed.address, "--num-blocks", "2")
    first, second = (start("join", name, *arguments) for name in ("first", "second"))
    spans = [(n.first_event["first_block"], n.first_event["end_block"]) for n in (first, second)]
    assert spans == [(0, 2), (2, 4)]

    assert 'blocks="0:2"' in await asyncio.to_thread(fetch, first.first_event["metrics_url"])
    records = await announced(seed, checkpoint, tmp_path)
    assert {name: record.state for name, record in records.items()} == {
        "first": NodeState.ONLINE,
        "second": NodeState.ONLINE,
    }
    assert all(record.decode_tokens_per_s > 0 for record in records.values())

    daemon = first.daemon
    os.killpg(first.process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the whole group
    code, events = first.ended()
    assert (code, events[-1]) == (0, {"event": "stopped"})
    assert not daemon.is_running()
    records = await announced(seed, checkpoint, tmp_path)
    assert records["first"].state is NodeState.DRAINING
    assert records["second"].state is NodeState.ONLINE


def command(*arguments: str) -> str:
    """What a short command of ``swarm-node`` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "swarm.node.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=EXIT_TIMEOUT_S,
        check=True,
    )
    return done.stdout


async def test_the_owner_asks_a_node_for_its_status_and_lets_it_drain(
    start: Start, checkpoint: Path, tmp_path: Path
) -> None:
    seed = start("seed", "seed")
    node = start("join", "node", str(checkpoint), "--peers", seed.address)
    key = ("--identity", str(tmp_path / "node.key"))
    status = json.loads(await asyncio.to_thread(command, "status", "--json", *key))
    assert (status["state"], status["coverage"]) == ("online", [1] * BLOCKS)
    assert status["peer_id"] == node.first_event["peer_id"]
    assert "0:4 of 4" in await asyncio.to_thread(command, "status", *key)
    said = await asyncio.to_thread(command, "drain", "--wait", *key)
    assert said.endswith("the node has left\n")
    code, events = await asyncio.to_thread(node.ended)
    assert (code, events[-1]) == (0, {"event": "stopped"})
    records = await announced(seed, checkpoint, tmp_path)
    assert records["node"].state is NodeState.DRAINING
    assert not (tmp_path / "node.key.control").exists()


async def test_a_node_moves_to_blocks_that_nobody_has_any_more(
    start: Start, checkpoint: Path, tmp_path: Path
) -> None:
    seed = start("seed", "seed")
    arguments = (str(checkpoint), "--peers", seed.address)
    fixed = {
        first: start("join", f"fixed-{first}", *arguments, "--blocks", f"{first}:{first + 2}")
        for first in (0, 2)
    }
    moves = start("join", "moves", *arguments, "--num-blocks", "2")
    target = 2 - moves.first_event["first_block"]
    os.killpg(fixed[target].process.pid, signal.SIGINT)
    await asyncio.to_thread(fixed[target].ended)

    def wait_until_moved() -> NodeStatus:
        with running_node(tmp_path / "moves.key") as node:
            while (status := node.ask("status")) is not None:
                if (status.first_block, status.state) == (target, "online"):
                    return status
                time.sleep(0.2)
        raise AssertionError("the node has ended")

    status = await asyncio.to_thread(wait_until_moved)
    assert status.end_block == target + 2
    record = (await announced(seed, checkpoint, tmp_path))["moves"]
    while record.state is not NodeState.ONLINE:
        record = (await announced(seed, checkpoint, tmp_path))["moves"]
    assert (record.first_block, record.end_block) == (target, target + 2)


def test_a_node_rests_outside_of_its_hours(checkpoint: Path, tmp_path: Path) -> None:
    now = datetime.now()
    past = f"{now - timedelta(hours=3):%H:%M}-{now - timedelta(hours=2):%H:%M}"
    settings = tmp_path / "node.toml"
    settings.write_text(f'model = "{checkpoint}"\nhours = "{past}"\nmetrics = false\n')
    process = subprocess.Popen(
        [sys.executable, "-m", "swarm.node.cli", "join", "--config", str(settings), "--plain"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SWARM_NODE_IDENTITY_PATH": str(tmp_path / "node.key")},
    )
    with process:
        try:
            assert process.stdout is not None
            assert "resting\n" in process.stdout
            assert "works again at" in process.stdout.readline()
            assert psutil.Process(process.pid).children() == [], "no network while it rests"
            process.send_signal(signal.SIGTERM)
            assert process.wait(EXIT_TIMEOUT_S) == 0
        finally:
            process.kill()


def test_a_network_daemon_that_dies_again_and_again_ends_the_peer_with_a_reason(
    start: Start,
) -> None:
    seed = start("seed", "seed")
    process = psutil.Process(seed.process.pid)
    deadline_s = time.monotonic() + EXIT_TIMEOUT_S
    killed: set[int] = set()
    while seed.process.poll() is None:
        assert time.monotonic() < deadline_s
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in process.children():
                if child.name() == "p2pd" and child.pid not in killed:
                    child.kill()
                    killed.add(child.pid)
        time.sleep(0.05)
    assert len(killed) > 1, "it was started again"
    code, events = seed.ended()
    assert code == 4
    assert events[-1]["event"] == "error"
    assert "daemon" in events[-1]["message"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel must tell the daemon")
def test_a_killed_peer_leaves_no_daemon(start: Start) -> None:
    seed = start("seed", "seed")
    daemon = seed.daemon
    seed.process.kill()
    daemon.wait(timeout=EXIT_TIMEOUT_S)


def test_a_second_node_with_the_same_key_is_refused(start: Start) -> None:
    start("seed", "seed")
    second = start("seed", "seed")
    assert second.ended()[0] == 2
    assert "own" in second.first_event["message"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--blocks", "0:5"), 2, "the model has blocks 0:4"),
        (("--memory", "1MB"), 3, "may be used"),
    ],
)
def test_what_cannot_be_hosted_is_said(
    start: Start, checkpoint: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    node = start("join", "node", str(checkpoint), *arguments)
    assert node.first_event["event"] == "error"
    assert words in node.first_event["message"]
    assert node.ended()[0] == code
