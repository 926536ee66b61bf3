"""What vouchers cost a decoding session: two answers at once, one with and one without.

    python -m scripts.bench.vouchers             # SmolLM2 on three nodes, 6 times 2 answers

One swarm, one client. Of two answers to the same prompt one has vouchers, and they take turns: four
tokens of this one, four of that one, with the order changed each time, so that both see the same
machine, whose speed changes by more within a second than vouchers cost. A pair is 16 tokens of
each, which is one voucher for each hop. The nodes keep their books on disk meanwhile. Prints the
time per token of both and the ratio: of all the tokens, with a 95 % interval by resampling the
pairs, and the pairs' quartiles.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from scripts.local_swarm import LocalSwarm, SwarmPlan, end_on_sigterm, equal_spans
from scripts.prepare_demo_model import prepare_with_progress
from swarm.client.app import SwarmClient
from swarm.client.config import ClientSettings, SamplingSettings
from swarm.client.generate import LocalModel, TextPiece, stream_generate

PROMPT_TOKENS = 32
WINDOW_TOKENS = 16
TURN_TOKENS = 4
RESAMPLES = 2000
TEXT = "The cooperative met on the first Monday of each month in the school by the river. "


class Pair(NamedTuple):
    """Seconds that a window took with vouchers, and the one beside it without."""

    with_s: float
    without_s: float


async def turn_s(pieces: AsyncIterator[TextPiece], turn_tokens: int = TURN_TOKENS) -> float:
    """Seconds that the next tokens of an answer take."""
    started_s = time.perf_counter()
    tokens = 0
    while tokens < turn_tokens:
        tokens += len((await anext(pieces)).token_ids)
    return time.perf_counter() - started_s


async def two_answers(
    client: SwarmClient, local: LocalModel, prompt: list[int], windows: int
) -> list[Pair]:
    """Seconds per window of an answer with vouchers and of one without, in turns."""
    settings = SamplingSettings(max_new_tokens=(windows + 1) * WINDOW_TOKENS)
    pairs = []
    async with contextlib.AsyncExitStack() as sessions:
        answers: dict[bool, AsyncIterator[TextPiece]] = {}
        for vouches in (True, False):
            client.vouches = vouches  # read when the session opens
            pieces = stream_generate(client, local, prompt, settings)
            answers[vouches] = await sessions.enter_async_context(contextlib.aclosing(pieces))
            await turn_s(pieces, WINDOW_TOKENS)  # and the prompt
        for _ in range(windows):
            taken_s = {True: 0.0, False: 0.0}
            for turn in range(WINDOW_TOKENS // TURN_TOKENS):
                for vouches in (True, False) if turn % 2 else (False, True):
                    taken_s[vouches] += await turn_s(answers[vouches])
            pairs.append(Pair(taken_s[True], taken_s[False]))
    return pairs


async def measure(
    model: Path, local: LocalModel, rounds: int, windows: int, console: Console
) -> list[Pair]:
    """The pairs of all rounds; each round opens two sessions anew."""
    encoded = local.encode(TEXT)
    prompt = list(itertools.islice(itertools.cycle(encoded), PROMPT_TOKENS))
    spans = equal_spans(local.ends.config.num_hidden_layers, 3)
    pairs: list[Pair] = []
    with LocalSwarm(SwarmPlan(model, spans, threads=1)) as swarm:
        settings = ClientSettings(peers=tuple(swarm.peers))
        async with await SwarmClient.connect(settings) as client:
            await two_answers(client, local, prompt, 2)  # everything is warm afterwards
            for _ in track(range(rounds), "answers", console=console, transient=True):
                pairs += await two_answers(client, local, prompt, windows)
    return pairs


def ratio_of(pairs: Sequence[Pair]) -> float:
    """Time with vouchers relative to that without, of all windows together."""
    return sum(pair.with_s for pair in pairs) / sum(pair.without_s for pair in pairs)


def interval_of(pairs: Sequence[Pair]) -> tuple[float, float]:
    """95 % interval of ``ratio_of`` by the bootstrap (Efron 1979)."""
    dice = random.Random(0)
    drawn = sorted(ratio_of(dice.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    return drawn[RESAMPLES // 40], drawn[-(RESAMPLES // 40) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.vouchers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="of two answers each")
    parser.add_argument("--windows", type=int, default=32, help="of 16 tokens, of each answer")
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: SmolLM2")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    end_on_sigterm()
    console = Console(stderr=True, highlight=False)
    model = options.model or prepare_with_progress(console)
    local = LocalModel.load(str(model), dtype="float32")
    local.end_token_ids = frozenset()
    measuring = measure(model, local, options.rounds, options.windows, console)
    pairs = asyncio.run(measuring)
    local.close()
    quartiles = statistics.quantiles((pair.with_s / pair.without_s for pair in pairs), n=4)
    summary = {
        "with_ms": statistics.median(pair.with_s for pair in pairs) * 1e3 / WINDOW_TOKENS,
        "without_ms": statistics.median(pair.without_s for pair in pairs) * 1e3 / WINDOW_TOKENS,
        "ratio": ratio_of(pairs),
        "ratio_interval_95": interval_of(pairs),
        "pair_median": quartiles[1],
        "pair_quartiles": [quartiles[0], quartiles[2]],
        "pairs": len(pairs),
    }
    print(json.dumps(summary, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
