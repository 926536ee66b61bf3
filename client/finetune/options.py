"""Options that all commands which train share."""

from __future__ import annotations

from typing import Annotated

import typer

Rank = Annotated[int, typer.Option("--rank", help="Of the adapter's matrices.")]
Alpha = Annotated[
    float | None, typer.Option("--alpha", help="Scale of the adapter; twice the rank.")
]
TargetModules = Annotated[
    str, typer.Option("--target-modules", help="Comma-separated; as PEFT if left out.")
]
Loss = Annotated[str, typer.Option("--loss", help="sft or dpo.")]
Optimizer = Annotated[str, typer.Option("--optimizer", help="adamw, lion, adafactor.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Examples of a step.")]
MaximumLength = Annotated[
    int, typer.Option("--max-length", help="Longer examples are cut, in tokens.")
]
InFlight = Annotated[
    int, typer.Option("--in-flight", help="Micro-batches on their way at the same time.")
]
HeldOut = Annotated[
    int, typer.Option("--held-out", help="Keep the last examples out, and measure on them.")
]
Raw = Annotated[
    bool, typer.Option("--raw", help="Join prompt and completion without a chat template.")
]
SnapshotEvery = Annotated[
    int, typer.Option("--snapshot-every", help="Steps that a failure may cost.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="auto, float32 (exact) or bfloat16.")]


def module_names(text: str) -> tuple[str, ...]:
    """What ``TargetModules`` names."""
    return tuple(filter(None, text.replace(" ", "").split(",")))
