"""What holds for all commands: help with examples, completion, no colour where none is wanted."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from swarm.client import cli as client_cli
from swarm.client.config import LEDGER_FILE_VARIABLE
from swarm.ledger import feed, node_books
from swarm.ledger.notes import VerifierKey
from swarm.node import cli as node_cli
from swarm.protocol.identity import Identity

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


WITHOUT_JSON = {"swarm-node ledger export": "prints JSON lines in any case: they are the export"}


@pytest.mark.parametrize(
    ("name", "command"), [pytest.param(*each, id=each[0]) for each in commands()]
)
def test_every_command_answers_programs(name: str, command: Any) -> None:
    has_flag = any("--json" in parameter.opts for parameter in command.params)
    assert has_flag != (name in WITHOUT_JSON), WITHOUT_JSON.get(name)


def test_what_has_no_json_is_a_command() -> None:
    assert WITHOUT_JSON.keys() <= dict(commands()).keys()


def asked(line: str, *more: str | Path) -> tuple[int, Any]:
    """The exit code, and the one JSON object that a command prints; for those with no network."""
    program, *arguments = line.split()
    done = CliRunner().invoke(PROGRAMS[program], [*arguments, *map(str, more), "--json"])
    (printed,) = done.stdout.splitlines()
    return done.exit_code, json.loads(printed)


def test_programs_can_run_an_operator(tmp_path: Path) -> None:
    """From the keys to an order with two signatures, by what the commands print alone."""
    keys = []
    for name in "abc":
        code, made = asked("swarm operator key", tmp_path / name)
        assert code == 0
        assert Identity.load(Path(made["file"])).peer_id == made["peer_id"]
        keys.append(made)
    mint_keys = [part for made in keys for part in ("--mint-key", made["public_key"])]
    origin = ("--origin", "operator.example/ledger")
    code, made = asked("swarm operator init", tmp_path / "books", *origin, *mint_keys)
    assert code == 0
    order = tmp_path / "order.json"
    reason = ("--reason", "a test", *origin)
    drafted = asked("swarm operator draft-mint public 5", order, "--key", keys[0]["file"], *reason)
    assert drafted == (0, {"file": str(order), "order": drafted[1]["order"], "signatures": 1})
    assert drafted[1]["order"]["budget"] == "public"
    code, signed = asked("swarm operator sign", order, "--key", keys[1]["file"])
    assert (code, signed["signatures"]) == (0, 2)
    assert signed["order"] == drafted[1]["order"]
    code, watching = asked(
        "swarm witness init", tmp_path / "w", "--name", "w.example", "--log", made["log_key"]
    )
    assert code == 0
    assert VerifierKey.parse(watching["key"]).name == "w.example"


def test_programs_can_ask_a_node_and_its_books(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LEDGER_FILE_VARIABLE, str(tmp_path / "missing"))
    key = ("--identity", tmp_path / "node.key")
    code, made = asked("swarm-node identity", *key)
    assert code == 0
    assert Identity.load(tmp_path / "node.key").peer_id == made["peer_id"]
    books = tmp_path / "node.ledger"
    with closing(sqlite3.connect(books)) as database, database:
        database.executescript(node_books.SCHEMA)
        feed.append(database, "allowance", {"serial": "1"})
    code, held = asked("swarm-node ledger verify", *key)
    assert (code, held["events"]) == (0, 1)
    assert asked("swarm ledger verify", "--node-ledger", books)[1]["events"]["node"] == 1
    with closing(sqlite3.connect(books)) as database, database:
        database.execute("UPDATE feed SET body = ?", ('{"serial":"2"}',))
    for line, options in (("swarm-node ledger", key), ("swarm ledger", ("--node-ledger", books))):
        code, said = asked(f"{line} verify", *options)
        assert code == 1
        assert "was changed" in str(said)


@pytest.mark.parametrize(
    "line",
    [
        "swarm operator sign {missing} --key {missing}",
        "swarm operator run {missing}",
        "swarm witness run {missing}",
        "swarm audit show --ledger {missing}",
        "swarm audit calibrate {missing} --text {missing}",
        "swarm ledger verify --ledger {missing}",
        "swarm ledger prove {missing}/proof --node-ledger {missing}",
        "swarm models mirror {missing} model --config {missing}",
        "swarm kit make {missing} model --config {missing}",
        "swarm-node ledger verify --identity {missing}",
        "swarm-node accept {missing} --identity {missing}",
        "swarm-node service install --config {missing}",
        "swarm-node status --identity {missing}",
    ],
)
def test_programs_read_what_is_wrong(tmp_path: Path, line: str) -> None:
    code, said = asked(line.format(missing=tmp_path / "missing"))
    assert code == 2
    assert said.get("error") or said.get("message")


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
