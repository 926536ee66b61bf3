"""SIGKILL at 200 seeded moments under load: every receipt ever sent has its voucher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

KILLS = 200


def test_no_receipt_without_its_voucher(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integration.ledger.vouching"]
    done = subprocess.run(
        [*command, str(tmp_path / "books"), "7", str(KILLS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout)
    assert summary["lost"] == []
    assert summary["rounds"] == KILLS
    assert summary["receipts"] > 10 * KILLS
    assert summary["events"] >= summary["sessions"]
