"""What a training is told, and the learning rate of each of its steps. Free of torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from swarm.compute.lora import AdapterShape, Method, default_targets
from swarm.compute.training_terms import OptimizerKind, OptimizerSettings, TrainingTerms
from swarm.protocol.errors import UsageError

METHODS = ("lora", "dora", "prompt")
LOSSES = ("sft", "dpo")
SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = {kind.name.lower(): kind for kind in OptimizerKind}
_DEFAULT_BETA2 = {"adamw": 0.999, "lion": 0.99, "adafactor": 0.8}


@dataclass(frozen=True, slots=True)
class FinetuneSettings:
    """Everything that decides the result, beside model and data."""

    method: str = "lora"
    loss: str = "sft"
    rank: int = 16
    alpha: float | None = None
    """None: twice the rank."""
    target_modules: tuple[str, ...] = ()
    """Empty: PEFT's choice for the family."""
    dropout: float = 0.0
    virtual_tokens: int = 20
    """Of prompt tuning."""
    optimizer: str = "adamw"
    learning_rate: float = 2e-4
    schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    maximum_norm: float = 1.0
    """Gradients are clipped to it, all hops together; 0: never."""
    epochs: int = 1
    steps: int | None = None
    """Ends earlier, or later than ``epochs``."""
    batch_size: int = 8
    """Examples of one step of the optimizer."""
    micro_batch_tokens: int = 512
    """What goes through the chain at once; a step may be several micro-batches."""
    micro_batches_in_flight: int = 3
    max_length: int = 512
    """Longer examples are cut."""
    dpo_beta: float = 0.1
    seed: int = 0
    snapshot_every: int = 50

    def __post_init__(self) -> None:
        for is_right, text in (
            (self.method in METHODS, f"method must be one of {', '.join(METHODS)}"),
            (self.loss in LOSSES, f"loss must be one of {', '.join(LOSSES)}"),
            (self.schedule in SCHEDULES, f"schedule must be one of {', '.join(SCHEDULES)}"),
            (self.optimizer in OPTIMIZERS, f"optimizer must be one of {', '.join(OPTIMIZERS)}"),
            (1 <= self.rank <= 1024, "rank must be between 1 and 1024"),
            (1 <= self.virtual_tokens <= 1024, "virtual tokens must be between 1 and 1024"),
            (0 < self.learning_rate <= 100, "the learning rate must be above 0"),
            (self.warmup_steps >= 0, "warmup steps must be 0 or more"),
            (self.epochs >= 1, "epochs must be 1 or more"),
            (self.steps is None or self.steps >= 1, "steps must be 1 or more"),
            (self.batch_size >= 1, "the batch size must be 1 or more"),
            (self.maximum_norm >= 0, "the largest norm must be 0 or more"),
            (1 <= self.micro_batches_in_flight <= 64, "1 to 64 micro-batches in flight"),
            (self.max_length >= 2, "examples need room for two tokens"),
            (self.dpo_beta > 0, "beta must be above 0"),
            (0 <= self.seed < 1 << 53, "the seed must be 0 or more, and below 2^53"),
            (self.snapshot_every >= 1, "snapshots are taken every 1 or more steps"),
        ):
            if not is_right:
                raise UsageError(text)

    def fingerprint(self) -> dict[str, object]:
        """What must be the same when a training goes on: all but how it is carried out."""
        values = asdict(replace(self, snapshot_every=1, micro_batches_in_flight=1))
        values["target_modules"] = list(self.target_modules)
        return values

    def adapter_shape(self, model_type: str) -> AdapterShape:
        """What is trained at the blocks."""
        if self.method == "prompt":
            return AdapterShape(Method.NONE, 0, 0.0, ())
        return AdapterShape(
            Method.DORA if self.method == "dora" else Method.LORA,
            self.rank,
            2.0 * self.rank if self.alpha is None else self.alpha,
            self.target_modules or default_targets(model_type),
        )

    def optimizer_settings(self) -> OptimizerSettings:
        return OptimizerSettings(
            OPTIMIZERS[self.optimizer],
            beta2=_DEFAULT_BETA2[self.optimizer],
            weight_decay=self.weight_decay,
        )

    def terms(self, model_type: str, maximum_tokens: int) -> TrainingTerms:
        """What every hop is asked for."""
        return TrainingTerms(
            adapter=self.adapter_shape(model_type),
            optimizer=self.optimizer_settings(),
            dropout=self.dropout,
            seed=self.seed,
            maximum_tokens=maximum_tokens,
            micro_batches_in_flight=self.micro_batches_in_flight,
        )


def learning_rate(settings: FinetuneSettings, step: int, total_steps: int) -> float:
    """Of optimizer step ``step``, 1 to ``total_steps``; the curves of transformers' schedulers."""
    done = step - 1
    warmup = settings.warmup_steps
    if done < warmup:
        return settings.learning_rate * done / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (done - warmup) / max(1, total_steps - warmup)
    if settings.schedule == "linear":
        return settings.learning_rate * max(0.0, 1.0 - progress)
    return settings.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
