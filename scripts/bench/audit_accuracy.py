"""How well audits tell honest nodes from dishonest ones, on real hidden states.

    python -m scripts.bench.audit_accuracy [--windows 60] [--part forward] [--json FILE]

Spans of 2, 10 and 30 blocks of SmolLM2-135M get the hidden states of real texts (this project's
documentation and code) in windows of 128 tokens. Honest variants and dishonest ones
(``dishonest_spans``) answer, and the rule of ``swarm.ledger.audit_rule`` decides against a float32
prefill, forward and backward, on tensors and on sketches of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from scripts.bench.dishonest_spans import CHEATS, with_adapter
from scripts.prepare_demo_model import demo_model_folder
from swarm.client.calibration import (
    HONEST,
    SpanRunner,
    compare_windows,
    round_to_int8,
    spans_of,
)
from swarm.ledger.audit_rule import LIMITS, Comparison, compare
from swarm.ledger.sketch import Sketcher

REPOSITORY = Path(__file__).parents[2]


def texts() -> list[str]:
    """Prose and code of this repository."""
    files = [*sorted(REPOSITORY.glob("docs/*.md")), REPOSITORY / "README.md"]
    files += sorted(REPOSITORY.glob("client/*.py"))[:8]
    return [path.read_text(encoding="utf-8") for path in files]


class Tally:
    """Segments that passed and failed, by what was done."""

    def __init__(self) -> None:
        self.passed: dict[str, int] = defaultdict(int)
        self.failed: dict[str, int] = defaultdict(int)
        self.smallest: dict[str, float] = {}
        self.largest: dict[str, float] = {}
        self.largest_p95: dict[str, float] = {}

    def add(self, name: str, dtype_class: str, found: list[Comparison]) -> None:
        for each in found:
            passes = each.passes(LIMITS[dtype_class])
            (self.passed if passes else self.failed)[name] += 1
            self.smallest[name] = min(self.smallest.get(name, 9e9), each.median)
            self.largest[name] = max(self.largest.get(name, 0.0), each.median)
            self.largest_p95[name] = max(self.largest_p95.get(name, 0.0), each.p95)

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "what": name,
                "segments": self.passed[name] + self.failed[name],
                "failed": self.failed[name],
                "median_from": round(self.smallest[name], 4),
                "median_to": round(self.largest[name], 4),
                "p95_to": round(self.largest_p95[name], 4),
            }
            for name in sorted({*self.passed, *self.failed})
        ]


@torch.no_grad()
def decoding(runner: SpanRunner, states: list[torch.Tensor], tally: Tally) -> float:
    """Honest decoding with a cache; returns how many times cheaper a replay of it is."""
    decode_s = replay_s = 0.0
    for first, end in spans_of(runner.number_of_blocks):
        given = states[first]
        exact = runner.copy_of(first, end, torch.float32)
        right = runner.prefill(exact, given)
        for name, variant in HONEST.items():
            if variant.is_decode:
                answered = runner.decode(variant.blocks(runner, first, end), given)
                found = compare_windows(given, answered, right)
                tally.add(f"honest: {name}", variant.dtype_class, found)
        started_s = time.perf_counter()
        runner.decode(exact, given[:1])
        decode_s += time.perf_counter() - started_s
        started_s = time.perf_counter()
        runner.prefill(exact, given[:1])
        replay_s += time.perf_counter() - started_s
    return decode_s / replay_s


@torch.no_grad()
def forward(runner: SpanRunner, states: list[torch.Tensor], tally: Tally) -> None:
    """Honest prompts and cheats, of all spans."""
    sketcher = Sketcher(states[0].shape[-1])
    for first, end in spans_of(runner.number_of_blocks):
        given = states[first]
        exact = runner.copy_of(first, end, torch.float32)
        right = runner.prefill(exact, given)
        for name, variant in HONEST.items():
            if variant.is_decode:
                continue
            answered = runner.prefill(variant.blocks(runner, first, end), given)
            found = compare_windows(given, answered, right)
            tally.add(f"honest: {name}", variant.dtype_class, found)
            if name == "bfloat16 prefill":
                found = sketched(sketcher, given, answered, right)
                tally.add("honest: bfloat16 prefill, sketches", "bfloat16", found)
        for name, cheat in CHEATS.items():
            answered = cheat(runner, first, end, given, right)
            tally.add(f"cheat: {name}", "bfloat16", compare_windows(given, answered, right))
            tally.add(
                f"cheat: {name}, sketches", "bfloat16", sketched(sketcher, given, answered, right)
            )
        adapted = runner.prefill(with_adapter(runner, first, end), given)
        found = compare_windows(given, right, adapted)
        tally.add("cheat: missing adapter", "bfloat16", found)


def sketched(
    sketcher: Sketcher, given: torch.Tensor, answered: torch.Tensor, right: torch.Tensor
) -> list[Comparison]:
    """As a client finds it that kept sketches of half precision of what it got."""
    return [
        compare(
            sketcher.project(given[index, 1:].numpy()),
            sketcher.sketch(answered[index, 1:].numpy()).astype("float32"),
            sketcher.project(right[index, 1:].numpy()),
        )
        for index in range(given.shape[0])
    ]


def backward(runner: SpanRunner, ids: torch.Tensor, tally: Tally) -> None:
    """Gradients of the inputs of spans, from the true loss."""
    states, gradients = true_gradients(runner, ids)
    for first, end in spans_of(runner.number_of_blocks):
        upstream, given = gradients[end], states[first]
        right = input_gradient(runner, runner.copy_of(first, end, torch.float32), given, upstream)
        variants = {
            "honest: backward bfloat16": ("bfloat16", runner.copy_of(first, end, torch.bfloat16)),
            "honest: backward int8": (
                "int8",
                round_to_int8(runner.copy_of(first, end, torch.float32)),
            ),
        }
        for name, (dtype_class, blocks) in variants.items():
            answered = input_gradient(runner, blocks, given, upstream)
            tally.add(name, dtype_class, compare_windows(upstream, answered, right))
        skipped = runner.copy_of(first, end, torch.bfloat16)
        kept = [b for index, b in enumerate(skipped) if index != (end - first) // 2]
        answered = input_gradient(runner, torch.nn.ModuleList(kept), given, upstream)
        for name, cheated in (
            ("cheat: backward, skipped block", answered),
            ("cheat: backward, gradient passed on", upstream),
            ("cheat: backward, zeros", torch.zeros_like(right)),
            ("cheat: backward, foreign", right.roll(1, dims=0)),
        ):
            tally.add(name, "bfloat16", compare_windows(upstream, cheated, right))


def true_gradients(
    runner: SpanRunner, ids: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Hidden states before each block, and the loss's gradient at each and behind the last."""
    embeddings = runner.model.get_input_embeddings()(ids).detach().requires_grad_(True)
    output = runner.model(inputs_embeds=embeddings, output_hidden_states=True, use_cache=False)
    # The last of them is normed already: hooks see what leaves the last block.
    kept: list[torch.Tensor] = list(output.hidden_states[:-1])
    last: list[torch.Tensor] = []
    handle = runner.layers[-1].register_forward_hook(lambda _m, _i, out: last.append(out))
    try:
        output = runner.model(inputs_embeds=embeddings, output_hidden_states=True, use_cache=False)
    finally:
        handle.remove()
    kept = [*output.hidden_states[:-1], last[0]]
    logits = output.logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    found = torch.autograd.grad(loss, kept)
    return [each.detach() for each in kept], [each.detach() for each in found]


def input_gradient(
    runner: SpanRunner,
    blocks: torch.nn.ModuleList,
    given: torch.Tensor,
    upstream: torch.Tensor,
) -> torch.Tensor:
    inputs = given.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(runner.prefill(blocks, inputs), inputs, upstream)
    return gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--part", choices=("all", "forward", "decode", "backward"), default="all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    runner = SpanRunner(demo_model_folder())
    ids = runner.windows(texts(), arguments.windows)
    tally = Tally()
    cheaper = 0.0
    if arguments.part in ("all", "forward"):
        forward(runner, runner.hidden_states(ids), tally)
    if arguments.part in ("all", "decode"):
        cheaper = decoding(runner, runner.hidden_states(ids), tally)
    if arguments.part in ("all", "backward"):
        backward(runner, ids, tally)
    rows = tally.rows()
    for row in rows:
        print(
            f"{row['what']:<42} {row['failed']:>5} of {row['segments']:>5} fail;"
            f" median {row['median_from']:.4f} to {row['median_to']:.4f},"
            f" p95 to {row['p95_to']:.4f}"
        )
    honest = [row for row in rows if row["what"].startswith("honest")]
    segments, failed = (sum(row[name] for row in honest) for name in ("segments", "failed"))
    print(f"honest segments: {segments}, failed {failed}")
    if cheaper:
        print(f"a replay costs 1/{cheaper:.0f} of the decoding; at 5 % that is {5 / cheaper:.2f} %")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"rows": rows, "decode_per_replay": cheaper}, indent=1)
        )


if __name__ == "__main__":
    main()
