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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.netlab import Gateway, Host, Lab, Link, why_unavailable
from scripts.process_keeper import KeptProcess
from swarm.protocol.identity import Identity
from tests.integration.lab_client import PROMPT

BLOCKS = 4
LINK = Link(latency_ms=5)
START_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 90.0
SEED_PORT = 31330


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
                environment=os.environ
                | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                grace_s=1.0,
            )

    def line(self, timeout_s: float) -> str:
        """The next line; the whole log when there is none in time."""
        stdout = self.process.stdout
        assert stdout is not None
        lines: list[bytes] = []
        reader = threading.Thread(target=lambda: lines.append(stdout.readline()), daemon=True)
        reader.start()
        reader.join(timeout_s)
        if not lines or not lines[0]:
            raise AssertionError(f"said nothing: {self.log.read_text()[-3000:]}")
        return lines[0].decode()

    def ready(self) -> dict[str, Any]:
        """Wait until a peer is online; what it says of itself."""
        while True:
            event: dict[str, Any] = json.loads(self.line(START_TIMEOUT_S))
            if event["event"] != "status":
                assert event["event"] == "ready", event
                return event

    def ask(self, question: str) -> Any:
        stdin = self.process.stdin
        assert stdin is not None
        stdin.write(f"{question}\n".encode())
        stdin.flush()
        return json.loads(self.line(ANSWER_TIMEOUT_S))

    def descendants(self, name: str) -> list[psutil.Process]:
        keeper = psutil.Process(self.process.keeper_pid)
        return [child for child in keeper.children(recursive=True) if child.name() == name]


@dataclass
class Home:
    """A computer behind a router that masquerades."""

    gateway: Gateway
    host: Host


class Country:
    """Seeds in the open, homes behind routers, each pair with a link of its own."""

    def __init__(self, lab: Lab, seeds: int, folder: Path) -> None:
        self.lab = lab
        self._folder = folder
        self.hosts = [lab.host(f"seed{number}") for number in range(seeds)]
        self.homes = {name: self._home(name) for name in ("first", "second", "user")}
        public = [*self.hosts, *(home.gateway for home in self.homes.values())]
        for number, one in enumerate(public):
            for other in public[number + 1 :]:
                lab.link(one, other, LINK)
        self.peers: list[str] = []
        self.seeds: list[Program] = []
        for number, host in enumerate(self.hosts):
            key = folder / f"seed{number}.key"
            peer_id = Identity.load_or_create(key).peer_id
            before = self.peers[:1]
            self.peers.append(f"/ip4/{host.address}/tcp/{SEED_PORT}/p2p/{peer_id}")
            listen = ("--listen", f"/ip4/0.0.0.0/tcp/{SEED_PORT}")
            self.seeds.append(self._peer(host, f"seed{number}", "seed", before, *listen))
            if number == 0:
                self.seeds[0].ready()
        for seed in self.seeds[1:]:
            seed.ready()

    def _home(self, name: str) -> Home:
        gateway = self.lab.gateway(f"router-{name}")
        return Home(gateway, self.lab.host(name, behind=gateway))

    def _peer(
        self, host: Host, name: str, command: str, peers: Sequence[str], *arguments: str
    ) -> Program:
        options = [word for peer in peers for word in ("--peers", peer)]
        settings = ("--json", "--no-metrics", "--name", name, "--log-level", "info")
        program = ("-m", "swarm.node.cli", command, *arguments, *options, *settings)
        key = ("--identity", str(self._folder / f"{name}.key"))
        return Program(host, (*program, *key), self._folder / f"{name}.log")

    def join(self, checkpoint: Path) -> tuple[Program, Program, Program]:
        """Two nodes with half of the model each and a client; what donors type, nothing else."""
        nodes = [
            self._peer(
                self.homes[name].host,
                name,
                "join",
                self.peers,
                *(str(checkpoint), "--blocks", blocks, "--dtype", "float32"),
            )
            for name, blocks in (("first", "0:2"), ("second", "2:4"))
        ]
        program = str(Path(__file__).with_name("lab_client.py"))
        user = Program(
            self.homes["user"].host,
            (program, str(checkpoint), *self.peers),
            self._folder / "user.log",
        )
        for node in nodes:
            # What nobody outside could dial would only cost others time.
            addresses = [one.partition("/p2p/12")[0] for one in node.ready()["addresses"]]
            assert any("44.99." in address for address in addresses)
        assert user.line(START_TIMEOUT_S) == "ready\n"
        return nodes[0], nodes[1], user

    def packets(self, one: str, other: str) -> int:
        """Between two routers, both ways."""
        counts = self.lab.counts()
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


def wait_for_relays(user: Program, *, without: str, at_least: int, timeout_s: float) -> None:
    """Until the directory names only living relays for both nodes."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        nodes = {name: relays_of(addresses) for name, addresses in user.ask("nodes").items()}
        if len(nodes) == 2 and all(
            without not in relays and len(relays) >= at_least for relays in nodes.values()
        ):
            return
        assert time.monotonic() < deadline_s, nodes
        time.sleep(0.2)


def test_served_through_relays_at_once_then_directly_and_relays_are_replaced(
    lab: Lab, checkpoint: Path, tmp_path: Path
) -> None:
    country = Country(lab, seeds=4, folder=tmp_path)
    first, _, user = country.join(checkpoint)
    for addresses in user.ask("nodes").values():
        direct = [address for address in addresses if "/p2p-circuit" not in address]
        assert len(relays_of(addresses)) == 3
        assert all(address.startswith(("/ip4/10.", "/ip4/127.", "/ip6/")) for address in direct)

    # A session that begins through a relay and goes on without one.
    expected = undisturbed(checkpoint, 200)
    assert user.ask("generate 200") == expected

    before = country.packets("first", "second")
    assert user.ask("generate 50") == expected[: len(PROMPT) + 50]
    assert country.packets("first", "second") - before > 50

    relayed = relays_of(user.ask("nodes")["first"])
    victim = next(
        number for number, host in enumerate(country.hosts) if number and host.address in relayed
    )
    country.seeds[victim].process.kill()
    address = country.hosts[victim].address
    wait_for_relays(user, without=address, at_least=3, timeout_s=30)
    assert user.ask("generate 20") == expected[: len(PROMPT) + 20]


def test_one_seed_is_enough_and_may_lose_its_daemon(
    lab: Lab, checkpoint: Path, tmp_path: Path
) -> None:
    country = Country(lab, seeds=1, folder=tmp_path)
    _, _, user = country.join(checkpoint)
    expected = undisturbed(checkpoint, 20)
    assert user.ask("generate 20") == expected
    (daemon,) = country.seeds[0].descendants("p2pd")
    daemon.kill()
    daemon.wait(10)
    wait_for_relays(user, without="nobody", at_least=1, timeout_s=30)
    assert user.ask("generate 20") == expected
