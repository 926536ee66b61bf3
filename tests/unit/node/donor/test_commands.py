from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from swarm.node import cli
from swarm.node.donor.commands import parse_duration
from swarm.protocol.errors import UsageError
from tests.unit.node.donor.answering_node import AnsweringNode


@pytest.fixture
def node() -> Iterator[AnsweringNode]:
    with tempfile.TemporaryDirectory() as folder, AnsweringNode(Path(folder, "key")) as node:
        yield node


def run(node: AnsweringNode, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [*arguments, "--identity", str(node.key)])
    assert result.exit_code == code, result.output
    return result.output


def test_pause_and_resume(node: AnsweringNode) -> None:
    run(node, "pause", "2h")
    run(node, "pause")
    run(node, "resume")
    assert node.asked == [
        {"command": "pause", "for_s": 7200},
        {"command": "pause", "for_s": None},
        {"command": "resume"},
    ]


def test_limits(node: AnsweringNode) -> None:
    assert "upload_bytes_per_s" in run(node, "limits")
    options = ["--upload", "2MB", "--monthly", "none", "--temperature", "80", "--when-idle"]
    answer: dict[str, Any] = json.loads(run(node, "limits", *options, "--json"))
    assert "limits" in answer
    assert node.asked[-1]["changes"] == {
        "upload_bytes_per_s": 2_000_000,
        "monthly_bytes": None,
        "maximum_temperature_c": 80.0,
        "only_when_idle": True,
    }
    run(node, "limits", "--upload", "fast", code=2)
    run(node, "pause", "soon", code=2)


@pytest.mark.parametrize(
    ("text", "seconds"), [(None, None), ("90s", 90), ("1.5 h", 5400), ("2D", 172800)]
)
def test_durations(text: str | None, seconds: float | None) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "-1h", "0h", "2 weeks"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration(text)
