"""The quickstart as a newcomer runs it, after the installation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]


def test_three_nodes_answer_and_everything_stops(smollm2_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.quickstart", "Say hello in one short sentence."]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert smollm2_path.name in done.stdout
    for node in ("node-1", "node-2", "node-3"):
        assert re.search(rf"served by .*{node}", done.stdout, re.DOTALL)
    assert "tokens/s" in done.stdout
    assert "first token" in done.stdout
    assert "everything has stopped" in done.stdout
    # The keepers of its processes were our descendants, and so were the nodes and their daemons.
    names = [child.name() for child in psutil.Process().children(recursive=True)]
    assert "p2pd" not in names
    assert "swarm-node" not in names
