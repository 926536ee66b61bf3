"""``swarm validator`` as far as it goes without a swarm: what is missing is said, and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swarm.client.cli import app
from swarm.client.joining import EXIT_NETWORK, EXIT_USAGE
from swarm.protocol.identity import Identity

PEER = "/ip4/192.0.2.7/tcp/31330/p2p/12D3KooWA"
AWAY = "http://127.0.0.1:9"
runner = CliRunner()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NO_COLOR", "1")
    Identity.generate().save(tmp_path / "lab.key")
    (tmp_path / "letters.txt").write_text("My aunt kept bees behind the railway station.")
    (tmp_path / "empty.txt").write_text("1 2 3. 4 5 6.")
    (tmp_path / "picture.png").write_bytes(b"\xff\xd8\xff")
    return tmp_path


def run(
    files: Path, *changes: str, prompts: str = "letters.txt", key: str = "lab.key"
) -> list[str]:
    return [
        *("validator", "run", "model", "--peers", PEER, "--operator", AWAY),
        *("--operator-key", "ab" * 32, "--key", str(files / key)),
        *("--prompts", str(files / prompts), "--state", str(files / "state"), *changes),
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"prompts": "empty.txt"}, "there is no text"),
        ({"prompts": "picture.png"}, "no text in UTF-8"),
        ({"key": "nobody.key"}, "nobody.key"),
    ],
)
def test_what_is_wrong_is_named(files: Path, changes: dict[str, str], says: str) -> None:
    result = runner.invoke(app, run(files, **changes))
    assert result.exit_code == EXIT_USAGE, result.output
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_wrong_period_publisher_and_operator_key(files: Path) -> None:
    result = runner.invoke(app, run(files, "--period", "0"))
    assert result.exit_code == EXIT_USAGE
    assert "period" in result.stderr
    result = runner.invoke(app, run(files, "--publisher", "my friend"))
    assert result.exit_code == EXIT_USAGE
    assert "'my friend' is no peer id" in result.stderr
    result = runner.invoke(app, run(files, "--operator-key", "xyz"))
    assert result.exit_code == EXIT_USAGE
    assert "operator_key" in result.stderr


def test_an_operator_that_never_told_whose_key_it_is_must_be_there(files: Path) -> None:
    result = runner.invoke(app, run(files, "--json"))
    assert result.exit_code == EXIT_NETWORK
    assert "does not answer" in json.loads(result.stdout.splitlines()[-1])["error"]


def test_nothing_is_shown_before_there_is_anything(files: Path) -> None:
    result = runner.invoke(app, ["validator", "show", "--state", str(files / "state")])
    assert result.exit_code == EXIT_USAGE
    said = " ".join(result.stderr.split())
    assert f"there is no {files / 'state'}, which swarm validator run makes" in said
    assert "--state" in said
    result = runner.invoke(app, ["validator", "show", "--state", str(files / "letters.txt")])
    assert result.exit_code == EXIT_USAGE
    assert "letters.txt" in result.stderr
