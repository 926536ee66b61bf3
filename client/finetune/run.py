"""One run of ``swarm finetune``: reads model and data, trains, and shows how it goes."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import AutoTokenizer

from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.resolve import local_checkpoint
from swarm.client.app import SwarmClient
from swarm.client.config import ClientSettings
from swarm.client.finetune.chain import TrainingChain
from swarm.client.finetune.chain_request import TrainingChainRequest
from swarm.client.finetune.ends import TrainingEnds
from swarm.client.finetune.examples import (
    Example,
    Pair,
    TokenizerEncoder,
    read_examples,
    read_pairs,
)
from swarm.client.finetune.loss_curve import loss_curve
from swarm.client.finetune.model import BaseModel, base_model
from swarm.client.finetune.objectives import (
    DirectPreferenceOptimization,
    Objective,
    SupervisedFineTuning,
)
from swarm.client.finetune.progress import Watcher
from swarm.client.finetune.settings import FinetuneSettings
from swarm.client.finetune.trainer import Trainer
from swarm.client.joining import connected, progress_line
from swarm.client.output import note
from swarm.protocol.errors import CheckpointError, UsageError
from swarm.virtual_time import LoopClock

PICTURE = "loss.svg"

T = TypeVar("T", Example, Pair)


@dataclass(frozen=True, slots=True)
class Job:
    """What the command was told."""

    model: str
    data: Path
    out: Path
    settings: FinetuneSettings
    join: ClientSettings
    held_out: int
    raw: bool
    resume: bool


def run_job(job: Job, *, as_json: bool) -> None:
    """Train to the end, or to a snapshot after Ctrl-C. Raises SwarmErrors."""
    with shown_progress(as_json) as progress, connected(job.join) as (background, client):
        local = local_checkpoint(job.model)
        if local is None:
            local = background.run(client.fetch_ends(job.model, progress_line()))
        checkpoint = Checkpoint.open(local)
        ends = TrainingEnds.load(checkpoint)
        objective, held_out = read_objectives(job, checkpoint)
        base = base_model(checkpoint, job.join.dtype)
        watcher = Watcher(progress, quiet=as_json)
        trainer = Trainer(
            Opener(client, base),
            ends,
            base,
            job.settings,
            objective,
            job.out,
            clock=LoopClock(),
            data_digest=data_digest(job),
            held_out=held_out,
            observer=watcher,
        )
        with _ctrl_c_stops(trainer):
            is_done = background.run(trainer.run(resume=job.resume))
    picture = job.out / PICTURE
    name = f"{job.settings.method}, {job.settings.loss}"
    picture.write_text(loss_curve(f"{checkpoint.name}: loss by step", {name: trainer.losses}))
    result = {
        "done": is_done,
        "steps": trainer.step,
        "total_steps": trainer.total_steps,
        "loss": trainer.losses[-1] if trainer.losses else None,
        "held_out_loss": {str(step): loss for step, loss in watcher.held_out.items()},
        "tokens": watcher.speed.tokens,
        "duration_s": round(watcher.speed.duration_s, 3),
        "chains_lost": watcher.went_back_times,
        "adapter": str(job.out) if is_done else None,
        "picture": str(picture),
    }
    if as_json:
        print(json.dumps(result))
    elif is_done:
        note(f"adapter in {job.out}, picture of the loss in {picture}")
    else:
        note(f"stopped after step {trainer.step}; the same command with --resume goes on")


def read_objectives(job: Job, checkpoint: Checkpoint) -> tuple[Objective, Objective | None]:
    """What is learned, and what is only measured. Raises UsageErrors."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the tokenizer in {checkpoint.path}") from error
    encoder = TokenizerEncoder(tokenizer, raw=job.raw)
    settings = job.settings
    prefix = settings.virtual_tokens if settings.method == "prompt" else 0
    if settings.loss == "dpo":
        pairs = read_pairs(job.data, encoder, max_length=settings.max_length)
        parts = _apart(pairs, job.held_out)
        return _both(
            [
                DirectPreferenceOptimization(
                    part,
                    beta=settings.dpo_beta,
                    micro_batch_tokens=settings.micro_batch_tokens,
                    prefix=prefix,
                )
                for part in parts
            ]
        )
    examples = read_examples(job.data, encoder, max_length=settings.max_length)
    return _both(
        [
            SupervisedFineTuning(
                part, micro_batch_tokens=settings.micro_batch_tokens, prefix=prefix
            )
            for part in _apart(examples, job.held_out)
        ]
    )


def _apart(examples: list[T], held_out: int) -> list[list[T]]:
    if held_out < 0 or held_out >= len(examples):
        raise UsageError(f"{held_out} of {len(examples)} examples cannot be held out")
    if held_out == 0:
        return [examples]
    return [examples[:-held_out], examples[-held_out:]]


def _both(objectives: Sequence[Objective]) -> tuple[Objective, Objective | None]:
    return objectives[0], objectives[1] if len(objectives) > 1 else None


class Opener:
    """Opens chains for one model."""

    def __init__(self, client: SwarmClient, base: BaseModel) -> None:
        self._client = client
        self._base = base

    async def __call__(self, request: TrainingChainRequest) -> TrainingChain:
        return await self._client.open_training(
            request, dtype=self._base.node_dtype, model_name=self._base.name
        )


@contextmanager
def _ctrl_c_stops(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C ends after the present step, the second one at once."""

    def interrupted(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        trainer.stop()
        note("ending after this step; Ctrl-C again ends at once")

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def shown_progress(as_json: bool) -> Iterator[Progress | None]:
    """A bar on stderr; None where nobody sees it."""
    if as_json or not sys.stderr.isatty():
        yield None
        return
    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
    ) as progress:
        yield progress


def data_digest(job: Job) -> str:
    """Of the data as it is read."""
    try:
        content = job.data.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {job.data}: {error.strerror}") from error
    return hashlib.sha256(content + f"\n{job.held_out} {job.raw}".encode()).hexdigest()
