"""Weights from peers over slow links: what joins cost the only source, and how long they take.

Five computers in the network lab, each with its own uplink. One has a model of random bytes; four
others fetch all of it at once. The same bytes are copied once over the same link for comparison.

    python -m scripts.bench.weights                  # four joins
    python -m scripts.bench.weights --faults         # and kills, an outage, a liar, a staller
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.netlab import Host, Lab, Link
from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.description import describe_model
from swarm.catalogue.safetensors_file import header_for
from swarm.catalogue.store import Store
from swarm.protocol.identity import Identity
from swarm.protocol.manifest import Manifest, Tensor

JOINERS = 4
PORT = 34500
OUTAGE_S = 30.0
PATIENCE_S = 240.0
SENDER = """
import socket, sys
server = socket.create_server((sys.argv[1], 34499)); print("ready", flush=True)
stream, _ = server.accept(); left = int(sys.argv[2]); block = bytes(1 << 16)
while left > 0: stream.sendall(block[:left]); left -= len(block)
stream.shutdown(socket.SHUT_WR); stream.recv(1)
"""
RECEIVER = """
import socket, sys, time
stream = socket.create_connection((sys.argv[1], 34499)); begin = time.monotonic(); total = 0
while data := stream.recv(1 << 16): total += len(data)
print(time.monotonic() - begin, total)
"""


def write_model(folder: Path, size_bytes: int, blocks: int = 8) -> Path:
    """A checkpoint directory of random bytes."""
    folder.mkdir()
    config = {"model_type": "llama", "num_hidden_layers": blocks, "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    rows = size_bytes // blocks // 128
    tensors = tuple(
        Tensor(f"model.layers.{block}.mlp.up_proj.weight", "bfloat16", (rows, 64))
        for block in range(blocks)
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header_for(tensors))
        for tensor in tensors:
            file.write(random.randbytes(tensor.size_bytes))
    return folder


class Computer:
    """A host with a data folder and one peer."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.folder = folder
        self.folder.mkdir()
        self.identity = Identity.load_or_create(folder / "identity.key")
        self.process: Any = None

    @property
    def address(self) -> str:
        return f"/ip4/{self.host.address}/tcp/{PORT}/p2p/{self.identity.peer_id}"

    def start(self, *arguments: str, module: str = "swarm.node.cli") -> None:
        environment = {
            **os.environ,
            "HOME": str(self.folder),
            "XDG_DATA_HOME": str(self.folder / "share"),
            "SWARM_NODE_DATA_DIR": str(self.folder),
            "SWARM_NODE_ANNOUNCE_PERIOD_S": "10",
        }
        with (self.folder / "log").open("ab") as log:
            self.process = self.host.popen(
                [sys.executable, "-m", module, *arguments],
                environment=environment,
                stdout=log,
                stderr=log,
            )

    def seed(self, *models: str, peers: str = "") -> None:
        """Start a peer that holds these models."""
        arguments = ["seed", "--json", "--no-metrics", "--log-level", "info"]
        arguments += ["--listen", f"/ip4/{self.host.address}/tcp/{PORT}"]
        for model in models:
            arguments += ["--models", model]
        if peers:
            arguments += ["--peers", peers]
        self.start(*arguments)

    def kill(self) -> None:
        """As when the power fails."""
        self.process.kill()

    def has(self, manifest: Manifest) -> bool:
        folder = self.folder / "store" / manifest.digest.hex()
        return all((folder / part.name).exists() for part in manifest.parts)

    def share(self, manifest: Manifest) -> float:
        """Of the bytes, by what the disk has."""
        folder = self.folder / "store" / manifest.digest.hex()
        used = sum(file.stat().st_blocks * 512 for file in folder.glob("*.safetensors*"))
        return used / manifest.total_bytes

    def is_right(self, manifest: Manifest) -> bool:
        """Hash everything again."""
        stored = Store(self.folder / "store").open(manifest.digest)
        return (
            stored is not None
            and stored.recover(manifest.parts) == manifest.number_of_chunks
            and Checkpoint.open(stored.folder).revision == manifest.revision
        )


def plain_copy_s(source: Host, target: Host, size_bytes: int) -> float:
    """One TCP stream with as many bytes over the same links."""
    sender = subprocess.Popen(
        [*source.command_prefix, sys.executable, "-c", SENDER, source.address, str(size_bytes)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert sender.stdout is not None
    sender.stdout.readline()
    said = target.run([sys.executable, "-c", RECEIVER, source.address], timeout_s=PATIENCE_S)
    sender.wait(10)
    return float(said.split()[0])


def wait(what: str, done: Any, patience_s: float = PATIENCE_S) -> float:
    begin_s = time.monotonic()
    while not done():
        if time.monotonic() - begin_s > patience_s:
            raise SystemExit(f"{what}: not within {patience_s:.0f} s")
        time.sleep(0.1)
    return time.monotonic() - begin_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=48.0)
    parser.add_argument("--mbit", type=float, default=16.0, help="of each uplink and downlink")
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--faults", action="store_true")
    options = parser.parse_args()
    size_bytes = int(options.megabytes * 1e6)
    link = Link(latency_ms=options.latency_ms, rate_mbit_s=options.mbit)
    with tempfile.TemporaryDirectory(prefix="swarm-weights-") as temporary, Lab() as lab:
        folder = Path(temporary)
        model = write_model(folder / "Random", size_bytes)
        extra = 2 if options.faults else 0
        hosts = [lab.host(f"h{number}") for number in range(1 + JOINERS + extra)]
        lab.star(hosts, link)
        computers = [Computer(host, folder / host.name) for host in hosts]
        source, joiners = computers[0], computers[1 : 1 + JOINERS]
        manifest = describe_model(Checkpoint.open(model))
        copy_s = plain_copy_s(hosts[0], hosts[1], manifest.total_bytes)
        print(f"plain copy of {manifest.total_bytes / 1e6:.1f} MB: {copy_s:.1f} s", flush=True)
        source.seed(str(model))
        wait("the source", lambda: '"ready"' in (source.folder / "log").read_text())
        for number, bad in enumerate(computers[1 + JOINERS :]):
            kind = ("liar", "staller")[number]
            bad.start(kind, str(model), source.address, module="scripts.faults.bad_seeder")
            wait(kind, lambda bad=bad: "ready" in (bad.folder / "log").read_text())
        before = lab.counts()[f"{hosts[0].name}/up"]["bytes"]
        for joiner in joiners:
            joiner.seed("Random", peers=source.address)
        begin_s = time.monotonic()
        wait("first bytes", lambda: any(joiner.share(manifest) > 0.02 for joiner in joiners))
        begin_s = time.monotonic()
        if options.faults:
            faults(lab, hosts, joiners, source.address, manifest)
        wait("four joins", lambda: all(joiner.has(manifest) for joiner in joiners))
        took_s = time.monotonic() - begin_s
        sent = lab.counts()[f"{hosts[0].name}/up"]["bytes"] - before
        right = [joiner.is_right(manifest) for joiner in joiners]
        print(f"four joins: {took_s:.1f} s, {took_s / copy_s:.2f}x of the plain copy")
        print(f"the source sent {sent / manifest.total_bytes:.2f}x of the model")
        print(f"all chunks verified again: {right}")
        for bad in computers[1 + JOINERS :]:
            said = [
                line for line in (bad.folder / "log").read_text().splitlines() if "sent" in line
            ]
            print(bad.host.name, said[-1:] or "served nobody")
        if not all(right):
            raise SystemExit("wrong weights")


def faults(
    lab: Lab, hosts: list[Host], joiners: list[Computer], peers: str, manifest: Manifest
) -> None:
    """A peer and a joiner killed and started again, an outage of 30 s."""
    first, second, third, _ = joiners
    wait("a fifth", lambda: first.share(manifest) > 0.2)
    first.kill()
    second.kill()
    print("two peers killed", flush=True)
    for host in hosts:
        if host is not third.host:
            lab.cut(third.host, host)
    time.sleep(5)
    first.seed("Random", peers=peers)
    second.seed("Random", peers=peers)
    time.sleep(OUTAGE_S - 5)
    for host in hosts:
        if host is not third.host:
            lab.heal(third.host, host)
    print(f"outage of {OUTAGE_S:.0f} s over", flush=True)


if __name__ == "__main__":
    main()
