"""A process that imports lean computes every family as one that imports everything."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import torch

FAMILIES = ("llama", "gemma3", "mixtral", "phi3", "qwen3")
PROGRAM = """
import asyncio, json, sys
import torch
from swarm.catalogue.checkpoint import Checkpoint
from swarm.compute.wire_tensors import tensor_from_wire, tensor_to_wire
from swarm.node.engine.api import CacheRequest, StepInput
from swarm.node.engine.engine import load_engine_blocking
from swarm.node.engine.lean_imports import run_lean
from swarm.protocol.tensors import DType

async def compute(path):
    checkpoint = Checkpoint.open(path)
    engine = run_lean(lambda: load_engine_blocking(
        checkpoint, 0, 6, device="cpu", dtype="float32", cache_tokens=256, threads=1))
    cache = engine.reserve(CacheRequest(0, 6, 1, 64, DType.FLOAT32))
    hidden = torch.linspace(-1, 1, 5 * 64).sin().view(1, 5, 64)
    output = await engine.step(cache, StepInput(tensor_to_wire(hidden, DType.FLOAT32), 0, 5))
    await engine.close()
    return tensor_from_wire(output.activations).tolist()

outputs = [asyncio.run(compute(path)) for path in sys.argv[1:]]
heavy = [name for name in ("torch._dynamo", "torch._inductor", "scipy") if name in sys.modules]
print(json.dumps({"outputs": outputs, "heavy": heavy}))
"""


async def test_families_without_the_modules_left_out(make_tiny: Any, load_chain: Any) -> None:
    tiny = [make_tiny(family) for family in FAMILIES]
    ran = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", PROGRAM, *(str(model.checkpoint.path) for model in tiny)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    assert "lean imports failed" not in ran.stderr
    answer = json.loads(ran.stdout)
    assert answer["heavy"] == []
    hidden = torch.linspace(-1, 1, 5 * 64).sin().view(1, 5, 64)
    for model, output in zip(tiny, answer["outputs"], strict=True):
        chain = load_chain(model, [(0, 6)])
        expected = await chain.step(chain.open(1, 64), hidden, 0)
        torch.testing.assert_close(torch.tensor(output), expected)
        await chain.close()
