"""SIGKILL at 200 seeded moments of settling: what was answered is kept, and is paid once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

KILLS = 200
REPOSITORY = Path(__file__).parents[3]


def test_killed_while_settling(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.integration.operator.killed_operator", tmp_path, str(KILLS)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["killed"] >= KILLS * 3 // 4
    assert told["answered"] > 0
