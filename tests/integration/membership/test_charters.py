"""Open, invited and members-only swarms with real processes: who gets in, by which paper."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner, Result

from swarm.client.cli import app as user_app
from swarm.node.cli import app as node_app

LOOPBACK = ("--listen", "/ip4/127.0.0.1/tcp/0")
ANNOUNCE_PERIOD_S = 3.0
PATIENCE_S = 60.0


@dataclass
class Computers:
    """Each name is a computer: it has a data folder of its own."""

    folder: Path
    started: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def environment(self, name: str) -> dict[str, str]:
        home = self.folder / name
        home.mkdir(exist_ok=True)
        return {
            **os.environ,
            "HOME": str(home),
            "SWARM_NODE_DATA_DIR": str(home / "data"),
            "SWARM_NODE_ANNOUNCE_PERIOD_S": str(ANNOUNCE_PERIOD_S),
            "OMP_NUM_THREADS": "1",
        }

    def run(self, name: str, app: Typer, *command: str) -> Result:
        """A command that ends soon, in this process: only peers are processes of their own."""
        return CliRunner().invoke(app, command, env=self.environment(name))

    def start(self, name: str, *command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=self.environment(name),
            cwd=self.folder / name,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started[f"{name} {len(self.started)}"] = process
        return process

    def stop(self, name: str) -> None:
        """Switch a computer off."""
        for started, process in self.started.items():
            if started.split()[0] == name and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def seed(self, name: str, *arguments: str) -> tuple[str, str]:
        """The address of a seed that got in, or empty and why it did not."""
        process = self.start(
            name, "swarm.node.cli", "seed", *LOOPBACK, "--json", "--no-metrics", *arguments
        )
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "ready":
                return str(event["addresses"][0]), ""
            if event["event"] == "error":
                return "", str(event["message"])
        raise AssertionError(f"{name} said nothing")

    def peer_id(self, name: str) -> str:
        return self.run(name, node_app, "identity").stdout.strip()

    def accept(self, name: str, text: str) -> Result:
        return self.run(name, node_app, "accept", text)

    def authority(self, command: str, *arguments: str) -> Result:
        folder = str(self.folder / "authority")
        return self.run("authority", user_app, "authority", command, "--folder", folder, *arguments)


@pytest.fixture
def computers(tmp_path: Path) -> Iterator[Computers]:
    made = Computers(tmp_path)
    yield made
    for name, process in made.started.items():
        made.stop(name.split()[0])
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def found(computers: Computers, admission: str) -> str:
    """A swarm's charter, as text."""
    made = computers.authority("init", "Land", "--admission", admission)
    assert made.exit_code == 0, made.stderr
    return Path(made.stdout.strip()).read_text().strip()


def passport(computers: Computers, name: str, *options: str) -> str:
    issued = computers.authority("issue", computers.peer_id(name), *options)
    assert issued.exit_code == 0, issued.stderr
    return issued.stdout.strip()


def admit(computers: Computers, name: str, charter: str, *options: str) -> None:
    assert computers.accept(name, charter).exit_code == 0
    accepted = computers.accept(name, passport(computers, name, *options))
    assert accepted.exit_code == 0, accepted.stderr


def invite(computers: Computers) -> Result:
    """An invitation for one peer, and a desk that takes it."""
    folder = str(computers.folder / "authority")
    desk = computers.start(
        "desk", "swarm.client.cli", "authority", "desk", "--folder", folder, *LOOPBACK, "--json"
    )
    assert desk.stdout is not None
    address = json.loads(desk.stdout.readline())["addresses"][0].rpartition("/p2p/")[0]
    return computers.authority("invite", "--count", "1", "--at", address)


def test_open(computers: Computers) -> None:
    charter = found(computers, "open")
    admit(computers, "first", charter)
    address, _ = computers.seed("first")
    assert computers.seed("stranger", "--peers", address)[0]
    assert computers.accept("other", charter).exit_code == 0
    assert computers.seed("other", "--peers", address)[0]


def test_invited(computers: Computers) -> None:
    charter = found(computers, "invited")
    admit(computers, "first", charter)
    address, _ = computers.seed("first")
    _, why = computers.seed("stranger", "--peers", address)
    assert "passport" in why
    invited = invite(computers)
    assert invited.exit_code == 0, invited.stderr
    token = invited.stdout.strip()
    accepted = computers.accept("guest", token)
    assert accepted.exit_code == 0, accepted.stderr
    assert computers.seed("guest", "--peers", address)[0]
    late = computers.accept("late", token)
    assert late.exit_code != 0
    assert "used up" in late.stderr


def test_members_only(computers: Computers) -> None:
    charter = found(computers, "members")
    admit(computers, "first", charter)
    address, _ = computers.seed("first")
    # Strangers, with and without the charter.
    assert "passport" in computers.seed("stranger", "--peers", address)[1]
    assert computers.accept("reader", charter).exit_code == 0
    assert "passport" in computers.seed("reader", "--peers", address)[1]
    # Somebody else's passport is not even kept.
    stolen = passport(computers, "member")
    assert computers.accept("reader", stolen).exit_code != 0
    assert computers.authority("invite", "--at", "/ip4/127.0.0.1/tcp/1").exit_code != 0
    admit(computers, "member", charter, "--organisation", "KENET", "--country", "KE")
    member, why = computers.seed("member", "--peers", address)
    assert member, why
    # Revoked: out within one announce period, and not let in again.
    revoked = computers.authority("revoke", computers.peer_id("member"), "--peers", address)
    assert revoked.exit_code == 0, revoked.stderr
    deadline_s = time.monotonic() + PATIENCE_S
    cached = computers.folder / "first" / "data" / "revocations.bin"
    started_s = time.monotonic()
    while not cached.exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert time.monotonic() - started_s <= ANNOUNCE_PERIOD_S + 2
    computers.stop("member")
    assert "revoked" in computers.seed("member", "--peers", address)[1]
    admit(computers, "newcomer", charter)
    assert computers.seed("newcomer", "--peers", address)[0]
