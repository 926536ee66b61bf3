"""The command line: help at once, exit codes, one line for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swarm.node.cli import app, exit_code
from swarm.protocol.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    NetworkError,
    NoRouteError,
    SwarmError,
    UsageError,
)

HEAVY = ("torch", "transformers", "hivemind", "prometheus_client")


@pytest.fixture(autouse=True)
def _without_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("SWARM_NODE_MODEL", raising=False)


@pytest.mark.parametrize("command", ["join", "seed", "drain", "status", "doctor"])
def test_help_explains_and_gives_examples(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"swarm-node {command} " in result.stdout
    assert "Examples" in result.stdout


def test_help_needs_no_heavy_package() -> None:
    program = (
        "import sys; from swarm.node.cli import app;"
        "app(['join', '--help'], standalone_mode=False);"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["join"], "model is not set"),
        (["join", "m", "--blocks", "ten"], "write FIRST:END"),
        (["join", "m", "--blocks", "0:2", "--num-blocks", "2"], "not both"),
        (["join", "m", "--config", "absent.toml"], "cannot read absent.toml"),
        (["join", "m", "--peers", "192.0.2.1"], "/p2p/"),
        (["join", "m", "--hours", "night"], "20:00-08:00"),
        (["drain", "--identity", "absent.key"], "no running node with the key absent.key"),
        (["status", "--identity", "absent.key"], "no running node with the key absent.key"),
        (["seed", "--nonsense"], "No such option"),
        (["fly"], "No such command"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_line(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_programs_get_the_error_as_an_event() -> None:
    result = CliRunner().invoke(app, ["join", "m", "--device", "tpu", "--json"])
    assert result.exit_code == 2
    event = json.loads(result.stdout)
    assert event["event"] == "error"
    assert "tpu" in event["message"]


def test_flags_win_over_the_config_file(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text('model = "m"\nblocks = "0:10"\n')
    result = CliRunner().invoke(app, ["join", "--config", str(path), "--num-blocks", "3"])
    assert result.exit_code == 2
    assert "not both" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (ConfigError("x"), 2),
        (CheckpointError("x"), 3),
        (CapacityError("x"), 3),
        (NetworkError("x"), 4),
        (NoRouteError("x"), 4),
    ],
)
def test_exit_codes(error: SwarmError, code: int) -> None:
    assert exit_code(error) == code
