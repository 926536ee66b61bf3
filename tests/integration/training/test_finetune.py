"""Whole trainings through three nodes against PEFT on the whole model in one process."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file

from swarm.client.finetune.chain import TrainingChain
from swarm.client.finetune.examples import Example, Order, Pair
from swarm.client.finetune.federated import adapter_names, change_vector, moved
from swarm.client.finetune.model import base_model
from swarm.client.finetune.objectives import (
    DirectPreferenceOptimization,
    Objective,
    SupervisedFineTuning,
)
from swarm.client.finetune.settings import FinetuneSettings, learning_rate
from swarm.client.finetune.snapshots import Snapshots
from swarm.client.finetune.trainer import StepReport, Trainer, TrainingObserver
from swarm.protocol.errors import NoRouteError, SwarmError
from swarm.protocol.identity import Identity
from tests.federated_round import run_round
from tests.training_swarm import (
    TrainingSwarm,
    load_ends,
    make_examples,
    save_tiny_model,
    training_swarm,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SPANS = [(0, 2), (2, 3), (3, 6)]
STEPS = 50

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, save_tiny_model(folder)


def make_pairs(count: int) -> list[Pair]:
    chosen, rejected = make_examples(count, 6), make_examples(count, 7)
    return [
        Pair(
            Example(one.token_ids[:4] + one.token_ids, 4),
            Example(one.token_ids[:4] + other.token_ids, 4),
        )
        for one, other in zip(chosen, rejected, strict=True)
    ]


def make_settings(**changes: Any) -> FinetuneSettings:
    given: dict[str, Any] = {
        "rank": 4,
        "target_modules": ("q_proj", "v_proj", "down_proj"),
        "learning_rate": 3e-3,
        "schedule": "cosine",
        "warmup_steps": 5,
        "weight_decay": 0.01,
        "steps": STEPS,
        "batch_size": 6,
        "micro_batch_tokens": 48,
        "micro_batches_in_flight": 2,
        "snapshot_every": 10,
        "virtual_tokens": 5,
    }
    return FinetuneSettings(**given | changes)


def make_objective(settings: FinetuneSettings) -> Objective:
    prefix = settings.virtual_tokens if settings.method == "prompt" else 0
    if settings.loss == "dpo":
        return DirectPreferenceOptimization(
            make_pairs(24),
            beta=settings.dpo_beta,
            micro_batch_tokens=settings.micro_batch_tokens,
            prefix=prefix,
        )
    return SupervisedFineTuning(
        make_examples(40), micro_batch_tokens=settings.micro_batch_tokens, prefix=prefix
    )


class Watching(TrainingObserver):
    """Remembers what happened, and acts after chosen steps."""

    def __init__(self) -> None:
        self.chains: list[TrainingChain] = []
        self.steps: list[int] = []
        self.relayed: list[int] = []
        self.went_back_to: list[int] = []
        self.reasons: list[SwarmError] = []
        self.after: dict[int, Any] = {}

    def chain_opened(self, chain: TrainingChain) -> None:
        self.chains.append(chain)

    def step_done(self, report: StepReport) -> None:
        self.steps.append(report.step)
        self.relayed.append(self.chains[-1].tensors_relayed)
        if report.step in self.after:
            self.after.pop(report.step)()

    def went_back(self, step: int, reason: SwarmError) -> None:
        self.went_back_to.append(step)
        self.reasons.append(reason)


def make_trainer(
    swarm: TrainingSwarm,
    folder: Path,
    settings: FinetuneSettings,
    output: Path,
    observer: TrainingObserver | None = None,
    *,
    dtype: str = "float32",
) -> Trainer:
    return Trainer(
        swarm.open_chain,
        load_ends(folder),
        base_model(swarm.checkpoint, dtype),
        settings,
        make_objective(settings),
        output,
        clock=swarm.clock,
        observer=observer,
    )


# --- the reference -------------------------------------------------------------------------------
def mean_loss(model: Any, examples: Sequence[Example], prefix: int) -> torch.Tensor:
    """As transformers' trainer counts it: padded rows, -100 where nothing is learned."""
    longest = max(len(example.token_ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full((len(examples), longest), -100)
    for row, example in enumerate(examples):
        length = len(example.token_ids)
        ids[row, :length] = torch.tensor(example.token_ids)
        mask[row, :length] = 1
        learned = torch.tensor(example.token_ids[example.first_learned :])
        labels[row, example.first_learned : length] = learned
    logits = model(input_ids=ids, attention_mask=mask).logits
    if prefix:
        logits = logits[:, prefix - 1 :]
    else:
        labels = labels[:, 1:]
    flat = logits[:, : labels.shape[1]].reshape(-1, logits.shape[-1])
    loss: torch.Tensor = F.cross_entropy(flat, labels.reshape(-1), ignore_index=-100)
    return loss


def answer_score(model: Any, example: Example, prefix: int) -> torch.Tensor:
    ids = torch.tensor([example.token_ids])
    logits = model(input_ids=ids).logits[0, prefix:]
    scores = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    score: torch.Tensor = scores[example.first_learned - 1 :].sum()
    return score


def dpo_loss(model: Any, whole: Any, pairs: Sequence[Pair], beta: float) -> torch.Tensor:
    losses = []
    for pair in pairs:
        margin = answer_score(model, pair.chosen, 0) - answer_score(model, pair.rejected, 0)
        with torch.no_grad():
            frozen = answer_score(whole, pair.chosen, 0) - answer_score(whole, pair.rejected, 0)
        losses.append(-F.logsigmoid(beta * (margin - frozen)))
    return torch.stack(losses).mean()


def train_locally(
    whole: Any, settings: FinetuneSettings, beginning: dict[str, torch.Tensor]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """PEFT and torch alone, from the same first values; losses and the adapter's tensors."""
    import peft

    config: Any
    if settings.method == "prompt":
        config = peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=settings.virtual_tokens
        )
    else:
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            target_modules=list(settings.target_modules),
            use_dora=settings.method == "dora",
        )
    model = peft.get_peft_model(copy.deepcopy(whole), config)
    peft.set_peft_model_state_dict(model, beginning)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=settings.weight_decay)
    objective = make_objective(settings)
    order = Order(objective.size, batch_size=settings.batch_size, seed=settings.seed)
    prefix = settings.virtual_tokens if settings.method == "prompt" else 0
    examples, pairs = make_examples(40), make_pairs(24)
    losses = []
    for step in range(1, STEPS + 1):
        batch = order.batch(step)
        if settings.loss == "dpo":
            chosen = [pairs[index] for index in batch]
            loss = dpo_loss(model, whole, chosen, settings.dpo_beta)
        else:
            loss = mean_loss(model, [examples[index] for index in batch], prefix)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, settings.maximum_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, STEPS)
        optimizer.step()
        losses.append(loss.item())
    return losses, peft.get_peft_model_state_dict(model)


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).norm() / other[key].norm()) for key in one)


def initial_adapter(output: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(output / "adapter_model.safetensors")
    return tensors


async def first_values(
    swarm: TrainingSwarm, folder: Path, settings: FinetuneSettings, output: Path
) -> dict[str, torch.Tensor]:
    """The adapter before the first step: a training with a learning rate of nearly nothing."""
    from dataclasses import replace

    still = replace(settings, steps=1, warmup_steps=1)  # the first step's rate is 0
    assert await make_trainer(swarm, folder, still, output).run()
    return initial_adapter(output)


@pytest.mark.parametrize(
    ("method", "loss"), [("lora", "sft"), ("dora", "sft"), ("prompt", "sft"), ("lora", "dpo")]
)
async def test_fifty_steps_equal_peft(
    tiny: tuple[Path, Any], tmp_path: Path, method: str, loss: str
) -> None:
    folder, whole = tiny
    settings = make_settings(method=method, loss=loss)
    observer = Watching()
    async with training_swarm(folder, SPANS) as swarm:
        beginning = await first_values(swarm, folder, settings, tmp_path / "first")
        trainer = make_trainer(swarm, folder, settings, tmp_path / "adapter", observer)
        assert await trainer.run()
        assert not observer.reasons
        assert len(set(observer.relayed[:10])) == 1  # nothing between hops passes the client
        assert len(observer.chains[0].plan.hops) == 3
    losses, expected = train_locally(whole, settings, beginning)
    assert trainer.losses == pytest.approx(losses, rel=1e-3)
    assert losses[-1] < losses[0]
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert relative_difference(trained, expected) < 1e-3
    assert relative_difference(trained, beginning) > 1e-2  # it did learn


async def test_node_killed_client_killed_other_borders(
    tiny: tuple[Path, Any], tmp_path: Path
) -> None:
    """A node dies, then the client; it goes on over other spans: the same adapter in the end."""
    folder, _ = tiny
    settings = make_settings(dropout=0.1)
    async with training_swarm(folder, SPANS) as swarm:
        undisturbed = make_trainer(swarm, folder, settings, tmp_path / "undisturbed")
        assert await undisturbed.run()
    output = tmp_path / "disturbed"
    observer = Watching()
    async with training_swarm(folder, [*SPANS, (1, 4)]) as swarm:
        first = make_trainer(swarm, folder, settings, output, observer)
        observer.after[17] = lambda: swarm.kill(swarm.nodes[1])
        observer.after[33] = first.stop
        assert not await first.run()
        assert observer.went_back_to == [10]
        assert [step for step in observer.steps if step == 17] == [17, 17]
        assert first.step == 33
    # The first client left its snapshot of step 33; this one is as if it had been killed at 30.
    (output / "snapshots" / "step-00000033.safetensors").write_bytes(b"half a file")
    async with training_swarm(folder, [(0, 5), (4, 6)]) as swarm:
        second = make_trainer(swarm, folder, settings, output)
        assert await second.run(resume=True)
    assert second.losses == pytest.approx(undisturbed.losses, rel=1e-3)
    trained, expected = initial_adapter(output), initial_adapter(tmp_path / "undisturbed")
    assert relative_difference(trained, expected) < 1e-3


async def test_a_node_that_drains_costs_no_step(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = tiny
    settings = make_settings(steps=8)
    observer = Watching()
    async with training_swarm(folder, [*SPANS, (1, 4)]) as swarm:
        trainer = make_trainer(swarm, folder, settings, tmp_path, observer)
        observer.after[3] = lambda: swarm.nodes[1].service.stop_accepting(30.0)
        assert await trainer.run()
        leaving = swarm.nodes[1].peer.peer_id
        assert leaving not in {hop.peer_id for hop in observer.chains[-1].plan.hops}
    assert observer.went_back_to == []
    assert observer.steps == list(range(1, 9))  # none twice
    assert len(observer.chains) == 2


async def test_ctrl_c_while_nodes_are_missing(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    """It ends with the latest snapshot instead of waiting for nodes that do not come."""
    folder, _ = tiny
    settings = make_settings(steps=8, snapshot_every=2)
    async with training_swarm(folder, SPANS) as swarm:

        class Impatient(Watching):
            def went_back(self, step: int, reason: SwarmError) -> None:
                super().went_back(step, reason)
                if len(self.reasons) == 2:
                    trainer.stop()

        observer = Impatient()
        trainer = make_trainer(swarm, folder, settings, tmp_path, observer)
        observer.after[5] = lambda: swarm.kill(swarm.nodes[1])
        assert not await trainer.run()
        assert trainer.step == 4
        assert isinstance(observer.reasons[-1], NoRouteError)
        await swarm.add_node(*SPANS[1])
        again = make_trainer(swarm, folder, settings, tmp_path)
        assert await again.run(resume=True)


async def test_federated_round_with_a_drop_out(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    """Three clients train one adapter on their own data; one leaves: the mean of the other two."""
    folder, _ = tiny
    counts = (12, 24, 8)
    settings = make_settings(steps=3, warmup_steps=0)
    members = [Identity.generate() for _ in counts]
    after: dict[Identity, dict[str, torch.Tensor]] = {}
    async with training_swarm(folder, SPANS) as swarm:
        await first_values(swarm, folder, settings, tmp_path / "first")
        common = Snapshots(tmp_path / "first").load_latest()
        assert common is not None
        before = {name: common.tensors[name] for name in adapter_names(common.tensors)}
        for number, (member, count) in enumerate(zip(members, counts, strict=True)):
            output = tmp_path / f"client-{number}"
            trainer = Trainer(
                swarm.open_chain,
                load_ends(folder),
                swarm.base,
                settings,
                SupervisedFineTuning(
                    make_examples(count, 100 + number), micro_batch_tokens=48, prefix=0
                ),
                output,
                clock=swarm.clock,
            )
            assert await trainer.run(beginning=before)
            snapshot = Snapshots(output).load_latest()
            assert snapshot is not None
            after[member] = {name: snapshot.tensors[name] for name in before}
    vectors = {
        member: change_vector(before, after[member], count, len(members))
        for member, count in zip(members, counts, strict=True)
    }
    total, _ = run_round(vectors, leave_before_masked=[members[2]])
    result = moved(before, total)
    weights = (12 / 36, 24 / 36)
    for name, tensor in result.items():
        changes = [after[member][name] - before[name] for member in members[:2]]
        expected = weights[0] * changes[0] + weights[1] * changes[1]
        assert torch.allclose(tensor - before[name], expected, atol=1e-6)
        assert float((tensor - before[name]).abs().max()) > 1e-5
