"""Which replicas do clients choose? Real nodes and clients on hosts of the network lab.

    python -m scripts.bench.routing MODEL            # needs root, for the network lab

Two nodes hold the whole model. First both are equally near, then one is far away; in both cases
some clients open sessions over and over, some at the same time, and compute a few tokens in each.
The table shows the share of sessions that each node got, and how long opening took.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scripts.local_swarm import LocalSwarm, Place, Span, SwarmPlan
from scripts.netlab import Lab, Link
from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.app import SwarmClient
from swarm.client.config import ClientSettings
from swarm.client.hops import SessionRequest
from swarm.protocol.tensors import DType, WireTensor

NEAR = Link(latency_ms=5.0, jitter_ms=1.0)
FAR = Link(latency_ms=75.0, jitter_ms=5.0)
PAUSE_S = 0.3
"""Mean pause of a client between two sessions."""
STEPS = 8


@dataclass(frozen=True, slots=True)
class Usage:
    """What the clients got."""

    shares: tuple[float, ...]
    """Of all sessions, by node."""
    median_open_s: float


def usage(model: Path, links: Sequence[Link], *, clients: int, sessions: int) -> Usage:
    """Start a node at the end of each link, each with all blocks, and clients that use them."""
    checkpoint = Checkpoint.open(model)
    blocks = checkpoint.number_of_blocks
    with Lab(seed=1) as lab, tempfile.TemporaryDirectory(prefix="swarm-bench-") as logs:
        user, seed = lab.host("user"), lab.host("seed")
        nodes = [lab.host(f"node-{number}") for number in range(1, len(links) + 1)]
        lab.link(user, seed, NEAR)
        for node, link in zip(nodes, links, strict=True):
            lab.link(user, node, link)
            lab.link(seed, node, link)
            for other in nodes[: nodes.index(node)]:
                lab.link(other, node, link)
        plan = SwarmPlan(
            model,
            (Span(0, blocks),) * len(nodes),
            threads=1,
            logs=Path(logs),
            places=tuple(Place(host.address, host.command_prefix) for host in (seed, *nodes)),
        )
        with LocalSwarm(plan) as swarm:
            output = user.run(
                [
                    *(sys.executable, "-m", "scripts.bench.routing", str(model)),
                    *("--peer", swarm.peers[0], "--clients", str(clients)),
                    *("--sessions", str(sessions)),
                ],
                timeout_s=300.0,
            )
            opened = [json.loads(line) for line in output.splitlines()]
            peers = [session["peer_id"] for session in opened]
            return Usage(
                tuple(peers.count(node.peer_id) / len(peers) for node in swarm.nodes),
                statistics.median(session["open_s"] for session in opened),
            )


# --- on the host of the users --------------------------------------------------------------------
async def use(model: Path, peer: str, clients: int, sessions: int) -> None:
    """Be several clients at once; print a line of JSON for each session."""
    checkpoint = Checkpoint.open(model)
    size = checkpoint.hidden_size
    request = SessionRequest(checkpoint.revision, size, 1, 2 * STEPS, DType.FLOAT32)
    token = WireTensor(DType.FLOAT32, (1, 1, size), bytes(4 * size))
    dice = random.Random(1)

    async def be_a_client() -> None:
        settings = ClientSettings(peers=(peer,), connect_timeout_s=60.0)
        async with await SwarmClient.connect(settings) as client:
            for _ in range(sessions):
                await asyncio.sleep(dice.expovariate(1 / PAUSE_S))
                started_s = time.perf_counter()
                chain = await client.open_chain(
                    request, number_of_blocks=checkpoint.number_of_blocks
                )
                open_s = time.perf_counter() - started_s
                for position in range(STEPS):
                    await chain.step(token, position, output_tokens=1)
                hop = chain.plan.hops[0]
                await chain.close()
                print(json.dumps({"peer_id": hop.peer_id, "open_s": open_s}), flush=True)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(be_a_client())


def main() -> None:
    """Measure both cases and print the table."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.routing")
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--sessions", type=int, default=10, help="of each client")
    parser.add_argument("--peer", help=argparse.SUPPRESS)  # on the users' host
    options = parser.parse_args()
    if options.peer is not None:
        asyncio.run(use(options.model, options.peer, options.clients, options.sessions))
        return
    console = Console()
    table = Table("second node", "sessions of the first", "of the second", "median open, s")
    for name, second in (("equally near", NEAR), ("far away", FAR)):
        with console.status(name):
            got = usage(
                options.model,
                (NEAR, second),
                clients=options.clients,
                sessions=options.sessions,
            )
        table.add_row(name, *(f"{share:.1%}" for share in got.shares), f"{got.median_open_s:.2f}")
    console.print(table)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.stderr)
