"""A node's process has one OpenMP team, that of its device thread.

With more OpenMP threads in a process than cores, libgomp lets all of them sleep between two
products, and a step takes a third longer.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import asyncio, json, os, sys
import torch
from swarm.catalogue.checkpoint import Checkpoint
from swarm.node.engine.engine import load_engine_blocking
from swarm.threads import run_in_own_thread

def threads():
    return set(os.listdir("/proc/self/task"))

async def main(path):
    def load():
        before = threads()
        torch.ones(1 << 20).add_(1)
        team = threads() - before
        engine = load_engine_blocking(Checkpoint.open(path), 0, 6, cache_tokens=256, threads=2)
        return engine, team

    engine, team = await run_in_own_thread(load)
    async with asyncio.timeout(10):
        while team & threads():
            await asyncio.sleep(0.01)  # they are ending
    await engine.close()
    print(json.dumps({"helpers": len(team)}))

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux shows them")
async def test_loading_leaves_no_team_behind(make_tiny: Any) -> None:
    ran = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", PROGRAM, str(make_tiny("llama").checkpoint.path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {"helpers": 1}
