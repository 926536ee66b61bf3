"""What holds for all commands: help with examples, completion, no colour where none is wanted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from swarm.client import cli as client_cli
from swarm.node import cli as node_cli

PROGRAMS = {"swarm": client_cli.app, "swarm-node": node_cli.app}


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that does something by itself, with its name."""

    def below(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        children = getattr(command, "commands", {})
        for name, child in children.items():
            yield from below(child, f"{path} {name}")
        if not children or getattr(command, "invoke_without_command", False):
            yield path, command

    for name, app in PROGRAMS.items():
        yield from below(typer.main.get_command(app), name)


@pytest.mark.parametrize(
    ("name", "command"), [pytest.param(*each, id=each[0]) for each in commands()]
)
def test_help_has_examples_and_explains_every_option(name: str, command: Any) -> None:
    assert command.help
    assert "xample" in (command.epilog or ""), "no example"
    assert name in command.epilog
    for parameter in command.params:
        assert parameter.name == "help" or parameter.help, f"{parameter.name} is not explained"


def run(*arguments: str, **environment: str) -> str:
    program = Path(sys.executable).with_name(arguments[0])
    done = subprocess.run(
        [str(program), *arguments[1:]],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_colour(program: str) -> None:
    assert "\033[" in run(program, "--help", FORCE_COLOR="1", NO_COLOR="", TERM="xterm")
    plain = run(program, "--help", FORCE_COLOR="1", NO_COLOR="1", TERM="xterm")
    assert not any(f"\033[{code}" in plain for code in (*range(30, 38), *range(90, 98)))


@pytest.mark.parametrize("program", PROGRAMS)
def test_shells_complete(program: str) -> None:
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    script = run(program, **{variable: "source_bash"})
    assert "complete -o default -F" in script
    words = {"COMP_WORDS": f"{program} ", "COMP_CWORD": "1"}
    offered = run(program, **{variable: "complete_bash"}, **words)
    assert "status" in offered or "generate" in offered


@pytest.mark.parametrize("program", PROGRAMS)
def test_exit_codes_are_told(program: str) -> None:
    assert "Exit codes" in run(program, "--help", COLUMNS="300")
