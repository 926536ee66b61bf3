"""How the status page does with a swarm of ten thousand nodes.

    python -m scripts.bench.status_page                     # 10,000 nodes, 200 requests/s, 60 s
    python -m scripts.bench.status_page --serve --nodes 100 # only serve it, to look at

The page runs in a process of its own, over a directory with as many signed announcements, which it
reads anew in each period while it answers, and pings some of their nodes. Requests are sent when
they are due, whether earlier ones were answered or not, and timed from then on: a page that stops
for a second shows it. They are a mix of what readers ask: overviews and nodes in four languages,
single donors, JSON.
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
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from scripts.process_keeper import KeptProcess
from swarm.memory_network import MemoryNetwork
from swarm.protocol.identity import Identity
from swarm.protocol.version import STREAM_PROTOCOL
from swarm.simulation.announced import AnnouncedSwarm, answer_pings
from swarm.status.languages import LANGUAGES
from swarm.status.status_page import StatusPage, StatusSettings, served
from swarm.status.undisturbed import UndisturbedLooks
from swarm.virtual_time import LoopClock

START_DEADLINE_S = 180.0


async def serve(nodes: int, port: int, period_s: float, folder: Path) -> None:
    """The page over simulated announcements, until cancelled."""
    clock = LoopClock()
    swarm = AnnouncedSwarm.of(nodes, clock)
    settings = StatusSettings(database=folder / "status.sqlite", port=port, period_s=period_s)
    network = MemoryNetwork(0)
    for identity in swarm.identities:
        await network.join(identity).serve(STREAM_PROTOCOL, answer_pings)
    page = StatusPage(
        settings,
        swarm,
        clock,
        transport=network.join(Identity.generate()),
        around_look=UndisturbedLooks(),
    )
    try:
        async with served(page) as url, asyncio.TaskGroup() as group:
            group.create_task(page.run())
            print(json.dumps({"event": "ready", "url": url}), flush=True)
            await asyncio.Event().wait()
    finally:
        page.close()


@dataclass
class Load:
    """What was sent and how it was answered."""

    latencies_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    received_bytes: int = 0


async def send(reader: aiohttp.ClientSession, url: str, due_s: float, load: Load) -> None:
    async with reader.get(url) as answer:
        load.received_bytes += len(await answer.read())
        load.statuses[answer.status] += 1
    load.latencies_s.append(time.perf_counter() - due_s)


async def put_load(url: str, peers: list[str], rate: float, duration_s: float) -> Load:
    """Requests at a steady rate, each at its time."""
    dice = random.Random(0)
    revision = bytes(32).hex()

    def path() -> str:
        code = dice.choice(LANGUAGES)
        kind = dice.random()
        if kind < 0.4:
            return f"/{code}/"
        if kind < 0.6:
            return f"/{code}/nodes?page={dice.randrange(1, 200)}"
        if kind < 0.8:
            return f"/{code}/donors/{dice.choice(peers)}"
        if kind < 0.9:
            return f"/{code}/models/{revision}"
        return f"/api/v1/nodes?offset={dice.randrange(100) * 100}&limit=100"

    load = Load()
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(url, connector=connector) as reader,
        asyncio.TaskGroup() as group,
    ):
        begun_s = time.perf_counter()
        for number in range(round(rate * duration_s)):
            due_s = begun_s + number / rate
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            group.create_task(send(reader, path(), due_s, load))
    return load


async def measure(url: str, nodes: int, rate: float, duration_s: float) -> None:
    async with aiohttp.ClientSession(url) as reader:
        started_s = time.perf_counter()
        peers: list[str] = []
        while len(peers) < nodes:
            peers = []
            for offset in range(0, nodes, 500):
                async with reader.get(f"/api/v1/nodes?offset={offset}&limit=500") as answer:
                    peers += [node["peer_id"] for node in (await answer.json())["nodes"]]
            if time.perf_counter() - started_s > START_DEADLINE_S:
                raise TimeoutError(f"only {len(peers)} of {nodes} nodes were found")
            await asyncio.sleep(0.5)
        print(
            f"all {nodes} nodes were shown {time.perf_counter() - started_s:.1f} s after the start"
        )
        load = await put_load(url, peers, rate, duration_s)
        async with reader.get("/metrics") as answer:
            metrics = await answer.text()
    millis = sorted(latency * 1000 for latency in load.latencies_s)
    quantiles = statistics.quantiles(millis, n=1000)
    print(
        f"{rate:.0f} requests/s for {duration_s:.0f} s: p50 {quantiles[499]:.1f} ms,"
        f" p90 {quantiles[899]:.1f} ms, p99 {quantiles[989]:.1f} ms, longest {millis[-1]:.1f} ms;"
        f" statuses {dict(load.statuses)}, {load.received_bytes / len(millis) / 1000:.1f} kB each"
    )
    looks = dict(
        line.split() for line in metrics.splitlines() if line.startswith("swarm_status_look_")
    )
    count = float(looks["swarm_status_look_seconds_count"])
    mean_s = float(looks["swarm_status_look_seconds_sum"]) / count
    print(f"{count:.0f} looks, {mean_s:.2f} s of work each, in a thread beside the answers")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.status_page")
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=200.0, help="requests per second")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds")
    parser.add_argument("--period", type=float, default=30.0, help="seconds between two looks")
    parser.add_argument("--serve", action="store_true", help="only serve the page")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the page's memory; else a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="status-page-") as temporary:
        folder = options.folder or Path(temporary)
        if options.serve:
            asyncio.run(serve(options.nodes, options.port, options.period, folder))
            return
        command = [sys.executable, "-m", "scripts.bench.status_page", "--serve"]
        command += ["--nodes", str(options.nodes), "--period", str(options.period)]
        command += ["--folder", str(folder)]
        with KeptProcess(command, stdout=subprocess.PIPE) as process:
            stdout = process.stdout
            if stdout is None:
                raise AssertionError("it was asked for")
            url = json.loads(stdout.readline())["url"]
            asyncio.run(measure(url, options.nodes, options.rate, options.duration))


if __name__ == "__main__":
    main()
