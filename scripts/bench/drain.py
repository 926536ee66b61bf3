"""How long does a token wait when a node of its chain leaves by plan?

    python -m scripts.bench.drain                # SmolLM2, 512 tokens of context, each hop 3 times

Three spans with two nodes each. While an answer is generated, the node that serves the first, the
middle or the last span is told to drain; it must be gone before the answer ends. The longest wait
for a token after that is compared with the answer's median, and the text with the undisturbed one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from scripts.local_swarm import LocalSwarm, Member, SwarmPlan, end_on_sigterm, equal_spans
from scripts.prepare_demo_model import prepare_with_progress
from swarm.client.app import SwarmClient
from swarm.client.config import ClientSettings, SamplingSettings
from swarm.client.generate import LocalModel, stream_generate
from swarm.client.metrics import ClientMetrics
from swarm.client.remote_chain import RemoteChain
from swarm.node.control import running_node

SPANS = 3
WARM_TOKENS = 12
TOKENS = 72
LIMIT = 3.0
LEAVE_TIMEOUT_S = 30.0
TEXT = "The cooperative met on the first Monday of each month in the school by the river. "


@dataclass(frozen=True, slots=True)
class Answer:
    """One generation: its tokens, and the time from each to the next."""

    token_ids: tuple[int, ...]
    steps_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Drained:
    """What a drain came to."""

    hop: int
    median_ms: float
    longest_ms: float
    same_text: bool

    @property
    def factor(self) -> float:
        return self.longest_ms / self.median_ms

    def __str__(self) -> str:
        text = "the same text" if self.same_text else "ANOTHER TEXT"
        return (
            f"hop {self.hop + 1}: median {self.median_ms:.1f} ms, longest wait after the drain "
            f"{self.longest_ms:.1f} ms ({self.factor:.2f} times), {text}"
        )


class Opened:
    """A client that remembers the chain that it opened last."""

    def __init__(self, client: SwarmClient) -> None:
        self._client = client
        self.chain: RemoteChain | None = None

    async def open_chain(self, *arguments: Any, **options: Any) -> RemoteChain:
        self.chain = await self._client.open_chain(*arguments, **options)
        return self.chain

    async def close(self) -> None:
        """The client belongs to who made it."""


class Bench:
    """One client on one swarm."""

    def __init__(self, swarm: LocalSwarm, local: LocalModel, client: SwarmClient) -> None:
        self._swarm = swarm
        self._local = local
        self._opened = Opened(client)

    async def answer(self, prompt: list[int], drain_hop: int | None = None) -> Answer:
        """Generate; after a few tokens the node of ``drain_hop`` is told to leave."""
        tokens: list[int] = []
        moments_s: list[float] = []
        settings = SamplingSettings(max_new_tokens=TOKENS)
        async for piece in stream_generate(self._opened, self._local, prompt, settings):
            tokens += piece.token_ids
            moments_s += [time.perf_counter()] * len(piece.token_ids)
            if len(tokens) == WARM_TOKENS and drain_hop is not None:
                await asyncio.to_thread(drain, self.serving(drain_hop))
        steps = (after - before for before, after in itertools.pairwise(moments_s))
        return Answer(tuple(tokens), tuple(steps))

    def serving(self, hop: int) -> Member:
        """The node behind a hop of the present chain."""
        if self._opened.chain is None:
            raise RuntimeError("nothing was asked yet")
        peer_id = self._opened.chain.plan.hops[hop].peer_id
        return next(node for node in self._swarm.nodes if node.peer_id == peer_id)

    async def drained(self, prompt: list[int], hop: int, undisturbed: Answer) -> Drained:
        """One answer during which the node of ``hop`` leaves; afterwards that node is back."""
        answer = await self.answer(prompt, hop)
        gone = await ended(self._swarm.nodes)
        await asyncio.to_thread(self._swarm.restart, gone)
        after = answer.steps_s[WARM_TOKENS:]
        return Drained(
            hop=hop,
            median_ms=statistics.median(answer.steps_s) * 1e3,
            longest_ms=max(after) * 1e3,
            same_text=answer.token_ids == undisturbed.token_ids,
        )


def drain(node: Member) -> None:
    """What ``swarm-node drain`` does."""
    with running_node(node.key) as control:
        control.ask("drain")


async def ended(nodes: list[Member]) -> Member:
    """The node that has left; it may need a moment for its goodbyes."""
    async with asyncio.timeout(LEAVE_TIMEOUT_S):
        while True:
            for node in nodes:
                if node.process.poll() is not None:
                    return node
            await asyncio.sleep(0.05)


async def measure(
    model: Path, local: LocalModel, context: int, repetitions: int, console: Console
) -> list[Drained]:
    """Drain each hop ``repetitions`` times."""
    encoded = local.encode(TEXT)
    prompt = (encoded * (context // len(encoded) + 1))[:context]
    spans = equal_spans(local.ends.config.num_hidden_layers, SPANS)
    results = []
    with LocalSwarm(SwarmPlan(model, spans * 2, threads=1)) as swarm:
        metrics = ClientMetrics()
        settings = ClientSettings(peers=tuple(swarm.peers))
        async with await SwarmClient.connect(settings, observer=metrics) as client:
            bench = Bench(swarm, local, client)
            undisturbed = await bench.answer(prompt)
            for hop in range(SPANS):
                for number in range(1, repetitions + 1):
                    with console.status(f"draining hop {hop + 1}, {number} of {repetitions}"):
                        results.append(await bench.drained(prompt, hop, undisturbed))
                    console.print(f"  {results[-1]}")
        if "swarm_client_healing_seconds_count 0.0" not in metrics.text():
            console.print("  a session was healed instead of moved", style="red")
    return results


def main() -> None:
    """Measure and print a line for each drain, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.drain", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--context", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: SmolLM2")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    console = Console(stderr=options.json, highlight=False)
    end_on_sigterm()
    model = options.model or prepare_with_progress(console)
    local = LocalModel.load(str(model), dtype="float32")
    local.end_token_ids = frozenset()
    results = asyncio.run(measure(model, local, options.context, options.repetitions, console))
    local.close()
    worst = max(result.factor for result in results)
    console.print(f"  the longest wait is {worst:.2f} times the median; {LIMIT:.0f} are allowed")
    if options.json:
        print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
