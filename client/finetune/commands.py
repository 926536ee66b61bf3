"""``swarm finetune``: train an adapter through the swarm on data that stays here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarm.client.joining import (
    Config,
    Peers,
    PolicyFile,
    outcome,
    prepare_process,
    settings_from,
)


def finetune(
    model: Annotated[
        str, typer.Argument(help="Checkpoint folder, or a name in the Hugging Face cache or hub.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="FILE",
            help="JSON lines with prompt and completion, messages, or text; for DPO prompt, "
            "chosen and rejected.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the adapter goes.")],
    peers: Peers = None,
    policy: PolicyFile = None,
    method: Annotated[
        str, typer.Option("--method", help="lora, dora, or prompt (virtual tokens kept here).")
    ] = "lora",
    loss: Annotated[str, typer.Option("--loss", help="sft or dpo.")] = "sft",
    rank: Annotated[int, typer.Option("--rank", help="Of the adapter's matrices.")] = 16,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="Scale of the adapter; twice the rank.")
    ] = None,
    target_modules: Annotated[
        str, typer.Option("--target-modules", help="Comma-separated; as PEFT if left out.")
    ] = "",
    dropout: Annotated[float, typer.Option("--dropout", help="Of the adapter's inputs.")] = 0.0,
    virtual_tokens: Annotated[
        int, typer.Option("--virtual-tokens", help="Of --method prompt.")
    ] = 20,
    epochs: Annotated[int, typer.Option("--epochs", help="How often all data is seen.")] = 1,
    steps: Annotated[
        int | None, typer.Option("--steps", help="End after so many, whatever --epochs says.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Examples of a step.")] = 8,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="Highest.")
    ] = 2e-4,
    schedule: Annotated[str, typer.Option("--schedule", help="constant, linear, cosine.")] = (
        "linear"
    ),
    warmup_steps: Annotated[int, typer.Option("--warmup-steps", help="Up to it.")] = 0,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, lion, adafactor.")] = (
        "adamw"
    ),
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Of AdamW.")] = 0.0,
    maximum_norm: Annotated[
        float, typer.Option("--max-norm", help="Clip gradients to this; 0 never.")
    ] = 1.0,
    max_length: Annotated[
        int, typer.Option("--max-length", help="Longer examples are cut, in tokens.")
    ] = 512,
    micro_batch_tokens: Annotated[
        int, typer.Option("--micro-batch-tokens", help="What passes the chain at once.")
    ] = 512,
    in_flight: Annotated[
        int, typer.Option("--in-flight", help="Micro-batches on their way at the same time.")
    ] = 3,
    dpo_beta: Annotated[float, typer.Option("--dpo-beta", help="How near to the base.")] = 0.1,
    held_out: Annotated[
        int, typer.Option("--held-out", help="Keep the last examples out, and measure on them.")
    ] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Join prompt and completion without a chat template.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same run.")] = 0,
    snapshot_every: Annotated[
        int, typer.Option("--snapshot-every", help="Steps that a failure may cost.")
    ] = 50,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last snapshot in --out.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="auto, float32 (exact) or bfloat16.")
    ] = None,
    config: Config = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end, and nothing else.")
    ] = False,
) -> None:
    """Train an adapter: the blocks learn where they are, your data stays here.

    Ctrl-C ends after the present step; --resume goes on. The adapter is in PEFT's format; beside it
    is a picture of the loss.
    """
    with outcome(as_json):
        from swarm.client.finetune.settings import FinetuneSettings

        settings = FinetuneSettings(
            method=method,
            loss=loss,
            rank=rank,
            alpha=alpha,
            target_modules=tuple(filter(None, target_modules.replace(" ", "").split(","))),
            dropout=dropout,
            virtual_tokens=virtual_tokens,
            optimizer=optimizer,
            learning_rate=learning_rate,
            schedule=schedule,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            maximum_norm=maximum_norm,
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            micro_batch_tokens=micro_batch_tokens,
            micro_batches_in_flight=in_flight,
            max_length=max_length,
            dpo_beta=dpo_beta,
            seed=seed,
            snapshot_every=snapshot_every,
        )
        join = settings_from(peers, dtype, config, policy)
        prepare_process()
        from swarm.client.finetune.run import Job, run_job

        job = Job(model, data, out, settings, join, held_out=held_out, raw=raw, resume=resume)
        run_job(job, as_json=as_json)
