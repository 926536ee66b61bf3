"""``swarm finetune``: train an adapter through the swarm on data that stays here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarm.client.finetune.options import (
    Alpha,
    BatchSize,
    Dtype,
    HeldOut,
    InFlight,
    Loss,
    MaximumLength,
    Optimizer,
    Rank,
    Raw,
    SnapshotEvery,
    TargetModules,
    module_names,
)
from swarm.client.joining import (
    AsJson,
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
    loss: Loss = "sft",
    rank: Rank = 16,
    alpha: Alpha = None,
    target_modules: TargetModules = "",
    dropout: Annotated[float, typer.Option("--dropout", help="Of the adapter's inputs.")] = 0.0,
    virtual_tokens: Annotated[
        int, typer.Option("--virtual-tokens", help="Of --method prompt.")
    ] = 20,
    epochs: Annotated[int, typer.Option("--epochs", help="How often all data is seen.")] = 1,
    steps: Annotated[
        int | None, typer.Option("--steps", help="End after so many, whatever --epochs says.")
    ] = None,
    batch_size: BatchSize = 8,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="Highest.")
    ] = 2e-4,
    schedule: Annotated[str, typer.Option("--schedule", help="constant, linear, cosine.")] = (
        "linear"
    ),
    warmup_steps: Annotated[int, typer.Option("--warmup-steps", help="Up to it.")] = 0,
    optimizer: Optimizer = "adamw",
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Of AdamW.")] = 0.0,
    maximum_norm: Annotated[
        float, typer.Option("--max-norm", help="Clip gradients to this; 0 never.")
    ] = 1.0,
    max_length: MaximumLength = 512,
    micro_batch_tokens: Annotated[
        int, typer.Option("--micro-batch-tokens", help="What passes the chain at once.")
    ] = 512,
    in_flight: InFlight = 3,
    dpo_beta: Annotated[float, typer.Option("--dpo-beta", help="How near to the base.")] = 0.1,
    held_out: HeldOut = 0,
    raw: Raw = False,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same run.")] = 0,
    snapshot_every: SnapshotEvery = 50,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last snapshot in --out.")
    ] = False,
    dtype: Dtype = None,
    config: Config = None,
    as_json: AsJson = False,
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
            target_modules=module_names(target_modules),
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
