"""Two rounds over HTTP: real training, one participant leaves, the aggregator starts again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from aiohttp import web

from swarm.client.finetune.federation.aggregator_client import AggregatorClient
from swarm.client.finetune.federation.files import FederationFiles, Tensors
from swarm.client.finetune.federation.local_training import SwarmTraining
from swarm.client.finetune.federation.member import (
    Learned,
    LocalTraining,
    Member,
    MemberObserver,
)
from swarm.client.finetune.federation.process import new_beginning
from swarm.client.finetune.federation.rounds import Phase
from swarm.client.finetune.federation.service import AggregatorService
from swarm.client.finetune.federation.terms import FederationTerms
from swarm.client.finetune.objectives import SupervisedFineTuning
from swarm.client.finetune.settings import FinetuneSettings
from swarm.protocol.identity import Identity
from swarm.virtual_time import LoopClock
from tests.training_swarm import (
    TrainingSwarm,
    load_ends,
    make_examples,
    save_tiny_model,
    training_swarm,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

COUNTS = (12, 24, 8)
RECIPE = FinetuneSettings(
    rank=2,
    target_modules=("q_proj", "v_proj"),
    learning_rate=3e-3,
    schedule="constant",
    steps=2,
    batch_size=4,
    micro_batch_tokens=64,
)

torch.set_num_threads(1)


class Trainings:
    """What each participant learned in each round, to add it up in the open."""

    def __init__(self) -> None:
        self.before: dict[int, Tensors] = {}
        self.changes: dict[int, dict[int, Mapping[str, torch.Tensor]]] = {}

    def watched(self, member: int, training: SwarmTraining) -> LocalTraining:
        async def train(number: int, before: Tensors, folder: Path) -> Learned:
            learned = await training(number, before, folder)
            self.before[number] = before
            self.changes.setdefault(number, {})[member] = {
                name: learned.adapter[name] - before[name] for name in before
            }
            return learned

        return train

    def mean(self, number: int, members: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The adapter after a round of these."""
        examples = sum(COUNTS[member] for member in members)
        return {
            name: tensor
            + sum(COUNTS[one] / examples * self.changes[number][one][name] for one in members)
            for name, tensor in self.before[number].items()
        }


class LeavesAfterAdvertising(MemberObserver):
    """Of the second round, as if its computer had been switched off."""

    def __init__(self) -> None:
        self.task: asyncio.Task[object] | None = None

    def sent(self, number: int, phase: Phase) -> None:
        if number == 2 and phase is Phase.ADVERTISE and self.task is not None:
            self.task.cancel()


@asynccontextmanager
async def listening(application: web.Application, port: int) -> AsyncIterator[int]:
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


async def join(
    url: str,
    number: int,
    identity: Identity,
    swarm: TrainingSwarm,
    folder: Path,
    output: Path,
    trainings: Trainings,
    observer: MemberObserver,
) -> dict[str, torch.Tensor]:
    async with AggregatorClient(url, identity, clock=LoopClock()) as client:
        terms = await client.terms()
        objective = SupervisedFineTuning(
            make_examples(COUNTS[number], 100 + number), micro_batch_tokens=64, prefix=0
        )
        training = SwarmTraining(
            swarm.open_chain, load_ends(folder), swarm.base, terms, objective, swarm.clock
        )
        member = Member(
            client,
            identity,
            terms,
            trainings.watched(number, training),
            output,
            clock=swarm.clock,
            observer=observer,
        )
        return await member.run()


async def test_two_rounds_one_leaves_and_the_aggregator_restarts(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    save_tiny_model(folder, blocks=2)
    members = [Identity.generate() for _ in COUNTS]
    files = FederationFiles(tmp_path / "aggregator")
    trainings = Trainings()
    leaving = LeavesAfterAdvertising()
    async with training_swarm(folder, [(0, 1), (1, 2)]) as swarm:
        beginning = await new_beginning(swarm.open_chain, swarm.base, RECIPE)
        terms = FederationTerms(
            federation_id=bytes(16),
            aggregator=files.identity().peer_id,
            model=beginning.model,
            model_revision=beginning.model_revision,
            recipe=beginning.recipe,
            invited=tuple(member.peer_id for member in members),
            rounds=2,
            minimum=2,
            train_s=60.0,
            answer_s=8.0,
        )
        files.create(terms, beginning.adapter)
        first_ended = asyncio.Event()

        def changed(number: int, _: object) -> None:
            if number == 2:
                first_ended.set()

        first = AggregatorService(files, files.identity(), clock=LoopClock(), changed=changed)
        async with asyncio.TaskGroup() as tasks:
            async with listening(first.application(), 0) as port:
                url = f"http://127.0.0.1:{port}"
                joined = [
                    tasks.create_task(
                        join(
                            url,
                            number,
                            member,
                            swarm,
                            folder,
                            tmp_path / f"member-{number}",
                            trainings,
                            leaving if number == 2 else MemberObserver(),
                        )
                    )
                    for number, member in enumerate(members)
                ]
                leaving.task = joined[2]
                running = tasks.create_task(first.run())
                await first_ended.wait()
                running.cancel()  # the process ends between the rounds
                first.stop()
            again = AggregatorService(files, files.identity(), clock=LoopClock())
            assert [line.participants for line in again.done] == [3]
            async with listening(again.application(), port):
                await again.run()
                results = [await joined[number] for number in (0, 1)]
                await again.collected(0.0)
        assert joined[2].cancelled()
    assert [(one.participants, one.examples) for one in again.done] == [(3, 44), (2, 36)]
    after_first = trainings.mean(1, (0, 1, 2))
    assert all(
        torch.allclose(after_first[name], trainings.before[2][name], atol=1e-6)
        for name in after_first
    )
    expected = trainings.mean(2, (0, 1))
    for result in results:
        assert result.keys() == expected.keys()
        for name, tensor in result.items():
            assert torch.allclose(tensor, expected[name], atol=1e-6)
    moved = [float((expected[name] - beginning.adapter[name]).abs().max()) for name in expected]
    assert min(moved) > 1e-4
