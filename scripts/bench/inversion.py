"""How much of a text can a node read from the activations that it is given, by depth?

The cheapest attack there is: a ridge regression from hidden states after a layer to the embeddings
of the tokens that went in, learned on public text; each prediction is compared with all embeddings
of the vocabulary. For the other end, the model's own final norm and head are applied to the hidden
states (a "logit lens"), and a second regression maps them to the last ones first. Both are floors:
who invests more reads more.

    python -m scripts.bench.inversion            # prints the tables of docs/privacy.md

The text is the language reference that comes with every Python (``pydoc_data.topics``): nothing is
downloaded. Training and test texts are different topics.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.prepare_demo_model import prepare

WINDOW_TOKENS = 256
BATCH = 4
RIDGE = 1e-2
"""Relative to the mean of the diagonal."""
SKIPPED = 1
"""The first position of a text is an outlier in this family (an attention sink)."""


@dataclass
class Row:
    """What was recovered from the hidden states after ``layer`` blocks."""

    layer: int
    input_top1: float
    input_top10: float
    next_by_lens: float
    next_by_regression: float


def windows(tokenizer: Any, names: list[str], count: int) -> torch.Tensor:
    """``[count, WINDOW_TOKENS]`` token ids of some topics, one after the other."""
    ids: list[int] = []
    for name in names:
        ids += tokenizer(topics[name])["input_ids"]
        if len(ids) >= count * WINDOW_TOKENS:
            break
    count = min(count, len(ids) // WINDOW_TOKENS)
    return torch.tensor(ids[: count * WINDOW_TOKENS]).view(count, WINDOW_TOKENS)


@torch.inference_mode()
def hidden_states(
    model: Any, ids: torch.Tensor, layers: list[int]
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """For each layer ``[tokens, hidden]`` without first positions; and what the norm gives."""
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    last: list[torch.Tensor] = []
    captured: dict[int, torch.Tensor] = {}

    def capture(layer: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            captured[layer] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    hooks = [
        model.model.layers[layer - 1].register_forward_hook(capture(layer)) for layer in layers
    ]
    for start in range(0, len(ids), BATCH):
        output = model.model(ids[start : start + BATCH])
        last.append(output.last_hidden_state[:, SKIPPED:].flatten(0, 1))
        for layer in layers:
            found[layer].append(captured[layer][:, SKIPPED:].flatten(0, 1))
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}, torch.cat(last)


def normalise(states: torch.Tensor) -> torch.Tensor:
    """Each token to unit mean square, and a constant behind it."""
    scaled = states / states.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
    return torch.cat([scaled, torch.ones(len(scaled), 1)], dim=1)


def regression(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """``[hidden + 1, width]`` weights of a ridge regression, in float64."""
    x, y = given.double(), wanted.double()
    gram = x.T @ x
    gram += torch.eye(len(gram), dtype=torch.float64) * RIDGE * gram.diagonal().mean()
    weights: torch.Tensor = torch.linalg.solve(gram, x.T @ y)
    return weights.float()


def found_among(
    predicted: torch.Tensor, vocabulary: torch.Tensor, wanted: torch.Tensor
) -> tuple[float, float]:
    """Share of ``wanted`` that is nearest, and among the ten nearest, by cosine."""
    unit = torch.nn.functional.normalize(vocabulary, dim=1)
    first = ten = 0
    for start in range(0, len(predicted), 256):
        scores = torch.nn.functional.normalize(predicted[start : start + 256], dim=1) @ unit.T
        best = scores.topk(10, dim=1).indices
        right = best == wanted[start : start + 256, None]
        first += int(right[:, 0].sum())
        ten += int(right.any(dim=1).sum())
    return first / len(predicted), ten / len(predicted)


def likeliest(last: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """The token that the head finds most likely, a few rows at a time: the vocabulary is wide."""
    starts = range(0, len(last), 512)
    return torch.cat([(last[start : start + 512] @ head.T).argmax(1) for start in starts])


@torch.inference_mode()
def measure(model: Any, train: torch.Tensor, test: torch.Tensor, layers: list[int]) -> list[Row]:
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    train_states, train_last = hidden_states(model, train, layers)
    test_states, test_last = hidden_states(model, test, layers)
    train_ids, test_ids = train[:, SKIPPED:].flatten(), test[:, SKIPPED:].flatten()
    said = likeliest(test_last, head)
    rows = []
    for layer in layers:
        given, seen = normalise(train_states.pop(layer)), normalise(test_states[layer])
        to_input = regression(given, embeddings[train_ids])
        top1, top10 = found_among(seen @ to_input, embeddings, test_ids)
        to_last = regression(given, train_last)
        raw = model.model.norm(test_states.pop(layer))
        lens = likeliest(raw, head)
        mapped = seen @ to_last
        by_regression = likeliest(mapped, head)
        rows.append(
            Row(
                layer,
                top1,
                top10,
                float((lens == said).float().mean()),
                float((by_regression == said).float().mean()),
            )
        )
        print(
            f"after {layer:2d} blocks: input {top1:.1%} / {top10:.1%}, "
            f"next token {rows[-1].next_by_lens:.1%} / {rows[-1].next_by_regression:.1%}",
            flush=True,
        )
    return rows


def table(rows: list[Row]) -> str:
    """As in the documents."""
    lines = [
        "| activations after block | input token found | among the best ten | next token, by the "
        "model's own head | by regression |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.layer} | {row.input_top1:.0%} | {row.input_top10:.0%} | {row.next_by_lens:.0%} | "
        f"{row.next_by_regression:.0%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="a Llama-like checkpoint; SmolLM2 by default")
    parser.add_argument("--layers", default="1,2,4,6,10,15,20,24,26,28,29")
    parser.add_argument("--train-windows", type=int, default=150)
    parser.add_argument("--test-windows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    started_s = time.monotonic()
    path = options.model or str(prepare())
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    names = sorted(topics)
    random.Random(options.seed).shuffle(names)
    half = len(names) // 5
    test = windows(tokenizer, names[:half], options.test_windows)
    train = windows(tokenizer, names[half:], options.train_windows)
    layers = [int(layer) for layer in options.layers.split(",")]
    print(f"trained on {train.numel():,} tokens, tested on {test.numel():,} others", flush=True)
    rows = measure(model, train, test, layers)
    print()
    print(json.dumps([vars(row) for row in rows]) if options.json else table(rows))
    print(f"{time.monotonic() - started_s:.0f} s")


if __name__ == "__main__":
    main()
