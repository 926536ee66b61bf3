"""Does a node's memory stay flat? Hundreds of sessions, with a node that dies again and again.

    python -m scripts.bench.memory MODEL --minutes 8

Two spans with two nodes each. One node of the second span is killed every few seconds and started
again; its sessions are healed by the other three, whose memory is written down. After a warm-up, in
which batches of all sizes have come, a line is fitted to it. A leak grows with the sessions; what
malloc and oneDNN keep does not. Runs of a few minutes end before every number of rows has come,
each of which costs some megabytes once (docs/decisions/0009): there only Python's blocks tell.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from scripts.local_swarm import (
    LocalSwarm,
    Member,
    Place,
    SwarmPlan,
    end_on_sigterm,
    equal_spans,
)
from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.app import SwarmClient
from swarm.client.config import ClientSettings
from swarm.client.hops import SessionRequest
from swarm.client.metrics import ClientMetrics
from swarm.protocol.errors import SwarmError
from swarm.protocol.tensors import DType, WireTensor

WEIGHED_NODE = Path(__file__).with_name("weighed_node.py")
LONGEST_PROMPT = 200
NEW_TOKENS = 24
KINDS = ("resident_bytes", "malloc_used_bytes", "malloc_free_bytes", "python_blocks")


@dataclass(slots=True)
class Counts:
    """What the clients have done so far."""

    sessions: int = 0
    failed: int = 0
    kills: int = 0


class Users:
    """Concurrent sessions through one client."""

    def __init__(self, client: SwarmClient, checkpoint: Checkpoint, counts: Counts) -> None:
        self._client = client
        self._checkpoint = checkpoint
        self._counts = counts

    async def converse(self, dice: random.Random, end_s: float) -> None:
        """One session after the other."""
        size = self._checkpoint.hidden_size
        request = SessionRequest(
            self._checkpoint.revision, size, 1, LONGEST_PROMPT + NEW_TOKENS, DType.FLOAT32
        )
        while time.monotonic() < end_s:
            try:
                chain = await self._client.open_chain(
                    request, number_of_blocks=self._checkpoint.number_of_blocks
                )
                try:
                    for position, tokens in _steps(dice):
                        hidden = bytes(4 * size * tokens)
                        tensor = WireTensor(DType.FLOAT32, (1, tokens, size), hidden)
                        await chain.step(tensor, position, output_tokens=1)
                finally:
                    await chain.close()
            except SwarmError:
                self._counts.failed += 1
            self._counts.sessions += 1


def _steps(dice: random.Random) -> Iterator[tuple[int, int]]:
    """Position and number of tokens of each step; now and then one goes back."""
    position = 0
    prompt = dice.randrange(1, LONGEST_PROMPT)
    for tokens in (prompt, *(1,) * NEW_TOKENS):
        if tokens == 1 and dice.random() < 0.05:
            position -= 1
        yield position, tokens
        position += tokens


async def kill_again_and_again(
    swarm: LocalSwarm, victim: Member, every_s: float, counts: Counts, end_s: float
) -> None:
    """SIGKILL to a node and its daemon; started again at once."""
    while time.monotonic() < end_s:
        await asyncio.sleep(every_s)
        (process,) = psutil.Process(victim.process.keeper_pid).children()
        for each in (process, *process.children(recursive=True)):
            each.send_signal(signal.SIGKILL)
        counts.kills += 1
        victim = await asyncio.to_thread(swarm.restart, victim)


async def run(
    swarm: LocalSwarm, model: Path, minutes: float, users: int, every_s: float
) -> tuple[Counts, ClientMetrics, list[tuple[float, int]]]:
    """Run for so long; how many sessions there were at what time."""
    checkpoint = Checkpoint.open(model)
    counts, metrics = Counts(), ClientMetrics()
    end_s = time.monotonic() + minutes * 60
    progress: list[tuple[float, int]] = []

    async def note() -> None:
        while time.monotonic() < end_s:
            progress.append((time.monotonic(), counts.sessions))
            await asyncio.sleep(2.0)

    settings = ClientSettings(peers=tuple(swarm.peers))
    connected = await SwarmClient.connect(settings, observer=metrics)
    async with connected as client, asyncio.TaskGroup() as group:
        group.create_task(note())
        group.create_task(kill_again_and_again(swarm, swarm.nodes[-1], every_s, counts, end_s))
        for number in range(users):
            dice = random.Random(number)
            group.create_task(Users(client, checkpoint, counts).converse(dice, end_s))
    return counts, metrics, progress


def slope_per_s(points: Sequence[tuple[float, float]]) -> float:
    times, values = zip(*points, strict=True)
    return statistics.linear_regression(times, values).slope


def report(
    console: Console,
    folder: Path,
    survivors: Sequence[tuple[str, int]],
    progress: Sequence[tuple[float, int]],
    warm_up: float,
) -> None:
    """A row for each survivor and each thing that was weighed."""
    first_s, last_s = progress[0][0], progress[-1][0]
    warm_s = first_s + warm_up * (last_s - first_s)
    sessions_per_s = slope_per_s([(at_s, float(n)) for at_s, n in progress if at_s >= warm_s])
    table = Table("node", "of", "warm", "half way", "at the end", "an hour", "a session")
    for name, pid in survivors:
        lines = [json.loads(line) for line in (folder / f"{pid}.jsonl").read_text().splitlines()]
        settled = [line for line in lines if warm_s <= line["at_s"] <= last_s]
        for kind in KINDS:
            slope = slope_per_s([(line["at_s"], float(line[kind])) for line in settled])
            unit, per_session, what = (1e6, 1e3, "kB") if kind != "python_blocks" else (1, 1, "")
            marks = (settled[0], settled[len(settled) // 2], settled[-1])
            table.add_row(
                name,
                kind.removesuffix("_bytes").replace("_", " "),
                *(f"{line[kind] / unit:,.0f}" for line in marks),
                f"{slope * 3600 / unit:+,.1f}",
                f"{slope / max(sessions_per_s, 1e-9) / per_session:+,.2f} {what}",
            )
    console.print(table)
    console.print("  megabytes, and blocks of Python objects")
    console.print(f"  {sessions_per_s:.2f} sessions/s after the warm-up")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.memory")
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--users", type=int, default=4, help="sessions at a time")
    parser.add_argument("--kill-every", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--warm-up", type=float, default=0.4, help="share of the time")
    options = parser.parse_args()
    console = Console()
    end_on_sigterm()
    spans = equal_spans(Checkpoint.open(options.model).number_of_blocks, 2)
    with tempfile.TemporaryDirectory(prefix="swarm-memory-") as folder:
        os.environ["WEIGHED_NODE_FOLDER"] = folder
        plan = SwarmPlan(
            options.model,
            (*spans, *spans),
            threads=1,
            places=(Place(command_prefix=(sys.executable,)),) * 5,
            program=WEIGHED_NODE,
        )
        with LocalSwarm(plan) as swarm:
            survivors = [
                (node.name, psutil.Process(node.process.keeper_pid).children()[0].pid)
                for node in swarm.nodes[:-1]
            ]
            counts, metrics, progress = asyncio.run(
                run(swarm, options.model, options.minutes, options.users, options.kill_every)
            )
        heals = next(
            line.split()[-1]
            for line in metrics.text().splitlines()
            if line.startswith("swarm_client_healing_seconds_count")
        )
        console.print(
            f"  {counts.sessions} sessions ({counts.failed} failed), {counts.kills} kills, "
            f"{float(heals):.0f} heals in {options.minutes:g} min"
        )
        report(console, Path(folder), survivors, progress, options.warm_up)


if __name__ == "__main__":
    main()
