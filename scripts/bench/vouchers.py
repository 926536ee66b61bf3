"""What vouchers cost a decoding session: the same answers with and without, in turns.

    python -m scripts.bench.vouchers             # SmolLM2 on three nodes, 16 pairs of answers

One swarm, one client; answers with vouchers and without alternate, and every second pair begins
with the other one. The nodes keep their books on disk meanwhile. Prints the time per token of both,
the median of the ratios of the pairs and their spread.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from pathlib import Path

from rich.console import Console

from scripts.local_swarm import LocalSwarm, SwarmPlan, end_on_sigterm, equal_spans
from scripts.prepare_demo_model import prepare_with_progress
from swarm.client.app import SwarmClient
from swarm.client.config import ClientSettings, SamplingSettings
from swarm.client.generate import LocalModel, stream_generate

PROMPT_TOKENS = 32
TEXT = "The cooperative met on the first Monday of each month in the school by the river. "


async def token_s(client: SwarmClient, local: LocalModel, prompt: list[int], tokens: int) -> float:
    """The mean time from token to token of one answer."""
    moments_s: list[float] = []
    settings = SamplingSettings(max_new_tokens=tokens)
    async for piece in stream_generate(client, local, prompt, settings):
        moments_s += [time.perf_counter()] * len(piece.token_ids)
    return (moments_s[-1] - moments_s[0]) / (len(moments_s) - 1)


async def measure(
    model: Path, local: LocalModel, pairs: int, tokens: int
) -> list[dict[str, float]]:
    """Times per token with and without vouchers, pair by pair."""
    encoded = local.encode(TEXT)
    prompt = list(itertools.islice(itertools.cycle(encoded), PROMPT_TOKENS))
    spans = equal_spans(local.ends.config.num_hidden_layers, 3)
    results = []
    with LocalSwarm(SwarmPlan(model, spans, threads=1)) as swarm:
        settings = ClientSettings(peers=tuple(swarm.peers))
        async with await SwarmClient.connect(settings) as client:
            await token_s(client, local, prompt, tokens)  # everything is warm afterwards
            for number in range(pairs):
                pair: dict[str, float] = {}
                for vouches in (True, False) if number % 2 else (False, True):
                    client.vouches = vouches
                    name = "with" if vouches else "without"
                    pair[name] = await token_s(client, local, prompt, tokens)
                results.append(pair)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.vouchers", description=__doc__)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: SmolLM2")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    end_on_sigterm()
    console = Console(stderr=True, highlight=False)
    model = options.model or prepare_with_progress(console)
    local = LocalModel.load(str(model), dtype="float32")
    local.end_token_ids = frozenset()
    pairs = asyncio.run(measure(model, local, options.pairs, options.tokens))
    local.close()
    ratios = sorted(pair["with"] / pair["without"] for pair in pairs)
    quartiles = statistics.quantiles(ratios, n=4)
    summary = {
        "with_ms": statistics.median(pair["with"] for pair in pairs) * 1e3,
        "without_ms": statistics.median(pair["without"] for pair in pairs) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "pairs": len(pairs),
    }
    print(json.dumps(summary, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
