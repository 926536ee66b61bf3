"""How long from the start of ``swarm-node join`` to the first token that the node helped to make?

    python -m scripts.bench.join                 # SmolLM2, the whole model on one node, 5 times

A seed and a client that has its part of the model in memory are up before. The clock starts with
the node's process and stops when the client has a token; weights are on the disk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path

from rich.console import Console

from scripts.local_swarm import LocalSwarm, Span, SwarmPlan, end_on_sigterm
from scripts.prepare_demo_model import prepare_with_progress
from swarm.client.app import SwarmClient
from swarm.client.config import ClientSettings, SamplingSettings
from swarm.client.generate import LocalModel, stream_generate
from swarm.protocol.errors import NetworkError, NoRouteError

LIMIT_S = 60.0
PROMPT = "The capital of Kenya is"


async def first_token(client: SwarmClient, local: LocalModel) -> None:
    """Ask until somebody answers."""
    prompt_ids = local.encode(PROMPT)
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                async for _ in stream_generate(
                    client, local, prompt_ids, SamplingSettings(max_new_tokens=1)
                ):
                    return
            except (NoRouteError, NetworkError):
                await asyncio.sleep(0.05)  # nobody serves yet


async def one_join(model: Path, local: LocalModel, dtype: str) -> float:
    """Seconds from the node's start to the token."""
    with LocalSwarm(SwarmPlan(model, (), dtype=dtype)) as swarm:
        settings = ClientSettings(peers=tuple(swarm.peers))
        async with await SwarmClient.connect(settings) as client:
            started_s = time.monotonic()
            joining = asyncio.create_task(
                asyncio.to_thread(swarm.add_node, Span(0, local.ends.config.num_hidden_layers))
            )
            await first_token(client, local)
            took_s = time.monotonic() - started_s
            await joining
    return took_s


def main() -> None:
    """Measure and print a line, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.join", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    console = Console(stderr=options.json, highlight=False)
    end_on_sigterm()
    model = prepare_with_progress(console)
    local = LocalModel.load(str(model), dtype=options.dtype)
    took_s = []
    for number in range(1, options.repetitions + 1):
        with console.status(f"joining, {number} of {options.repetitions}"):
            took_s.append(asyncio.run(one_join(model, local, options.dtype)))
    if options.json:
        print(json.dumps({"model": model.name, "dtype": options.dtype, "join_s": took_s}))
        return
    console.print(
        f"  {model.name}, {options.dtype}: first token {statistics.median(took_s):.1f} s "
        f"({min(took_s):.1f}..{max(took_s):.1f}) after the start of the node"
    )


if __name__ == "__main__":
    main()
