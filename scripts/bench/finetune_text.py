"""Does a swarm teach a model Swahili, and as well as PEFT does in one process?

    python -m scripts.bench.finetune_text --picture docs/finetuning-loss.svg

SmolLM2 learns from docs/examples/english-swahili.jsonl: once by ``swarm finetune`` through three
nodes, once by PEFT on the whole model, with the same first values, order, batches and learning
rates, in float32. Prints losses on examples kept out, the largest relative difference of any
tensor, and what the model answers through the swarm to prompts kept out, before and after, with the
language that py3langid takes each answer for. The exit code is 1 unless the language has changed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from scripts.local_swarm import LocalSwarm, SwarmPlan, compute_environment, equal_spans
from scripts.prepare_demo_model import prepare_with_progress

DATA = Path(__file__).parents[2] / "docs" / "examples" / "english-swahili.jsonl"
LANGUAGE = "sw"
RATE, BATCH, RANK, WARMUP = 2e-3, 4, 16, 5
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ASKED, NEW_TOKENS = 8, 24
"""Prompts kept out that are answered, and the length of the answers."""
MICRO_BATCH_TOKENS = 128
"""So that a step is several micro-batches, and the three nodes work at the same time."""
LONG_COMPLETION = 40
"""Letters; of shorter texts a language can hardly be told."""
BEFORE_AT_MOST, AFTER_AT_LEAST = 0.25, 0.75
"""Shares of the answers that are in the language, or it has not changed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says to a prompt, and what language that is in."""

    prompt: str
    text: str
    language: str


@dataclass(frozen=True, slots=True)
class Learned:
    """One training through the swarm."""

    result: dict[str, Any]
    """What ``swarm finetune --json`` prints."""
    before: list[Answer]
    after: list[Answer]


def through_the_swarm(model: Path, out: Path, steps: int, held_out: int) -> Learned:
    """``swarm finetune`` as a user runs it, through three nodes, which then answer."""
    command = [
        str(Path(sys.executable).with_name("swarm")),
        *("finetune", str(model), "--data", str(DATA), "--out", str(out), "--json"),
        *("--dtype", "float32", "--steps", str(steps), "--held-out", str(held_out)),
        *("--learning-rate", str(RATE), "--warmup-steps", str(WARMUP)),
        *("--batch-size", str(BATCH), "--rank", str(RANK), "--target-modules", ",".join(TARGETS)),
        *("--micro-batch-tokens", str(MICRO_BATCH_TOKENS)),
    ]
    prompts = asked(held_out)
    with LocalSwarm(SwarmPlan(model, equal_spans(30, 3), dtype="float32")) as swarm:
        before = answers(model, swarm.peers, prompts, None)
        environment = {**os.environ, **compute_environment(0), "SWARM_PEERS": swarm.peers[0]}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        after = answers(model, swarm.peers, prompts, out)
    return Learned(json.loads(done.stdout), before, after)


def asked(held_out: int) -> list[str]:
    """Prompts of the examples kept out whose answers are long enough to be of a language."""
    examples = [json.loads(line) for line in DATA.read_text().splitlines()][-held_out:]
    long = [one["prompt"] for one in examples if len(one["completion"]) >= LONG_COMPLETION]
    return long[:ASKED]


def answers(
    model_path: Path, peers: Sequence[str], prompts: Sequence[str], adapter: Path | None
) -> list[Answer]:
    """Through the swarm, each token the likeliest one."""
    from transformers import AutoTokenizer

    from swarm.client import SwarmModelForCausalLM
    from swarm.client.language import identify_language

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    found = []
    with SwarmModelForCausalLM.from_swarm(
        str(model_path), peers=peers, dtype="float32", adapter=adapter
    ) as model:
        for prompt in prompts:
            message = [{"role": "user", "content": prompt}]
            asked = tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(asked, return_tensors="pt", add_special_tokens=False)
            tokens = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
            text = tokenizer.decode(
                tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True
            )
            found.append(Answer(prompt, text, identify_language(text).code))
    return found


def share(given: Sequence[Answer]) -> float:
    """Of the answers that are in the language."""
    return sum(answer.language == LANGUAGE for answer in given) / len(given)


def by_peft(model_path: Path, steps: int, held_out: int) -> tuple[list[float], list[float], Any]:
    """Losses of the steps, held-out losses before and after, and the trained PeftModel."""
    import peft
    import torch
    import torch.nn.functional as F  # noqa: N812
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swarm.client.finetune.examples import Example, Order, TokenizerEncoder, read_examples
    from swarm.client.finetune.settings import FinetuneSettings, learning_rate
    from swarm.compute.initial_values import initial_a
    from swarm.compute.lora import LORA_A

    settings = FinetuneSettings(
        learning_rate=RATE, batch_size=BATCH, rank=RANK, steps=steps, warmup_steps=WARMUP
    )
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    examples = read_examples(DATA, TokenizerEncoder(tokenizer), max_length=settings.max_length)
    learned, kept_out = examples[:-held_out], examples[-held_out:]
    whole = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS))
    model = peft.get_peft_model(whole, config)
    first = peft.get_peft_model_state_dict(model)
    for key, tensor in first.items():
        if key.endswith(LORA_A):
            name = key.removeprefix("base_model.model.")
            tensor.copy_(initial_a(tuple(tensor.shape), settings.seed, name))
    peft.set_peft_model_state_dict(model, first)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)

    def loss_of(batch: list[Example]) -> torch.Tensor:
        total, count = torch.zeros(()), 0
        for example in batch:
            ids = torch.tensor([example.token_ids])
            first_learned = max(example.first_learned, 1)
            logits = model(input_ids=ids).logits[0, first_learned - 1 : -1]
            total = total + F.cross_entropy(logits, ids[0, first_learned:], reduction="sum")
            count += ids.shape[1] - first_learned
        return total / count

    def measured() -> float:
        with torch.no_grad():
            return loss_of(kept_out).item()

    order = Order(len(learned), batch_size=BATCH, seed=settings.seed)
    losses, held_out_losses = [], [measured()]
    for step in range(1, steps + 1):
        loss = loss_of([learned[index] for index in order.batch(step)])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, settings.maximum_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, steps)
        optimizer.step()
        losses.append(loss.item())
    held_out_losses.append(measured())
    return losses, held_out_losses, model


def compare(out: Path, model: Any) -> float:
    """The largest relative difference of any tensor between the two adapters."""
    import peft
    from safetensors.torch import load_file

    ours = load_file(out / "adapter_model.safetensors")
    theirs = peft.get_peft_model_state_dict(model)
    return max(float((ours[key] - theirs[key]).norm() / theirs[key].norm()) for key in theirs)


def losses_of(out: Path) -> list[float]:
    """Of all steps, as the training left them."""
    from swarm.client.finetune.snapshots import Snapshots

    latest = Snapshots(out).load_latest()
    assert latest is not None
    return list(latest.losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--out", type=Path, default=None, help="where the adapter goes")
    parser.add_argument(
        "--no-peft", dest="peft", action="store_false", help="leave the comparison out"
    )
    parser.add_argument("--picture", type=Path, default=None, metavar="FILE")
    arguments = parser.parse_args()
    if not asked(arguments.held_out):
        parser.error("keep more examples out: no answer among them is long enough")
    os.environ.update(compute_environment(0))
    console = Console(stderr=True)
    model = prepare_with_progress(console)
    out = arguments.out or Path(tempfile.mkdtemp(prefix="adapter-sw-"))
    began_s = time.monotonic()
    swarm = through_the_swarm(model, out, arguments.steps, arguments.held_out)
    console.print(f"swarm: {swarm.result}, {time.monotonic() - began_s:.0f} s")
    for before, after in zip(swarm.before, swarm.after, strict=True):
        console.print(f"{before.prompt}\n  {before.language}  {before.text!r}", highlight=False)
        console.print(f"  {after.language}  {after.text!r}", highlight=False)
    report: dict[str, Any] = {
        "held_out_swarm": list(swarm.result["held_out_loss"].values()),
        "share_in_language": {"before": share(swarm.before), "after": share(swarm.after)},
        "said": [
            {"prompt": before.prompt, "before": before.text, "after": after.text}
            for before, after in zip(swarm.before, swarm.after, strict=True)
        ],
    }
    series = {"three nodes": losses_of(out)}
    if arguments.peft:
        losses, held_out, trained = by_peft(model, arguments.steps, arguments.held_out)
        report["held_out_peft"] = held_out
        report["largest_relative_difference"] = compare(out, trained)
        series["PEFT, one process"] = losses
    print(json.dumps(report, indent=1, ensure_ascii=False))
    if arguments.picture is not None:
        from swarm.client.finetune.loss_curve import loss_curve

        arguments.picture.write_text(loss_curve("SmolLM2 learns Swahili: loss by step", series))
    if share(swarm.before) > BEFORE_AT_MOST or share(swarm.after) < AFTER_AT_LEAST:
        console.print(f"the language has not changed to {LANGUAGE}")
        sys.exit(1)


if __name__ == "__main__":
    main()
