"""Does a node keep to its owner's bandwidth caps, over thirty seconds?

    python -m scripts.bench.bandwidth                # three minutes on loopback

Real node processes, with caps as an owner sets them: by ``swarm-node limits`` while the node runs,
or in the settings of a node that starts. What passed is counted at the other end. A node with a
model of one narrow block gets activations and sends them back, on several sessions of this process
at once. A node with the demo model sends weights to this process; another one has none, and fetches
them, which is seen on its disk. Without caps each of these is many times faster. Exits with 1 when
a rate is off its cap by more than a tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from scripts.local_swarm import (
    LOOPBACK,
    SWARM_NODE,
    LocalSwarm,
    Member,
    Span,
    SwarmPlan,
    end_on_sigterm,
)
from scripts.prepare_demo_model import prepare_with_progress
from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.library import Library, LibrarySettings
from swarm.client.app import SwarmClient
from swarm.client.hops import SessionRequest
from swarm.hivemind_network import HivemindNetwork, NetworkSettings
from swarm.node.donor.bandwidth import CappedNetwork, Pace
from swarm.protocol.identity import Identity
from swarm.protocol.tensors import DType, WireTensor
from swarm.virtual_time import LoopClock

TOLERANCE = 0.1
WARM_S = 4.0
SESSIONS = 4
TOKENS = 64
"""In a step: messages of 147 kB for the demo model."""
PATIENCE_S = 90.0
"""Until a peer has heard of the weights and has some."""
LEAST_FETCHED_BYTES = 8_000_000
"""The first chunks are not counted: a quiet node has some time to spare."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Measured:
    """What passed in one direction."""

    what: str
    cap_bytes_per_s: float
    rate_bytes_per_s: float

    @property
    def ratio(self) -> float:
        return self.rate_bytes_per_s / self.cap_bytes_per_s

    @property
    def holds(self) -> bool:
        return abs(self.ratio - 1) <= TOLERANCE

    def __str__(self) -> str:
        return (
            f"{self.what:24} cap {self.cap_bytes_per_s / 1000:7,.0f} kB/s   "
            f"measured {self.rate_bytes_per_s / 1000:7,.0f} kB/s   ratio {self.ratio:.3f}"
            f"{'' if self.holds else '   OFF'}"
        )


class CountedNetwork(CappedNetwork):
    """Our own end: no cap, only counters of whole messages."""

    def __init__(self, network: HivemindNetwork) -> None:
        self.sent, self.received = Pace(LoopClock()), Pace(LoopClock())
        super().__init__(network, self.sent, self.received)
        self.close = network.close


@asynccontextmanager
async def joined(peers: tuple[str, ...], folder: Path) -> AsyncIterator[CountedNetwork]:
    """A peer of the swarm that counts."""
    key = folder / "bench.key"
    Identity.load_or_create(key)
    network = CountedNetwork(
        await HivemindNetwork.create(
            key,
            NetworkSettings(
                listen_addresses=("/ip4/127.0.0.1/tcp/0",),
                initial_peers=peers,
                serve_directory=False,
            ),
        )
    )
    try:
        yield network
    finally:
        await network.close()


def set_caps(node: Member, upload: int | None, download: int | None) -> None:
    """As the owner does it, while the node runs."""
    values = ("none" if each is None else str(each) for each in (upload, download))
    options = [
        part for pair in zip(("--upload", "--download"), values, strict=True) for part in pair
    ]
    subprocess.run(
        [str(SWARM_NODE), "limits", *options, "--identity", str(node.key), "--json"],
        check=True,
        stdout=subprocess.DEVNULL,
    )


async def counted_rates(counters: Mapping[str, Pace], duration_s: float) -> dict[str, float]:
    """Bytes per second of each, from a while after now on."""
    await asyncio.sleep(WARM_S)
    before = {name: pace.total_bytes for name, pace in counters.items()}
    begin_s = time.monotonic()
    await asyncio.sleep(duration_s)
    passed_s = time.monotonic() - begin_s
    return {name: (pace.total_bytes - before[name]) / passed_s for name, pace in counters.items()}


# --- what passes
async def activations(
    network: CountedNetwork, checkpoint: Checkpoint, duration_s: float
) -> dict[str, float]:
    """Several sessions through the model, each sending and getting back as fast as it can."""
    shape = (1, TOKENS, checkpoint.hidden_size)
    dice = random.Random(0)
    numbers = [dice.gauss(0, 1) for _ in range(math.prod(shape))]
    tensor = WireTensor(DType.FLOAT32, shape, struct.pack(f"<{len(numbers)}f", *numbers))
    request = SessionRequest(checkpoint.revision, checkpoint.hidden_size, 1, TOKENS, DType.FLOAT32)

    async def session(client: SwarmClient) -> None:
        chain = await client.open_chain(request, number_of_blocks=checkpoint.number_of_blocks)
        try:
            while True:
                await chain.step(tensor, 0, output_tokens=TOKENS)
        finally:
            await chain.close()

    async with SwarmClient(network) as client, asyncio.TaskGroup() as group:
        tasks = [group.create_task(session(client)) for _ in range(SESSIONS)]
        rates = await counted_rates({"down": network.sent, "up": network.received}, duration_s)
        for task in tasks:
            task.cancel()
    return rates


async def weights(network: CountedNetwork, name: str, folder: Path, duration_s: float) -> float:
    """Fetch chunks from the node; how fast they come."""
    library = Library(network, network, LoopClock(), LibrarySettings(folder=folder / "store"))
    async with asyncio.timeout(PATIENCE_S):
        while (stored := await library.locate(name)) is None:  # noqa: ASYNC110
            await asyncio.sleep(1.0)
    async with asyncio.TaskGroup() as group:
        fetching = group.create_task(library.fetch(stored, stored.manifest.parts))
        rates = await counted_rates({"down": network.received}, duration_s)
        if fetching.done():
            raise SystemExit("all weights came before the time was over: set a lower cap")
        fetching.cancel()
    return rates["down"]


def fetched_rate(store: Path, node: Member, duration_s: float) -> float:
    """Of what a node fetches: from the arrival of one chunk to that of another, on its disk."""
    begin_s = time.monotonic()
    arrivals: list[tuple[float, int]] = []
    while not arrivals or arrivals[-1][0] - arrivals[0][0] < duration_s:
        size_bytes = sum(file.stat().st_blocks * 512 for file in store.glob("*/*.safetensors*"))
        now_s = time.monotonic()
        if node.process.poll() is not None or now_s - begin_s > PATIENCE_S + duration_s:
            raise SystemExit(f"the node does not fetch; see {node.log}")
        if size_bytes > max(LEAST_FETCHED_BYTES, arrivals[-1][1] if arrivals else 0):
            arrivals.append((now_s, size_bytes))
        time.sleep(0.02)
    (first_s, first_bytes), (last_s, last_bytes) = arrivals[0], arrivals[-1]
    return (last_bytes - first_bytes) / (last_s - first_s)


@contextmanager
def fetching_node(swarm: LocalSwarm, name: str, cap: int, folder: Path) -> Iterator[Member]:
    """A node on a computer that has no weights yet, with a cap in its settings."""
    plan = replace(
        swarm.plan,
        environment={
            "HOME": str(folder),
            "HF_HOME": str(folder / "huggingface"),
            "XDG_DATA_HOME": str(folder / "share"),
            "SWARM_NODE_DATA_DIR": str(folder),
            "SWARM_NODE_DOWNLOAD_BYTES_PER_S": str(cap),
        },
    )
    arguments = ["join", name, "--device", "cpu", "--peers", *swarm.peers[:1], "--no-hub"]
    member = Member("fetching", arguments, plan, folder, folder / "fetching.key", LOOPBACK)
    try:
        yield member
    finally:
        member.stop()


async def through(
    peers: tuple[str, ...], folder: Path, what: Callable[[CountedNetwork], Awaitable[T]]
) -> T:
    async with joined(peers, folder) as network:
        return await what(network)


def narrow_model(folder: Path) -> Path:
    """One block that costs little to compute."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=256,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    path = folder / "Narrow"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


@contextmanager
def one_node(model: Path) -> Iterator[tuple[LocalSwarm, Member]]:
    """A swarm whose only node has the first block and all weights."""
    plan = SwarmPlan(
        model, (Span(0, 1),), threads=1, environment={"SWARM_NODE_ANNOUNCE_PERIOD_S": "10"}
    )
    with LocalSwarm(plan) as swarm:
        yield swarm, swarm.nodes[0]


def measure(
    steps_cap: int, weights_cap: int, duration_s: float, folder: Path
) -> Iterator[Measured]:
    """One after the other: nothing shares the caps or the cores of this computer."""
    narrow = narrow_model(folder)
    with one_node(narrow) as (swarm, node):
        set_caps(node, steps_cap, steps_cap)
        checkpoint = Checkpoint.open(narrow)
        rates = asyncio.run(
            through(
                tuple(swarm.peers),
                folder,
                lambda network: activations(network, checkpoint, duration_s),
            )
        )
        yield Measured("activations, received", steps_cap, rates["down"])
        yield Measured("activations, sent", steps_cap, rates["up"])
    model = prepare_with_progress(Console(stderr=True))
    with one_node(model) as (swarm, node):
        set_caps(node, weights_cap, None)
        rate = asyncio.run(
            through(
                tuple(swarm.peers),
                folder,
                lambda network: weights(network, model.name, folder / "ours", duration_s),
            )
        )
        yield Measured("weights, sent", weights_cap, rate)
        set_caps(node, None, None)
        with fetching_node(swarm, model.name, weights_cap, folder) as fetching:
            rate = fetched_rate(folder / "store", fetching, duration_s)
        yield Measured("weights, received", weights_cap, rate)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.bandwidth")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each measurement")
    parser.add_argument("--activations", type=int, default=500_000, help="cap, bytes per second")
    parser.add_argument("--weights", type=int, default=2_000_000, help="cap, bytes per second")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args()
    end_on_sigterm()
    results = []
    with tempfile.TemporaryDirectory(prefix="swarm-bandwidth-") as folder:
        for measured in measure(
            options.activations, options.weights, options.seconds, Path(folder)
        ):
            print(measured, flush=True)
            results.append(measured)
    if options.json:
        print(json.dumps([asdict(each) | {"ratio": each.ratio} for each in results]))
    return 0 if all(each.holds for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
