"""A small adapter that has learnt something, for audits of nodes that leave it out.

Rank 8 on the queries and values of every block, 45 steps of Adam on code of this project: minutes,
and about 3 % of the weights. Random matrices of that size would change outputs far less, since
hidden states lie in few directions, and training finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from swarm.client.calibration import SpanRunner

RANK = 8
STEPS = 45
WINDOWS_A_STEP = 1
LEARNING_RATE = 1e-3
SEED = 7
PROJECTIONS = ("q_proj", "v_proj")

Deltas = Mapping[tuple[int, str], torch.Tensor]
"""What is added to a weight ``[outputs, inputs]``, by block and projection."""


def trained(runner: SpanRunner, ids: torch.Tensor) -> Deltas:
    """Train on windows ``[windows, tokens]``."""
    generator = torch.Generator().manual_seed(SEED)
    pairs: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []
    for index, block in enumerate(runner.layers):
        for name in PROJECTIONS:
            linear = getattr(block.self_attn, name)
            outputs, inputs = linear.weight.shape
            a = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
            b = torch.zeros(outputs, RANK)
            pairs[index, name] = a.requires_grad_(True), b.requires_grad_(True)
            handles.append(linear.register_forward_hook(_adding(*pairs[index, name])))
    try:
        _fit(runner, ids, [each for pair in pairs.values() for each in pair])
    finally:
        for handle in handles:
            handle.remove()
    return {place: (b @ a).detach() for place, (a, b) in pairs.items()}


def random_deltas(runner: SpanRunner, part: float) -> Deltas:
    """Of the same rank, and of this part of each weight's size."""
    generator = torch.Generator().manual_seed(SEED)
    found = {}
    for index, block in enumerate(runner.layers):
        for name in PROJECTIONS:
            weight = getattr(block.self_attn, name).weight
            outputs, inputs = weight.shape
            delta = torch.randn(outputs, RANK, generator=generator) @ torch.randn(
                RANK, inputs, generator=generator
            )
            found[index, name] = delta * (part * weight.norm() / delta.norm())
    return found


def adapted(runner: SpanRunner, first: int, end: int, deltas: Deltas) -> torch.nn.ModuleList:
    """The blocks of a span with the adapter, in float32."""
    blocks = runner.copy_of(first, end, torch.float32)
    layers: Any = blocks
    for index, block in enumerate(layers):
        for name in PROJECTIONS:
            getattr(block.self_attn, name).weight += deltas[first + index, name]
    return blocks


def relative_size(runner: SpanRunner, deltas: Deltas) -> float:
    """Mean over weights of the adapter's size as a part of theirs."""
    parts = [
        float(delta.norm() / getattr(runner.layers[index].self_attn, name).weight.norm())
        for (index, name), delta in deltas.items()
    ]
    return sum(parts) / len(parts)


def kept(path: Path, make: Callable[[], Deltas]) -> Deltas:
    """From a file of an earlier run, or made and kept."""
    from safetensors.torch import load_file, save_file

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({f"{index}.{name}": each for (index, name), each in make().items()}, path)
    return {
        (int(key.split(".")[0]), key.split(".")[1]): each for key, each in load_file(path).items()
    }


def _adding(a: torch.Tensor, b: torch.Tensor) -> Any:
    return lambda _module, given, output: output + given[0] @ a.T @ b.T


def _fit(runner: SpanRunner, ids: torch.Tensor, parameters: list[torch.Tensor]) -> None:
    optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    for step in range(STEPS):
        start = step * WINDOWS_A_STEP % max(1, ids.shape[0] - WINDOWS_A_STEP + 1)
        batch = ids[start : start + WINDOWS_A_STEP]
        logits = runner.model(batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if step % 11 == 0:
            print(f"adapter: step {step + 1}, loss {loss.item():.3f}", flush=True)
