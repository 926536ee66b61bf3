"""How far honest nodes are apart in one step of a training, and what audits of trainings cost.

    python -m scripts.bench.training_audits [--steps 8] [--json FILE]
    python -m scripts.bench.training_audits --part overhead

Accuracy: SmolLM2-135M in three spans, each hosted in float32, in bfloat16 and with weights
rounded to eight bits, learns texts of this project through nodes of one precision, with each of the
optimizers. After each step
every hop shows what it did, and the nodes of the other precisions do it again.

Overhead: three nodes of one process each, and nobody beside them who could do a step again: what
hashing and showing cost the training itself. Sessions that are not audited and sessions that audit
nodes with 100 right steps, or new ones, take steps in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import product
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from scripts.bench.models import BenchModel
from scripts.local_swarm import LocalSwarm, SwarmPlan, compute_environment, equal_spans
from scripts.prepare_demo_model import prepare_with_progress
from swarm.protocol.identity import PeerId

REPOSITORY = Path(__file__).parents[2]
PRECISIONS = ("float32", "bfloat16", "int8")
SEQUENCES, TOKENS = 4, 64
RANK = 16


def read_windows(path: Path) -> list[Any]:
    """Texts of this project in windows of ``TOKENS`` tokens, shuffled."""
    from transformers import AutoTokenizer

    from swarm.client.finetune.examples import Example

    tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
    windows = []
    for file in [*sorted(REPOSITORY.glob("docs/*.md")), *sorted(REPOSITORY.glob("swarm/*.py"))]:
        ids = tokenizer(file.read_text(encoding="utf-8"))["input_ids"]
        windows += [
            Example(tuple(ids[start : start + TOKENS]), 0)
            for start in range(0, len(ids) - TOKENS, TOKENS)
        ]
    random.Random(0).shuffle(windows)
    return windows


class Comparer:
    """Instead of the lot: after each step all hops show what they did, to all other precisions."""

    def __init__(self, swarm: Any, auditor: Any) -> None:
        self._swarm = swarm
        self._auditor = auditor
        self.found: dict[str, list[Any]] = defaultdict(list)

    @property
    def wrong(self) -> tuple[PeerId, ...]:
        """Everybody is honest here."""
        return ()

    async def contradicted(
        self, training: Any, peers: Sequence[PeerId], step: int, reason: Exception
    ) -> None:
        """The session ends."""

    def watch(self, training: Any) -> None:
        """Nothing ends these sessions."""

    async def settled(self) -> None:
        """Nothing runs beside them."""

    async def step_taken(self, training: Any, taken: Any) -> None:
        from swarm.client.finetune.step_comparison import difference

        for place, link in enumerate(training.links):
            shown = await self._auditor.shown_by(training, place, taken)
            own = self.precision_of(link.hop.peer_id)
            before: list[Any] = []
            while True:
                opinion = await self._auditor.opinion(shown, excluded=before)
                if opinion is None:
                    break
                before += opinion.peers
                (other,) = map(self.precision_of, opinion.peers)
                found = difference(shown.given, shown.work, opinion.work)
                self.found[f"{own}, {other}"].append(found)

    def precision_of(self, peer: Any) -> str:
        return next(
            PRECISIONS[index % len(PRECISIONS)]
            for index, node in enumerate(self._swarm.nodes)
            if node.peer.peer_id == peer
        )


def save_rounded(path: Path, folder: Path) -> None:
    """The model with weights of eight bits, as a checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    from swarm.client.calibration import round_to_int8

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        round_to_int8(model.model.layers)
    model.save_pretrained(folder)


async def accuracy(
    path: Path, rounded_path: Path, steps: int, micro_batches: int
) -> dict[str, list[Any]]:
    """Differences by the two precisions."""
    from swarm.catalogue.checkpoint import Checkpoint
    from swarm.client.finetune.auditing import TrainingAuditor
    from swarm.client.finetune.ends import TrainingEnds
    from swarm.client.finetune.model import base_model, chain_request
    from swarm.client.finetune.objectives import SupervisedFineTuning
    from swarm.client.finetune.settings import OPTIMIZERS, FinetuneSettings
    from swarm.client.finetune.steps import Steps
    from tests.training_swarm import TrainingSwarm

    checkpoint = Checkpoint.open(path)
    rounded = Checkpoint.open(rounded_path)
    windows = read_windows(path)
    ends = TrainingEnds.load(checkpoint)
    base = base_model(checkpoint, "auto")
    tokens = SEQUENCES * TOKENS // micro_batches
    swarm = TrainingSwarm(checkpoint, 0.0)
    found: dict[str, list[Any]] = defaultdict(list)
    try:
        for span in equal_spans(checkpoint.number_of_blocks, 3):
            for precision in PRECISIONS:
                is_rounded = precision == "int8"
                await swarm.add_node(
                    span.first_block,
                    span.end_block,
                    weights=rounded if is_rounded else checkpoint,
                    dtype="float32" if is_rounded else precision,
                )
        everybody = list(swarm.nodes)
        for seed, (precision, optimizer) in enumerate(product(PRECISIONS, OPTIMIZERS)):
            settings = FinetuneSettings(
                rank=RANK,
                learning_rate=1e-3,
                schedule="constant",
                steps=steps,
                batch_size=SEQUENCES,
                micro_batch_tokens=tokens,
                seed=seed,
                optimizer=optimizer,
            )
            turned = PRECISIONS.index(precision)
            swarm.preferred = {
                everybody[len(PRECISIONS) * hop + turned].peer.peer_id for hop in range(3)
            }
            auditor = TrainingAuditor(
                swarm.client, clock=swarm.clock, dice=random.Random(seed), own=swarm.own
            )
            comparer = Comparer(swarm, auditor)
            swarm.auditor = comparer
            objective = SupervisedFineTuning(windows, micro_batch_tokens=tokens, prefix=0)
            taking = Steps(ends, base, settings, objective)
            chain = await swarm.open_chain(chain_request(base, settings, tokens))
            for step in range(1, steps + 1):
                await taking.take(chain, step)
            taking.close()
            await chain.close()
            for name, differences in comparer.found.items():
                found[name] += differences
    finally:
        await swarm.close()
    return found


async def overhead(path: Path, audited: str, turns: int, steps: int) -> dict[str, Any]:
    """Seconds of a step of a session that believes its hops, and of one that audits them, which are
    ``known`` or ``new`` to it."""
    from scripts.bench.finetune import SwarmTraining
    from swarm.client.app import SwarmClient
    from swarm.client.config import ClientSettings
    from swarm.ledger.reputation import Found

    model = BenchModel("SmolLM2-135M", path, "float32")
    plan = SwarmPlan(path, equal_spans(model.blocks, 3), dtype=model.dtype)
    times: dict[str, list[float]] = {name: [] for name in ("believed", audited)}
    processor_s: dict[str, list[float]] = {name: [] for name in times}
    with LocalSwarm(plan) as swarm:
        async with AsyncExitStack() as stack:
            clients = {}
            for name in times:
                settings = ClientSettings(
                    peers=tuple(swarm.peers), dtype=model.dtype, audits=name != "believed"
                )
                clients[name] = await stack.enter_async_context(await SwarmClient.connect(settings))
            for turn in range(turns):
                # One session at a time: a second one has less memory to keep activations.
                for name in sorted(times, reverse=bool(turn % 2)):
                    client = clients[name]

                    async def open_chain(request: Any, base: Any, client: Any = client) -> Any:
                        return await client.open_training(request, dtype=base.node_dtype)

                    training = await SwarmTraining.begin(
                        path, model.dtype, open_chain, pieces=1, in_flight=1
                    )
                    for hop in training.chain.plan.hops if name == "known" and not turn else ():
                        for number in range(100):
                            client.training_auditor.reputations.found(
                                hop.peer_id, Found.PASSED, segment=str(number), now_unix_s=0.0
                            )
                    await training.steps(1)
                    before_s = _processor_s(swarm)
                    times[name] += await training.steps(steps)
                    processor_s[name].append(_processor_s(swarm) - before_s)
                    await training.close()
    ratios = [one / other for one, other in zip(times[audited], times["believed"], strict=True)]
    return {
        "hops": audited,
        "steps": len(ratios),
        "believed_s": statistics.median(times["believed"]),
        "audited_s": statistics.median(times[audited]),
        "ratio": statistics.median(ratios),
        "quartiles": str([round(each, 3) for each in statistics.quantiles(ratios)]),
        "processor": statistics.median(processor_s[audited])
        / statistics.median(processor_s["believed"]),
    }


def _processor_s(swarm: LocalSwarm) -> float:
    """Of the nodes and of this process: what other work on the machine hardly changes."""
    nodes = [psutil.Process(node.process.keeper_pid).children()[0] for node in swarm.nodes]
    times = [each.cpu_times() for each in (*nodes, psutil.Process())]
    return float(sum(each.user + each.system for each in times))


def summed_up(found: dict[str, list[Any]]) -> list[dict[str, Any]]:
    rows = []
    for name, differences in sorted(found.items()):
        rows.append(
            {
                "nodes": name,
                "steps": len(differences),
                "failed": sum(not each.passes(name.split(", ")) for each in differences),
                "forward median": max(one.median for each in differences for one in each.forward),
                "forward p95": max(one.p95 for each in differences for one in each.forward),
                "backward median": max(one.median for each in differences for one in each.backward),
                "backward p95": max(one.p95 for each in differences for one in each.backward),
                "norm": max(each.norm for each in differences),
                "moments": max(each.moments for each in differences),
                "parameters": max(each.parameters for each in differences),
                "adapter": all(each.has_adapter for each in differences),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--part", choices=("accuracy", "overhead"), default="accuracy")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    arguments = parser.parse_args()
    os.environ.update(compute_environment(0))
    console = Console(stderr=True)
    path = prepare_with_progress(console)
    if arguments.part == "overhead":
        rows = [
            asyncio.run(overhead(path, hops, arguments.turns, arguments.steps))
            for hops in ("known", "new")
        ]
        show(rows, console)
        return
    with tempfile.TemporaryDirectory() as rounded:
        save_rounded(path, Path(rounded))
        found = asyncio.run(accuracy(path, Path(rounded), arguments.steps, arguments.micro_batches))
    rows = summed_up(found)
    show(rows, console)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(
            *(f"{each:.3g}" if isinstance(each, float) else str(each) for each in row.values())
        )
    console.print(table)


if __name__ == "__main__":
    main()
