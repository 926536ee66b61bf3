"""What does a token cost more through the gateway than through the SDK?

    python -m scripts.bench.gateway                   # SmolLM2, 3 nodes, 32 streams, 3 repetitions

The same prompts, the same number of tokens, the same nodes, in turn: once by ``stream_generate`` in
a process of its own, once over HTTP from ``swarm gateway``. Client processes of both kinds only
read; the time per token is that of a stream after its first token, the median over all streams.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, aclosing
from pathlib import Path

import aiohttp
from rich.console import Console

from scripts.local_gateway import LocalGateway
from scripts.local_swarm import LocalSwarm, SwarmPlan, compute_environment, equal_spans
from scripts.prepare_demo_model import prepare_with_progress
from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.app import SwarmClient
from swarm.client.config import ClientSettings, SamplingSettings
from swarm.client.generate import LocalModel, stream_generate

LIMIT = 1.10
WARM_STREAMS = 4


def prompt(number: int) -> str:
    return f"Story number {number}. Once upon a time, in a village by the lake,"


class Watch:
    """The time between the first and the last token of a stream."""

    def __init__(self) -> None:
        self._first_s = self._last_s = 0.0

    def token(self) -> None:
        self._last_s = time.perf_counter()
        self._first_s = self._first_s or self._last_s

    def per_token_s(self, tokens: int) -> float:
        return (self._last_s - self._first_s) / (tokens - 1)


async def through_sdk(model: Path, peers: str, streams: int, tokens: int) -> list[float]:
    """Each stream's time per token by the async API."""
    local = LocalModel.load(str(model), dtype="float32")
    settings = SamplingSettings(max_new_tokens=tokens)

    async def one(client: SwarmClient, number: int) -> float:
        watch, count = Watch(), 0
        ids = local.encode(prompt(number))
        async with aclosing(stream_generate(client, local, ids, settings)) as pieces:
            async for piece in pieces:
                watch.token()
                count += len(piece.token_ids)
        return watch.per_token_s(count)

    try:
        async with await SwarmClient.connect(
            ClientSettings(peers=(peers,), dtype="float32")
        ) as client:
            await asyncio.gather(*(one(client, number) for number in range(WARM_STREAMS)))
            return list(await asyncio.gather(*(one(client, number) for number in range(streams))))
    finally:
        local.close()


async def through_gateway(url: str, model: str, streams: int, tokens: int) -> list[float]:
    """The same over HTTP; what comes is not parsed."""
    connector = aiohttp.TCPConnector(limit=0)

    async def one(http: aiohttp.ClientSession, number: int) -> float:
        watch, tail = Watch(), b""
        body = {
            "model": model,
            "prompt": prompt(number),
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with http.post(f"{url}/v1/completions", json=body) as reply:
            reply.raise_for_status()
            async for content in reply.content.iter_any():
                if b'"text": "' in content:
                    watch.token()
                tail = (tail + content)[-2000:]
        usage = tail[tail.rindex(b'"usage": {') + len(b'"usage": ') :].partition(b"}")[0] + b"}"
        count = json.loads(usage)["completion_tokens"]
        return watch.per_token_s(count)

    async with aiohttp.ClientSession(connector=connector) as http:
        await asyncio.gather(*(one(http, number) for number in range(WARM_STREAMS)))
        return list(await asyncio.gather(*(one(http, number) for number in range(streams))))


def in_own_process(kind: str, *arguments: str) -> float:
    """Milliseconds per token, by this file's other face."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench.gateway", "--as", kind, *arguments],
        env={**os.environ, **compute_environment(2)},
        capture_output=True,
        text=True,
        check=True,
    )
    times_s: list[float] = json.loads(done.stdout.splitlines()[-1])
    return 1000 * statistics.median(times_s)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.gateway")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--as", dest="kind", choices=("sdk", "http"), help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind == "sdk":
        model, peers = options.rest
        times = asyncio.run(through_sdk(Path(model), peers, options.streams, options.tokens))
        print(json.dumps(times))
        return
    if options.kind == "http":
        url, name = options.rest
        times = asyncio.run(through_gateway(url, name, options.streams, options.tokens))
        print(json.dumps(times))
        return
    compare(options)


def compare(options: argparse.Namespace) -> None:
    console = Console()
    model = prepare_with_progress(console)
    spans = equal_spans(Checkpoint.open(model).number_of_blocks, options.nodes)
    sizes = ["--streams", str(options.streams), "--tokens", str(options.tokens)]
    ratios: list[float] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        swarm = stack.enter_context(LocalSwarm(SwarmPlan(model, spans)))
        limits = folder / "gateway.toml"
        limits.write_text(
            "[gateway]\nkey_answers = 256\nkey_requests_per_minute = 100000\n"
            "key_tokens_per_minute = 100000000\n"
        )
        gateway = stack.enter_context(
            LocalGateway(model, swarm.peers, folder, "--config", str(limits), threads=2)
        )
        console.print(
            f"{options.streams} streams of {options.tokens} tokens, {options.nodes} nodes"
        )
        for repetition in range(options.repetitions):
            sdk_ms = in_own_process("sdk", *sizes, str(model), swarm.peers[0])
            http_ms = in_own_process("http", *sizes, gateway.url, gateway.ready["models"][0])
            ratios.append(http_ms / sdk_ms)
            console.print(
                f"  {repetition + 1}: SDK {sdk_ms:.1f} ms per token, gateway {http_ms:.1f} ms, "
                f"{ratios[-1]:.3f} times"
            )
    median = statistics.median(ratios)
    verdict = "holds" if median <= LIMIT else "MISSED"
    console.print(f"median {median:.3f} times ({min(ratios):.3f}-{max(ratios):.3f}); {verdict}")


if __name__ == "__main__":
    main()
