"""The quickstart as a newcomer runs it, after the installation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
PROMPT = "Say hello in one short sentence."


def test_three_nodes_answer_and_everything_stops(smollm2_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.quickstart", PROMPT]
    lines: list[str] = []
    below: list[psutil.Process] = []
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as quickstart:
        assert quickstart.stdout is not None
        for line in quickstart.stdout:
            lines.append(line)
            if PROMPT in line:  # all are up now
                below = psutil.Process(quickstart.pid).children(recursive=True)
                names = [process.name() for process in below]
                assert names.count("swarm-node") == 4
                assert names.count("p2pd") >= 4
        assert quickstart.wait(60) == 0, "".join(lines)
    (chain,) = (line for line in lines if line.startswith("served by"))
    assert all(node in chain for node in ("node-1", "node-2", "node-3"))
    text = "".join(lines)
    for said in (smollm2_path.name, "tokens/s", "first token", "everything has stopped"):
        assert said in text
    assert below
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
