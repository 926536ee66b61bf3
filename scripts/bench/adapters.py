"""What adapters cost a batch of decoding sessions, on one node with the whole model.

    python -m scripts.bench.adapters                   # SmolLM2, 1, 4 and 8 sessions, rank 16
    python -m scripts.bench.adapters --rank 64 --targets q_proj,v_proj --dtype bfloat16

For each number of sessions a step of all of them is timed bare, with one adapter for all, with half
of them bare, and with another adapter for each; one after the other, many rounds, so that whatever
else the machine does meets all alike. Medians; the ratio is to the bare batch of the same rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from scripts.prepare_demo_model import prepare_with_progress
from swarm.catalogue.adapter import AdapterFiles
from swarm.catalogue.checkpoint import Checkpoint
from swarm.compute.adapter_merge import Factors, write_adapter
from swarm.compute.wire_tensors import tensor_to_wire
from swarm.node.engine.api import CacheRequest, SessionCache, StepInput
from swarm.node.engine.engine import SpanEngine, load_engine_blocking
from swarm.protocol.tensors import DType

ALL_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
CONTEXT_TOKENS = 128
PIECE_TOKENS = 32
KINDS = ("bare", "one for all", "half bare", "one each")


def random_adapter(
    folder: Path, checkpoint: Checkpoint, targets: Sequence[str], rank: int, seed: int
) -> AdapterFiles:
    torch.manual_seed(seed)
    modules = {}
    for block in range(checkpoint.number_of_blocks):
        for name, info in checkpoint.block_tensors(block).items():
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] in targets:
                out, inputs = info.shape
                modules[block, module] = Factors(
                    0.01 * torch.randn(rank, inputs), 0.01 * torch.randn(out, rank)
                )
    return write_adapter(folder, modules, base_model=checkpoint.name, model_revision=b"")


async def load(engine: SpanEngine, files: AdapterFiles) -> bytes:
    loading = engine.adapters.admit(files.index)
    for module in loading.wanted:
        await loading.load_module(module, files.read(module))
    loading.finish()
    return files.adapter_id


class Sessions:
    """Sessions that decode side by side, each with its adapter."""

    def __init__(self, engine: SpanEngine, adapter_ids: Sequence[bytes]) -> None:
        self._engine = engine
        self._caches = [self._open(adapter_id) for adapter_id in adapter_ids]
        self._token = tensor_to_wire(torch.randn(1, 1, engine.hidden_size), DType.FLOAT32)
        self.durations_s: list[float] = []

    def _open(self, adapter_id: bytes) -> SessionCache:
        engine = self._engine
        return engine.reserve(
            CacheRequest(
                engine.first_block,
                engine.end_block,
                1,
                2 * CONTEXT_TOKENS,
                DType.FLOAT32,
                adapter_id=adapter_id,
            )
        )

    async def begin(self) -> None:
        hidden = torch.randn(1, PIECE_TOKENS, self._engine.hidden_size)
        piece = tensor_to_wire(hidden, DType.FLOAT32)
        for cache in self._caches:
            for position in range(0, CONTEXT_TOKENS, PIECE_TOKENS):
                await self._engine.step(cache, StepInput(piece, position, 1))

    async def step(self) -> None:
        step = StepInput(self._token, CONTEXT_TOKENS, 1)
        started_s = time.perf_counter()
        await asyncio.gather(*(self._engine.step(cache, step) for cache in self._caches))
        self.durations_s.append(time.perf_counter() - started_s)

    def close(self) -> None:
        for cache in self._caches:
            cache.close()


async def measure(
    engine: SpanEngine, ids: Sequence[bytes], count: int, rounds: int
) -> dict[str, float]:
    """Milliseconds of a step of ``count`` sessions, by kind."""
    wanted = {
        "bare": [b""] * count,
        "one for all": [ids[0]] * count,
        "half bare": [ids[0] if index % 2 else b"" for index in range(count)],
        "one each": list(ids[:count]),
    }
    kinds = {kind: Sessions(engine, adapters) for kind, adapters in wanted.items()}
    for sessions in kinds.values():
        await sessions.begin()
    for turn in range(rounds + 10):
        for sessions in kinds.values():
            await sessions.step()
        if turn == 9:  # layouts and threads have settled
            for sessions in kinds.values():
                sessions.durations_s.clear()
    for sessions in kinds.values():
        sessions.close()
    return {
        kind: 1000 * statistics.median(sessions.durations_s) for kind, sessions in kinds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint; SmolLM2 if left out")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default=ALL_TARGETS)
    parser.add_argument("--sessions", default="1,4,8")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = options.model or prepare_with_progress(Console(stderr=True))
    counts = [int(count) for count in options.sessions.split(",")]
    checkpoint = Checkpoint.open(model)

    async def run() -> list[dict[str, float]]:
        engine = await asyncio.to_thread(
            load_engine_blocking,
            checkpoint,
            0,
            checkpoint.number_of_blocks,
            dtype=options.dtype,
            cache_tokens=len(KINDS) * max(counts) * 2 * CONTEXT_TOKENS,
            threads=options.threads,
            adapter_bytes=4 * 1024**3,
        )
        with tempfile.TemporaryDirectory() as folder:
            ids = [
                await load(
                    engine,
                    random_adapter(
                        Path(folder) / str(seed),
                        checkpoint,
                        options.targets.split(","),
                        options.rank,
                        seed,
                    ),
                )
                for seed in range(max(counts))
            ]
        rows: list[dict[str, float]] = []
        for count in counts:
            times = await measure(engine, ids, count, options.rounds)
            rows.append({"sessions": float(count), **times})
        await engine.close()
        return rows

    rows = asyncio.run(run())
    if options.json:
        print(json.dumps({"rank": options.rank, "targets": options.targets, "rows": rows}))
        return
    table = Table(title=f"{checkpoint.name}, {options.dtype}, rank {options.rank}: ms per step")
    for column in ("sessions", *KINDS):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [
            f"{row[kind]:.1f}" + ("" if kind == "bare" else f" ({row[kind] / row['bare']:.2f}x)")
            for kind in KINDS
        ]
        table.add_row(f"{row['sessions']:.0f}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
