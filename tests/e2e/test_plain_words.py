"""What users read when something is wrong: one line that says what to do, and an exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.local_swarm import LocalSwarm, Span, SwarmPlan

SWARM = Path(sys.executable).with_name("swarm")
SWARM_NODE = Path(sys.executable).with_name("swarm-node")
NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"

USAGE, UNAVAILABLE, NETWORK = 2, 3, 4


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, with its output captured and never a traceback in it."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}
    done = subprocess.run(
        [str(program), *arguments],
        env={**own, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "400"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


def ask(model: Path | str, peers: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(SWARM, "generate", str(model), "Hello", "--peers", peers, *arguments)


@pytest.fixture(scope="module")
def swarm_with_a_hole(smollm2_path: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(SwarmPlan(smollm2_path, (Span(0, 10), Span(20, 30)))) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def small_swarm(smollm2_path: Path) -> Iterator[LocalSwarm]:
    plan = SwarmPlan(smollm2_path, (Span(0, 30),), environment={"SWARM_NODE_CACHE_TOKENS": "64"})
    with LocalSwarm(plan) as swarm:
        yield swarm


def test_blocks_that_nobody_serves_are_named(
    swarm_with_a_hole: LocalSwarm, smollm2_path: Path
) -> None:
    done = ask(smollm2_path, swarm_with_a_hole.peers[0])
    assert done.returncode == UNAVAILABLE
    assert "10-19" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_models_shows_the_hole(swarm_with_a_hole: LocalSwarm, smollm2_path: Path) -> None:
    done = run(SWARM, "models", "--peers", swarm_with_a_hole.peers[0], "--json")
    assert done.returncode == 0, done.stderr
    (model,) = json.loads(done.stdout)["models"]
    assert model["name"] == smollm2_path.name
    assert model["replicas_per_block"] == [1] * 10 + [0] * 10 + [1] * 10


def test_no_room_says_when_to_retry(small_swarm: LocalSwarm, smollm2_path: Path) -> None:
    done = ask(smollm2_path, small_swarm.peers[0], "--max-new-tokens", "500")
    assert done.returncode == UNAVAILABLE
    assert "room" in done.stderr
    assert "again" in done.stderr or "retry" in done.stderr
    fits = ask(smollm2_path, small_swarm.peers[0], "--max-new-tokens", "4", "--raw", "--json")
    assert fits.returncode == 0, fits.stderr
    assert json.loads(fits.stdout)["token_ids"]


def test_a_peer_that_does_not_answer(smollm2_path: Path) -> None:
    done = ask(smollm2_path, NOBODY)
    assert done.returncode == NETWORK
    assert "127.0.0.1/tcp/9" in done.stderr


def test_a_model_that_is_not_there(swarm_with_a_hole: LocalSwarm) -> None:
    for model in ("no-such-model", "./no-such-folder"):
        done = ask(model, swarm_with_a_hole.peers[0])
        assert done.returncode == USAGE
        assert model in done.stderr


def test_an_incomplete_checkpoint(smollm2_path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(smollm2_path, broken, ignore=shutil.ignore_patterns("*.safetensors"))
    done = ask(broken, NOBODY)
    assert done.returncode == USAGE
    assert "incomplete" in done.stderr
    joined = run(SWARM_NODE, "join", str(broken), "--blocks", "0:10", "--plain")
    assert joined.returncode in (USAGE, UNAVAILABLE)
    assert "incomplete" in joined.stdout + joined.stderr


def test_a_truncated_checkpoint(smollm2_path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(smollm2_path, broken, ignore=shutil.ignore_patterns("*.safetensors"))
    with (smollm2_path / "model.safetensors").open("rb") as whole:
        (broken / "model.safetensors").write_bytes(whole.read(1 << 20))
    joined = run(SWARM_NODE, "join", str(broken), "--blocks", "0:10", "--plain")
    assert joined.returncode in (USAGE, UNAVAILABLE)
    assert "model.safetensors" in joined.stdout + joined.stderr


def test_a_model_that_the_swarm_does_not_serve(
    small_swarm: LocalSwarm, smollm2_path: Path, tmp_path: Path
) -> None:
    other = tmp_path / "my-own-model"
    shutil.copytree(smollm2_path, other)
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))
    done = ask(other, small_swarm.peers[0])
    assert done.returncode == UNAVAILABLE
    assert "nobody serves my-own-model" in done.stderr
    assert smollm2_path.name in done.stderr
