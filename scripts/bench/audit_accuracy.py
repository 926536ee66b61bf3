"""How well audits tell honest nodes from dishonest ones, on real hidden states.

    python -m scripts.bench.audit_accuracy [--windows 44] [--part forward] [--json FILE]

Spans of 2, 10 and 30 blocks of SmolLM2-135M get the hidden states of real texts (this project's
documentation and code) in windows of 128 tokens. Honest variants, and on some of the windows
dishonest ones (``dishonest_spans``), answer; the rule of ``swarm.ledger.audit_rule`` decides
against a float32 prefill, forward and backward, on tensors and on sketches of them. Adapters are a
trained one, and a random one that does little (``trained_adapter``).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from scripts.bench.dishonest_spans import CHEATS
from scripts.bench.trained_adapter import (
    Deltas,
    adapted,
    kept,
    random_deltas,
    relative_size,
    trained,
)
from scripts.prepare_demo_model import demo_model_folder
from swarm.client.calibration import (
    HONEST,
    SpanRunner,
    compare_windows,
    round_to_int8,
    spans_of,
)
from swarm.ledger.audit_rule import (
    BACKWARD_LIMITS,
    LIMITS,
    AdapterShare,
    Comparison,
    Limits,
    adapter_share,
    compare,
)
from swarm.ledger.sketch import Sketcher

REPOSITORY = Path(__file__).parents[2]
ADAPTER = Path("~/.cache/sovereign-swarm/audit-adapter.safetensors").expanduser()


def texts() -> list[str]:
    """Prose and code of this repository."""
    files = [*sorted(REPOSITORY.glob("docs/*.md")), REPOSITORY / "README.md"]
    files += sorted(REPOSITORY.glob("client/*.py"))[:8]
    return [path.read_text(encoding="utf-8") for path in files]


def training() -> list[str]:
    """Other code of this repository, for the adapter."""
    files = sorted((REPOSITORY / "swarm").glob("*.py"))
    return [path.read_text(encoding="utf-8") for path in files]


class Tally:
    """Segments that passed and failed, by what was done."""

    def __init__(self) -> None:
        self.passed: dict[str, int] = defaultdict(int)
        self.failed: dict[str, int] = defaultdict(int)
        self.smallest: dict[str, float] = {}
        self.largest: dict[str, float] = {}
        self.largest_p95: dict[str, float] = {}
        self.effects: dict[str, list[float]] = {}
        self.shares: dict[str, list[float]] = {}

    def add(
        self,
        name: str,
        dtype_class: str,
        found: list[Comparison],
        limits: Mapping[str, Limits] = LIMITS,
    ) -> None:
        self._add(name, found, [each.passes(limits[dtype_class]) for each in found])

    def add_with_adapter(
        self,
        name: str,
        dtype_class: str,
        found: list[Comparison],
        shares: list[AdapterShare],
    ) -> None:
        """Sessions with an adapter are held to both rules."""
        limits = LIMITS[dtype_class]
        passed = [
            each.passes(limits) and share.passes(limits)
            for each, share in zip(found, shares, strict=True)
        ]
        self._add(name, found, passed)
        self.effects[name] = sorted(share.effect for share in shares) + self.effects.get(name, [])
        self.shares[name] = sorted(share.share for share in shares) + self.shares.get(name, [])

    def _add(self, name: str, found: list[Comparison], passed: list[bool]) -> None:
        for each, passes in zip(found, passed, strict=True):
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
                "adapter_effect": _range(self.effects.get(name, [])),
                "adapter_share": _range(self.shares.get(name, [])),
            }
            for name in sorted({*self.passed, *self.failed})
        ]


def _range(numbers: list[float]) -> list[float]:
    return [round(min(numbers), 4), round(max(numbers), 4)] if numbers else []


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
def forward(runner: SpanRunner, states: list[torch.Tensor], cheated: int, tally: Tally) -> None:
    """Honest prompts on all windows, cheats on the first ``cheated`` of them, of all spans."""
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
        given, right = given[:cheated], right[:cheated]
        for name, cheat in CHEATS.items():
            answered = cheat(runner, first, end, given, right)
            tally.add(f"cheat: {name}", "bfloat16", compare_windows(given, answered, right))
            tally.add(
                f"cheat: {name}, sketches", "bfloat16", sketched(sketcher, given, answered, right)
            )


@torch.no_grad()
def with_adapters(
    runner: SpanRunner, states: list[torch.Tensor], adapters: dict[str, Deltas], tally: Tally
) -> None:
    """Sessions with an adapter at honest nodes, and at nodes that compute without it.

    The replica rounds as well: it answers in bfloat16, with the adapter and without. A validator's
    own weights answer in float32.
    """
    sketcher = Sketcher(states[0].shape[-1])
    for first, end in spans_of(runner.number_of_blocks):
        given = states[first]
        for adapter, deltas in adapters.items():
            exact = adapted(runner, first, end, deltas)
            bare = runner.prefill(runner.copy_of(first, end, torch.bfloat16), given)
            honest = runner.prefill(copy.deepcopy(exact).to(torch.bfloat16), given)
            answers = {
                "honest: float32": ("bfloat16", exact),
                "honest: int8": ("int8", round_to_int8(copy.deepcopy(exact)).to(torch.bfloat16)),
                "cheat: float32": ("bfloat16", runner.copy_of(first, end, torch.float32)),
                "cheat: int8": ("int8", HONEST["int8 prefill"].blocks(runner, first, end)),
            }
            answered_by = {
                name: runner.prefill(blocks, given) for name, (_, blocks) in answers.items()
            }
            own = answered_by["honest: float32"], answered_by["cheat: float32"]
            for name, dtype_class, answered in (
                ("honest: bfloat16", "bfloat16", honest),
                ("honest: int8", "int8", answered_by["honest: int8"]),
                ("cheat: bfloat16", "bfloat16", bare),
                ("cheat: int8", "int8", answered_by["cheat: int8"]),
            ):
                what, precision = name.split(": ")
                tally.add_with_adapter(
                    f"{what}: {adapter}, {precision}, own weights",
                    dtype_class,
                    compare_windows(given, answered, own[0]),
                    shares_of(given, answered, *own),
                )
            for name, (dtype_class, _) in answers.items():
                answered = answered_by[name]
                what, precision = name.split(": ")
                what = f"{what}: {adapter}, {precision}"
                tally.add_with_adapter(
                    what,
                    dtype_class,
                    compare_windows(given, answered, honest),
                    shares_of(given, answered, honest, bare),
                )
                if precision == "float32":
                    tally.add_with_adapter(
                        what + ", sketches",
                        dtype_class,
                        sketched(sketcher, given, answered, honest),
                        sketched_shares(sketcher, given, answered, honest, bare),
                    )


def shares_of(*states: torch.Tensor) -> list[AdapterShare]:
    """For each window of given, answered, adapted and bare ``[windows, tokens, hidden]``."""
    arrays = [each[:, 1:].float().numpy() for each in states]
    return [adapter_share(*(each[index] for each in arrays)) for index in range(len(arrays[0]))]


def sketched_shares(
    sketcher: Sketcher,
    given: torch.Tensor,
    answered: torch.Tensor,
    honest: torch.Tensor,
    bare: torch.Tensor,
) -> list[AdapterShare]:
    """The same of sketches."""
    return [
        adapter_share(
            sketcher.project(given[index, 1:].numpy()),
            sketcher.sketch(answered[index, 1:].numpy()).astype("float32"),
            sketcher.project(honest[index, 1:].numpy()),
            sketcher.project(bare[index, 1:].numpy()),
        )
        for index in range(given.shape[0])
    ]


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
            "honest: backward float16": ("float16", runner.copy_of(first, end, torch.float16)),
            "honest: backward int8": (
                "int8",
                round_to_int8(runner.copy_of(first, end, torch.float32)),
            ),
        }
        for name, (dtype_class, blocks) in variants.items():
            answered = input_gradient(runner, blocks, given, upstream)
            found = compare_windows(upstream, answered, right)
            tally.add(name, dtype_class, found, BACKWARD_LIMITS)
        skipped = runner.copy_of(first, end, torch.bfloat16)
        kept = [b for index, b in enumerate(skipped) if index != (end - first) // 2]
        answered = input_gradient(runner, torch.nn.ModuleList(kept), given, upstream)
        for name, cheated in (
            ("cheat: backward, skipped block", answered),
            ("cheat: backward, gradient passed on", upstream),
            ("cheat: backward, zeros", torch.zeros_like(right)),
            ("cheat: backward, foreign", right.roll(1, dims=0)),
        ):
            found = compare_windows(upstream, cheated, right)
            tally.add(name, "bfloat16", found, BACKWARD_LIMITS)


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
    parser.add_argument("--windows", type=int, default=44, help="honest ones")
    parser.add_argument("--cheated", type=int, default=16, help="windows of each way to cheat")
    parser.add_argument(
        "--part",
        choices=("all", "forward", "adapters", "trained", "decode", "backward"),
        default="all",
    )
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="kept between runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    runner = SpanRunner(demo_model_folder())
    ids = runner.windows(texts(), arguments.windows)
    tally = Tally()
    cheaper = 0.0
    if arguments.part in ("all", "forward"):
        forward(runner, runner.hidden_states(ids), arguments.cheated, tally)
    adapters: dict[str, Deltas] = {}
    if arguments.part in ("all", "adapters"):
        adapters["random adapter"] = random_deltas(runner, 0.03)
    if arguments.part in ("all", "trained"):
        deltas = kept(arguments.adapter, lambda: trained(runner, runner.windows(training(), 90)))
        print(f"the trained adapter has {relative_size(runner, deltas):.1%} of the weights' size")
        adapters["trained adapter"] = deltas
    if adapters:
        with_adapters(runner, runner.hidden_states(ids[: arguments.cheated]), adapters, tally)
    if arguments.part in ("all", "decode"):
        cheaper = decoding(runner, runner.hidden_states(ids), tally)
    if arguments.part in ("all", "backward"):
        # A few at a time: their gradients at every block are kept.
        pieces = torch.split(ids[: arguments.cheated], 4)
        for piece in track(pieces, "backward", console=Console(stderr=True)):
            backward(runner, piece, tally)
    rows = tally.rows()
    for row in rows:
        print(
            f"{row['what']:<42} {row['failed']:>5} of {row['segments']:>5} fail;"
            f" median {row['median_from']:.4f} to {row['median_to']:.4f},"
            f" p95 to {row['p95_to']:.4f}"
            f" {row['adapter_effect'] or ''} {row['adapter_share'] or ''}"
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
