"""How fast does a swarm train, next to PEFT on the whole model in one process?

    python -m scripts.bench.finetune                       # both models, 1, 2 and 3 nodes
    python -m scripts.bench.finetune --quick               # SmolLM2, three nodes
    python -m scripts.bench.finetune --latency-ms 50       # one against two micro-batches in flight

Method: PEFT and every node are processes of their own, which stay up together; one variant works at
a time, in turns, and ratios are taken turn by turn. Same checkpoint, precision, adapter (LoRA of
rank 16 on queries and values), AdamW, and the same batch of random tokens. A step is forward,
backward, clipping and the optimizer. With ``--latency-ms`` the nodes are in this process, on links
of the memory network that are so long: only the ratio means anything there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from scripts.bench.models import BenchModel, random_llama
from scripts.local_swarm import LocalSwarm, SwarmPlan, compute_environment, equal_spans
from scripts.prepare_demo_model import prepare_with_progress

OpenChain = Callable[[Any, Any], Awaitable[Any]]

RANK = 16
SEQUENCES, TOKENS = 4, 128
SHORT_TOKENS = 32
"""Of a micro-batch over long links: so that links, and not this computer's cores, are the limit."""
MIB = 1024 * 1024


def batch(vocabulary: int, step: int, tokens: int = TOKENS) -> list[list[int]]:
    """The same for everybody."""
    dice = random.Random(step)
    return [[dice.randrange(3, vocabulary) for _ in range(tokens)] for _ in range(SEQUENCES)]


# --- PEFT in a process of its own ----------------------------------------------------------------
def local_worker(path: str, dtype: str) -> None:
    """Answers each line of standard input (a number of steps) with the seconds of each step."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(model, config)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()
    number = 0
    for line in sys.stdin:
        took_s = []
        for _ in range(int(line)):
            number += 1
            ids = torch.tensor(batch(model.config.vocab_size, number))
            began_s = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            took_s.append(time.perf_counter() - began_s)
        print(json.dumps(took_s), flush=True)


class LocalPeft:
    def __init__(self, model: BenchModel) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "scripts.bench.finetune",
                "--local-worker",
                str(model.path),
                model.dtype,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def steps(self, count: int) -> list[float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        took_s: list[float] = json.loads(self.process.stdout.readline())
        return took_s

    def rss_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=20)


# --- the swarm -----------------------------------------------------------------------------------
class SwarmTraining:
    """Steps through one open chain."""

    def __init__(self, chain: Any, steps: Any) -> None:
        self.chain = chain
        self._steps = steps
        self._number = 0

    @classmethod
    async def begin(
        cls,
        path: Path,
        dtype: str,
        open_chain: OpenChain,
        *,
        pieces: int,
        in_flight: int,
        sequence_tokens: int = TOKENS,
    ) -> SwarmTraining:
        from swarm.catalogue.checkpoint import Checkpoint
        from swarm.client.finetune.ends import TrainingEnds
        from swarm.client.finetune.examples import Example
        from swarm.client.finetune.model import base_model, chain_request
        from swarm.client.finetune.objectives import SupervisedFineTuning
        from swarm.client.finetune.settings import FinetuneSettings
        from swarm.client.finetune.steps import Steps

        checkpoint = Checkpoint.open(path)
        ends = TrainingEnds.load(checkpoint)
        base = base_model(checkpoint, dtype)
        tokens = SEQUENCES * sequence_tokens // pieces
        settings = FinetuneSettings(
            rank=RANK,
            target_modules=("q_proj", "v_proj"),
            learning_rate=1e-4,
            schedule="constant",
            steps=1_000_000,
            batch_size=SEQUENCES,
            micro_batch_tokens=tokens,
            micro_batches_in_flight=in_flight,
        )
        examples = [
            Example(tuple(row), 0)
            for step in range(16)
            for row in batch(int(ends.config.vocab_size), step, sequence_tokens)
        ]
        objective = SupervisedFineTuning(examples, micro_batch_tokens=tokens, prefix=0)
        chain = await open_chain(chain_request(base, settings, tokens), base)
        return cls(chain, Steps(ends, base, settings, objective))

    async def steps(self, count: int) -> list[float]:
        took_s = []
        for _ in range(count):
            self._number += 1
            began_s = time.perf_counter()
            await self._steps.take(self.chain, self._number)
            took_s.append(time.perf_counter() - began_s)
        return took_s

    async def close(self) -> None:
        self._steps.close()
        await self.chain.close()


async def against_peft(model: BenchModel, nodes: int, turns: int, steps: int) -> dict[str, Any]:
    """Step times of both, turn by turn, and memory of each process."""
    from swarm.client.app import SwarmClient
    from swarm.client.config import ClientSettings

    plan = SwarmPlan(model.path, equal_spans(model.blocks, nodes), dtype=model.dtype)
    local = LocalPeft(model)
    try:
        with LocalSwarm(plan) as swarm:
            settings = ClientSettings(peers=tuple(swarm.peers), dtype=model.dtype)
            async with await SwarmClient.connect(settings) as client:

                async def open_chain(request: Any, base: Any) -> Any:
                    return await client.open_training(request, dtype=base.node_dtype)

                training = await SwarmTraining.begin(
                    model.path, model.dtype, open_chain, pieces=1, in_flight=1
                )
                try:
                    await asyncio.to_thread(local.steps, 1)
                    await training.steps(1)
                    ratios, own_s, peft_s = [], [], []
                    for _ in range(turns):
                        peft_s.append(
                            statistics.median(await asyncio.to_thread(local.steps, steps))
                        )
                        own_s.append(statistics.median(await training.steps(steps)))
                        ratios.append(own_s[-1] / peft_s[-1])
                    memory = [
                        psutil.Process(node.process.keeper_pid).children()[0].memory_info().rss
                        / MIB
                        for node in swarm.nodes
                    ]
                finally:
                    await training.close()
        return {
            "model": model.label,
            "nodes": nodes,
            "peft_step_s": statistics.median(peft_s),
            "swarm_step_s": statistics.median(own_s),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "swarm_tokens_per_s": SEQUENCES * TOKENS / statistics.median(own_s),
            "peft_mib": local.rss_bytes() / MIB,
            "node_mib": memory,
        }
    finally:
        await asyncio.to_thread(local.close)


async def over_long_links(path: Path, latency_ms: float, turns: int) -> dict[str, Any]:
    """A step of four micro-batches, one or two of them in flight."""
    from tests.training_swarm import training_swarm

    blocks = BenchModel("", path, "float32").blocks
    spans = [(span.first_block, span.end_block) for span in equal_spans(blocks, 3)]
    times: dict[int, list[float]] = {1: [], 2: []}
    async with training_swarm(path, spans, latency_s=latency_ms / 1000) as swarm:

        async def open_chain(request: Any, base: Any) -> Any:
            return await swarm.open_chain(request)

        for _ in range(turns):
            for in_flight, taken in times.items():
                training = await SwarmTraining.begin(
                    path,
                    "float32",
                    open_chain,
                    pieces=4,
                    in_flight=in_flight,
                    sequence_tokens=SHORT_TOKENS,
                )
                await training.steps(1)
                taken.append(statistics.median(await training.steps(3)))
                await training.close()
    gains = [one / two for one, two in zip(times[1], times[2], strict=True)]
    return {
        "latency_ms": latency_ms,
        "one_in_flight_s": statistics.median(times[1]),
        "two_in_flight_s": statistics.median(times[2]),
        "gain": statistics.median(gains),
        "gains": gains,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="SmolLM2, three nodes")
    parser.add_argument("--model", choices=("smollm2", "0.8b"), default=None)
    parser.add_argument("--nodes", default="1,2,3")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of each turn")
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument("--local-worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.local_worker:
        local_worker(*arguments.local_worker)
        return
    os.environ.update(compute_environment(0))
    console = Console(stderr=True)
    smollm2 = prepare_with_progress(console)
    if arguments.latency_ms:
        results = [asyncio.run(over_long_links(smollm2, arguments.latency_ms, arguments.turns))]
    else:
        models = [BenchModel("SmolLM2-135M", smollm2, "float32")]
        if not arguments.quick and arguments.model != "smollm2":
            models.append(BenchModel("random Llama 0.8 B", random_llama(), "bfloat16"))
        if arguments.model == "0.8b":
            models = models[1:]
        counts = [3] if arguments.quick else [int(count) for count in arguments.nodes.split(",")]
        results = [
            asyncio.run(against_peft(model, nodes, arguments.turns, arguments.steps))
            for model in models
            for nodes in counts
        ]
    show(results, console)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1))


def show(results: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(*results[0])
    for result in results:
        table.add_row(*(_cell(value) for value in result.values()))
    console.print(table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return str(value)


if __name__ == "__main__":
    main()
