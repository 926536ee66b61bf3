"""Nodes and a client behind routers that let nobody in, as at home: real NAT in the network lab.

Needs root and nftables; skipped with the reason elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.netlab import Host, Lab, Link, why_unavailable
from scripts.process_keeper import KeptProcess
from swarm.addresses import is_global
from swarm.protocol.identity import Identity
from tests.integration.lab_client import PROMPT, TOKENS_AFTERWARDS

BLOCKS = 4
T = TypeVar("T")

LONG_ANSWER = 1500
LINK = Link(latency_ms=10)
TIMEOUT_S = 120.0
SEED_PORT = 31330
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
    "SWARM_NODE_ANNOUNCE_PERIOD_S": "5",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.4,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def undisturbed(checkpoint: Path, tokens: int) -> list[int]:
    """What the same model says on one computer."""
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    output = model.generate(torch.tensor([PROMPT]), max_new_tokens=tokens, do_sample=False)
    answer: list[int] = output[0].tolist()
    return answer


class Program:
    """A program on a host of the lab that talks in lines; ends with the lab."""

    def __init__(self, host: Host, command: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as errors:
            self.process: KeptProcess = host.popen(
                [sys.executable, *command],
                environment=os.environ | ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                grace_s=1.0,
            )

    def line(self, timeout_s: float = TIMEOUT_S) -> str:
        """The next line; fails with the log when there is none in time."""
        stdout = self.process.stdout
        assert stdout is not None
        lines: list[bytes] = []
        reader = threading.Thread(target=lambda: lines.append(stdout.readline()), daemon=True)
        reader.start()
        reader.join(timeout_s)
        if not lines or not lines[0]:
            raise AssertionError(f"said nothing: {self.log.read_text()[-3000:]}")
        return lines[0].decode().strip()

    def ready(self) -> None:
        """Wait until ``swarm-node`` is online."""
        while True:
            event: dict[str, Any] = json.loads(self.line())
            if event["event"] != "status":
                assert event["event"] == "ready", event
                return

    def say(self, question: str) -> None:
        stdin = self.process.stdin
        assert stdin is not None
        stdin.write(f"{question}\n".encode())
        stdin.flush()

    def ask(self, question: str) -> Any:
        self.say(question)
        return json.loads(self.line())


class Country:
    """Seeds in the open and homes behind routers; each pair has a link of its own."""

    def __init__(self, lab: Lab, folder: Path, homes: Sequence[str]) -> None:
        self._lab = lab
        self._folder = folder
        self._public: list[Host] = []
        self.homes = {name: self._home(name) for name in homes}
        self.seeds: list[Program] = []
        self.seed_hosts: list[Host] = []
        self.peers: list[str] = []
        """Addresses of the seeds."""

    def _home(self, name: str) -> Host:
        router = self._lab.gateway(f"router-{name}")
        self._connect(router)
        return self._lab.host(name, behind=router)

    def _connect(self, host: Host) -> None:
        for other in self._public:
            self._lab.link(other, host, LINK)
        self._public.append(host)

    def open_seed(self) -> None:
        """Start one more; it joins through the first one."""
        name = f"seed{len(self.seeds)}"
        host = self._lab.host(name)
        self._connect(host)
        peer_id = Identity.load_or_create(self._folder / f"{name}.key").peer_id
        listen = ("--listen", f"/ip4/0.0.0.0/tcp/{SEED_PORT}")
        seed = self.swarm_node(host, name, "seed", *listen, peers=self.peers[:1])
        seed.ready()
        self.seeds.append(seed)
        self.seed_hosts.append(host)
        self.peers.append(f"/ip4/{host.address}/tcp/{SEED_PORT}/p2p/{peer_id}")

    def swarm_node(
        self, host: Host, name: str, command: str, *arguments: str, peers: Sequence[str]
    ) -> Program:
        options = [word for peer in peers for word in ("--peers", peer)]
        settings = ("--json", "--no-metrics", "--name", name, "--log-level", "info")
        key = ("--identity", str(self._folder / f"{name}.key"))
        program = ("-m", "swarm.node.cli", command, *arguments, *options, *settings, *key)
        return Program(host, program, self._folder / f"{name}.log")

    def program(self, name: str, home: str, *arguments: str) -> Program:
        path = str(Path(__file__).with_name(name))
        return Program(self.homes[home], (path, *arguments), self._folder / f"{home}.log")

    def packets(self, one: str, other: str) -> int:
        """Directly between two routers, both ways."""
        counts = self._lab.counts()
        return sum(
            counts[f"router-{one}-router-{other}/{way}"]["packets"] for way in ("up", "down")
        )


@pytest.fixture
def lab() -> Iterator[Lab]:
    reason = why_unavailable()
    if reason is None and shutil.which("nft") is None:
        reason = "NAT needs the package nftables"
    if reason is not None:
        pytest.skip(reason)
    with Lab(seed=7) as lab:
        yield lab


def relays_of(addresses: Sequence[str]) -> set[str]:
    """The hosts through which a node is reached."""
    return {address.split("/")[2] for address in addresses if "/p2p-circuit" in address}


def wait_for(wanted: T, read: Callable[[], T], timeout_s: float) -> None:
    """Read again and again; fails with what was read last."""
    deadline_s = time.monotonic() + timeout_s
    while (current := read()) != wanted:
        assert time.monotonic() < deadline_s, current
        time.sleep(0.2)


def start_country(lab: Lab, checkpoint: Path, folder: Path) -> tuple[Country, Program]:
    """Three seeds, two nodes with half of the model each and a user, these behind routers."""
    country = Country(lab, folder, ("first", "second", "user"))
    for _ in range(3):
        country.open_seed()
    # What donors type; nothing says that there is a router.
    nodes = [
        country.swarm_node(
            country.homes[name],
            name,
            "join",
            *(str(checkpoint), "--blocks", blocks, "--dtype", "float32"),
            peers=country.peers,
        )
        for name, blocks in (("first", "0:2"), ("second", "2:4"))
    ]
    user = country.program("lab_client.py", "user", str(checkpoint), *country.peers)
    for node in nodes:
        node.ready()
    assert user.line() == "ready"
    return country, user


def test_nodes_behind_routers_serve_through_relays_at_once(
    lab: Lab, checkpoint: Path, tmp_path: Path
) -> None:
    country, user = start_country(lab, checkpoint, tmp_path)
    seeds = {host.address for host in country.seed_hosts}
    for addresses in user.ask("nodes").values():
        assert relays_of(addresses) == seeds
        direct = [address for address in addresses if "/p2p-circuit" not in address]
        assert not any(is_global(address) for address in direct)
    expected = undisturbed(checkpoint, 20)
    assert user.ask("generate 20") == expected[: len(PROMPT) + 20]
    assert country.packets("first", "second") == 0


def test_a_session_moves_to_the_hole_and_a_dead_relay_is_replaced(
    lab: Lab, checkpoint: Path, tmp_path: Path
) -> None:
    country, user = start_country(lab, checkpoint, tmp_path)
    expected = undisturbed(checkpoint, LONG_ANSWER)
    punched = tmp_path / "punched"
    # With a fourth peer that tells them how they look from outside, the nodes can punch a hole. It
    # happens in the middle of an answer.
    user.say(f"generate {LONG_ANSWER} until {punched}")
    country.open_seed()
    wait_for(True, lambda: country.packets("first", "second") > TOKENS_AFTERWARDS, 90)
    before = country.packets("first", "second")
    punched.touch()
    answer = json.loads(user.line())
    assert len(PROMPT) + TOKENS_AFTERWARDS < len(answer) < len(expected)
    assert answer == expected[: len(answer)]
    assert country.packets("first", "second") - before > TOKENS_AFTERWARDS

    # A relay dies; another one, which nobody named to the nodes, takes its place. Nodes that give
    # a place only because their daemon cannot refuse are none, though they are connected directly.
    living = {host.address for host in country.seed_hosts} - {country.seed_hosts[1].address}
    country.seeds[1].process.kill()
    wait_for(
        [living, living],
        lambda: [relays_of(addresses) for addresses in user.ask("nodes").values()],
        30,
    )
    assert user.ask("generate 5") == expected[: len(PROMPT) + 5]


def test_one_relay_is_enough_and_may_lose_its_daemon(lab: Lab, tmp_path: Path) -> None:
    country = Country(lab, tmp_path, ("first", "second"))
    country.open_seed()
    started_s = time.monotonic()
    first, second = (
        country.program("lab_peer.py", home, str(tmp_path / f"{home}.key"), *country.peers)
        for home in ("first", "second")
    )
    names = {program: program.line() for program in (first, second)}
    (relay,) = (host.address for host in country.seed_hosts)
    reached = {program: program.ask("addresses") for program in (first, second)}
    assert time.monotonic() - started_s < 15
    for one, other in ((first, second), (second, first)):
        assert relays_of(reached[other]) == {relay}
        assert one.ask(f"open {names[other]} {' '.join(reached[other])}") is True

    keeper = psutil.Process(country.seeds[0].process.keeper_pid)
    (daemon,) = (child for child in keeper.children(recursive=True) if child.name() == "p2pd")
    daemon.kill()
    daemon.wait(10)
    again = f"open {names[second]} {' '.join(reached[second])}"
    wait_for(True, lambda: first.ask(again), 30)
