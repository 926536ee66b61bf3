"""``swarm finetune`` as its users run it, while nodes and clients are killed and hops audited."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts.local_swarm import LocalSwarm, Span, SwarmPlan
from swarm.client.finetune.snapshots import Snapshot, Snapshots
from swarm.client.ledger_store import known_reputations
from tests.letters_tokenizer import LETTERS, save_letters_tokenizer
from tests.training_swarm import save_tiny_model

BLOCKS, STEPS, SNAPSHOT_EVERY = 6, 70, 7
SPANS = (Span(0, 3), Span(3, 6), Span(0, 4), Span(2, 6))
"""Whichever of them dies, the others are a chain, with other borders."""
ADAPTER = "adapter_model.safetensors"
SWARM = Path(sys.executable).with_name("swarm")
LONGEST_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "Tiny-Letters"
    save_tiny_model(folder, blocks=BLOCKS)
    save_letters_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of letters drawn by lot, each asked for backwards."""
    dice = random.Random(5)
    file = tmp_path_factory.mktemp("data") / "words.jsonl"
    with file.open("w") as lines:
        for _ in range(40):
            word = "".join(dice.choices(LETTERS[1:-1], k=dice.randint(4, 12)))
            lines.write(json.dumps({"prompt": f"{word} ", "completion": word[::-1]}) + "\n")
    return file


@pytest.fixture(scope="module")
def swarm(model: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(SwarmPlan(model, SPANS, threads=1, metrics=False)) as running:
        yield running


class Training:
    """A running ``swarm finetune``, by what it tells its user."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said: list[str] = []

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read on to a line that fits."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"nothing said that fits {pattern!r}:\n{''.join(self.said)}")

    def last_words(self) -> str:
        """What it says until its end."""
        assert self.process.stderr is not None
        return "".join(self.process.stderr)


@contextmanager
def training(
    swarm: LocalSwarm, model: Path, data: Path, out: Path, *more: str
) -> Iterator[Training]:
    """The command in a process group of its own, as a terminal starts it."""
    command = [
        *(str(SWARM), "finetune", str(model), "--data", str(data), "--out", str(out)),
        *("--peers", swarm.peers[0], "--dtype", "float32", "--steps", str(STEPS)),
        *("--rank", "4", "--target-modules", "q_proj,v_proj,down_proj", "--dropout", "0.1"),
        *("--learning-rate", "3e-3", "--batch-size", "6", "--micro-batch-tokens", "48"),
        *("--in-flight", "2", "--snapshot-every", str(SNAPSHOT_EVERY), *more),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "SWARM_AUDITS": "1",
    }
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        hangs = threading.Timer(LONGEST_S, os.killpg, (process.pid, signal.SIGKILL))
        hangs.start()
        try:
            yield Training(process)
        finally:
            hangs.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def saved(out: Path) -> Snapshot:
    snapshot = Snapshots(out).load_latest()
    assert snapshot is not None
    return snapshot


def steps_counted(snapshot: Snapshot) -> set[float]:
    """What the optimizers of all blocks say how many steps they took."""
    return {float(value) for name, value in snapshot.tensors.items() if name.endswith("#step")}


@pytest.mark.timeout(600)  # it starts nine processes, and the machine may be busy
def test_a_node_and_the_client_are_killed_and_ctrl_c(
    swarm: LocalSwarm, model: Path, data: Path, tmp_path: Path
) -> None:
    """The adapter is that of the undisturbed training; no step is lost or taken twice, and no hop
    is taken for a liar."""
    seed = random.SystemRandom().randrange(1 << 16)
    print(f"seed {seed}")  # shown when this fails
    dice = random.Random(seed)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    with training(swarm, model, data, undisturbed) as first:
        assert "adapter in" in first.last_words()
    assert first.process.returncode == 0

    node_step, client_step, ctrl_c_step = sorted(dice.sample(range(10, STEPS, 10), 3))
    with training(swarm, model, data, disturbed) as second:
        hops = second.wait_for("training through (.*)")[1]
        victim = dice.choice([node for node in swarm.nodes if node.name in hops])
        second.wait_for(f"step {node_step}/{STEPS} ")
        assert victim.process.kill() == -signal.SIGKILL
        swarm.nodes.remove(victim)
        back_to = int(second.wait_for(r"going on from step (\d+)")[1])
        assert back_to % SNAPSHOT_EVERY == 0
        assert victim.name not in second.wait_for("training through (.*)")[1]
        second.wait_for(f"step {client_step}/{STEPS} ")
        os.kill(second.process.pid, signal.SIGKILL)
    assert second.process.returncode == -signal.SIGKILL
    assert not (disturbed / ADAPTER).exists()
    assert saved(disturbed).step % SNAPSHOT_EVERY == 0

    with training(swarm, model, data, disturbed, "--resume") as third:
        third.wait_for(f"step {ctrl_c_step}/{STEPS} ")
        os.killpg(third.process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the whole group
        stopped_after = int(third.wait_for(r"stopped after step (\d+)")[1])
        third.last_words()
    assert third.process.returncode == 0
    assert ctrl_c_step <= stopped_after < STEPS
    assert saved(disturbed).step == stopped_after

    with training(swarm, model, data, disturbed, "--resume") as last:
        assert "adapter in" in last.last_words()
    assert last.process.returncode == 0
    expected, got = saved(undisturbed), saved(disturbed)
    assert expected.step == got.step == STEPS
    assert steps_counted(expected) == steps_counted(got) == {float(STEPS)}
    assert len(got.losses) == STEPS
    assert got.losses == pytest.approx(expected.losses, rel=1e-3)
    tensors, wanted = load_file(disturbed / ADAPTER), load_file(undisturbed / ADAPTER)
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert float(torch.norm(tensors[name] - tensor) / torch.norm(tensor)) < 1e-3, name
    found = known_reputations(Path(os.environ["SWARM_LEDGER_FILE"]))
    audited = [found.of(peer) for peer in found.peers]
    assert sum(each.clean for each in audited) > 0
    assert not any(each.failed_segments or each.disputed_with for each in audited)
    (points,) = re.findall(r'<polyline points="([^"]+)"', (disturbed / "loss.svg").read_text())
    assert len(points.split()) == STEPS
