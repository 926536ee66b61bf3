"""The command line, as far as it goes without a swarm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from swarm.client import cli, joining, model_commands
from swarm.protocol.errors import (
    ErrorCode,
    NetworkError,
    NoRouteError,
    PeerUnreachable,
    RemoteError,
    SwarmError,
    UsageError,
)

PEER = "/ip4/192.0.2.7/tcp/31330/p2p/12D3KooWA"
runner = CliRunner()


@pytest.fixture(autouse=True)
def _no_peers_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWARM_PEERS", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["models"], ["validator", "run"]])
def test_help(command: list[str]) -> None:
    result = runner.invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
    assert "swarm" in result.output
    if command:
        assert "Examples" in result.output
        assert "--json" in result.output


@pytest.fixture(autouse=True)
def no_peers_of_earlier_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SWARM_PEERS_FILE", str(tmp_path / "peers"))


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, swarm.client, swarm.client.cli\n"
        "heavy = {'torch', 'transformers', 'hivemind', 'numpy', 'huggingface_hub'}\n"
        "sys.exit(','.join(heavy & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_peers() -> None:
    result = runner.invoke(cli.app, ["models"])
    assert result.exit_code == joining.EXIT_USAGE
    assert "no peers to join through" in result.stderr
    assert "Traceback" not in result.stderr


def test_errors_as_json() -> None:
    result = runner.invoke(cli.app, ["generate", "model", "hello", "--json"])
    assert result.exit_code == joining.EXIT_USAGE
    error = json.loads(result.stdout)
    assert error["kind"] == "ConfigError"
    assert not result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "no/such/model", "hello", "--peers", PEER, "--top-p", "7"],
        ["generate", "/no/such/model", "hello", "--peers", PEER, "--raw", "--system", "x"],
        ["generate", "/no/such/model", "  ", "--peers", PEER],
        ["generate", "/no/such/model", "hello", "--peers", "here"],
        ["generate"],
        ["conquer"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    assert runner.invoke(cli.app, arguments).exit_code == joining.EXIT_USAGE


ERRORS = [
    (UsageError("no"), 2, "no"),
    (NoRouteError("blocks 3:5 are served by nobody", missing_blocks=(3, 4)), 3, "blocks 3:5"),
    (NoRouteError("no room", retry_after_ms=4000), 3, "retry in 4 s"),
    (RemoteError(ErrorCode.NO_CAPACITY, peer="a node", retry_after_ms=2000), 3, "retry"),
    (NetworkError("gone"), 4, "gone"),
    (PeerUnreachable("not there"), 4, "not there"),
]


@pytest.mark.parametrize(("error", "code", "says"), ERRORS)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, error: SwarmError, code: int, says: str
) -> None:
    @contextmanager
    def fail(settings: Any) -> Iterator[Any]:
        raise error
        yield

    monkeypatch.setattr(model_commands, "connected", fail)
    result = runner.invoke(cli.app, ["models", "--peers", PEER])
    assert result.exit_code == code
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1

    as_json = json.loads(runner.invoke(cli.app, ["models", "--peers", PEER, "--json"]).stdout)
    assert says in as_json["error"]
    if isinstance(error, NoRouteError):
        assert as_json["missing_blocks"] == list(error.missing_blocks)
