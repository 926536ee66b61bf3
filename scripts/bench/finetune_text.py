"""Does a swarm learn Swahili as well as PEFT does in one process?

    python -m scripts.bench.finetune_text --picture docs/finetuning-loss.svg

SmolLM2 learns from docs/examples/english-swahili.jsonl: once by ``swarm finetune`` through three
nodes, once by PEFT on the whole model, with the same first values, order, batches and learning
rates, in float32. Prints losses on examples kept out, the largest relative difference of any
tensor, and what the model says before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from scripts.local_swarm import LocalSwarm, SwarmPlan, compute_environment, equal_spans
from scripts.prepare_demo_model import prepare_with_progress

DATA = Path(__file__).parents[2] / "docs" / "examples" / "english-swahili.jsonl"
RATE, BATCH, RANK = 2e-3, 4, 16


def through_the_swarm(model: Path, out: Path, steps: int, held_out: int) -> dict[str, Any]:
    """``swarm finetune`` as a user runs it, through three nodes."""
    command = [
        str(Path(sys.executable).with_name("swarm")),
        *("finetune", str(model), "--data", str(DATA), "--out", str(out), "--json"),
        *("--dtype", "float32", "--steps", str(steps), "--held-out", str(held_out)),
        *("--learning-rate", str(RATE), "--batch-size", str(BATCH), "--rank", str(RANK)),
        *("--snapshot-every", "1000"),
    ]
    with LocalSwarm(SwarmPlan(model, equal_spans(30, 3), dtype="float32")) as swarm:
        environment = {**os.environ, **compute_environment(0), "SWARM_PEERS": swarm.peers[0]}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def by_peft(model_path: Path, steps: int, held_out: int) -> tuple[list[float], list[float], Any]:
    """Losses of the steps, held-out losses before and after, and the trained PeftModel."""
    import peft
    import torch
    import torch.nn.functional as F  # noqa: N812
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swarm.client.finetune.examples import Example, Order, TokenizerEncoder, read_examples
    from swarm.client.finetune.settings import FinetuneSettings, learning_rate
    from swarm.compute.lora import LORA_A
    from swarm.node.engine.adapted_linear import initial_a

    settings = FinetuneSettings(learning_rate=RATE, batch_size=BATCH, rank=RANK, steps=steps)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    examples = read_examples(DATA, TokenizerEncoder(tokenizer), max_length=settings.max_length)
    learned, kept_out = examples[:-held_out], examples[-held_out:]
    whole = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"])
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


def speak(model_path: Path, out: Path, prompt: str) -> dict[str, str]:
    """What the bare model and the one with our adapter, loaded by PEFT, answer."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    whole = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)

    def answer(model: Any) -> str:
        tokens = model.generate(**ids, max_new_tokens=24, do_sample=False)
        words: str = tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :])
        return words

    return {
        "before": answer(whole),
        "after": answer(peft.PeftModel.from_pretrained(whole, str(out))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--out", type=Path, default=None, help="where the adapter goes")
    parser.add_argument("--picture", type=Path, default=None, metavar="FILE")
    arguments = parser.parse_args()
    os.environ.update(compute_environment(0))
    console = Console(stderr=True)
    model = prepare_with_progress(console)
    out = arguments.out or Path(tempfile.mkdtemp(prefix="adapter-sw-"))
    began_s = time.monotonic()
    swarm = through_the_swarm(model, out, arguments.steps, arguments.held_out)
    console.print(f"swarm: {swarm}, {time.monotonic() - began_s:.0f} s")
    words = speak(model, out, "Translate to Swahili: Select the lesson that you want to read")
    console.print(words)
    losses, held_out, trained = by_peft(model, arguments.steps, arguments.held_out)
    report = {
        "held_out_swarm": list(swarm["held_out_loss"].values()),
        "held_out_peft": held_out,
        "largest_relative_difference": compare(out, trained),
        "said": words,
    }
    print(json.dumps(report, indent=1, ensure_ascii=False))
    if arguments.picture is not None:
        from swarm.client.finetune.loss_curve import loss_curve
        from swarm.client.finetune.snapshots import Snapshots

        latest = Snapshots(out).load_latest()
        assert latest is not None
        title = "SmolLM2 learns Swahili: loss by step"
        series = {"three nodes": latest.losses, "PEFT, one process": losses}
        arguments.picture.write_text(loss_curve(title, series))


if __name__ == "__main__":
    main()
