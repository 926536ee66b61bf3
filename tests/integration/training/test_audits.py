"""Trainings through nodes that cheat: they are found, and the adapter is that of honest ones."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.client.finetune import model
from swarm.client.finetune.audited_training import AuditedTraining, AuditFailed, TakenStep
from swarm.client.finetune.auditing import TrainingAuditor
from swarm.client.finetune.model import chain_request
from swarm.client.link import HopFailed
from swarm.ledger.reputation import Found, Standing
from swarm.node import training_service
from swarm.node.engine.training_api import TrainingRequest
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import OpenTraining
from tests.evil_training import Cheat, EvilHop, EvilTraining
from tests.integration.training.test_finetune import (
    Watching,
    initial_adapter,
    make_settings,
    make_trainer,
    relative_difference,
)
from tests.training_swarm import TrainingNode, TrainingSwarm, save_tiny_model, training_swarm

torch.set_num_threads(1)

STEPS = 12
BEFORE, CHEATED, BEHIND = (0, 2), (2, 4), (4, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_model(path)
    return path


def settings(**changes: Any) -> Any:
    given = {"steps": STEPS, "snapshot_every": 4, "dropout": 0.1, "warmup_steps": 0}
    return make_settings(**given | changes)


@pytest.fixture(scope="module")
def honest_adapter(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """Of a training that nobody disturbs or audits."""
    output = tmp_path_factory.mktemp("honest")

    async def train() -> None:
        async with training_swarm(folder, [BEFORE, CHEATED, BEHIND]) as swarm:
            assert await make_trainer(swarm, folder, settings(), output).run()

    asyncio.run(train())
    return initial_adapter(output)


def found(auditor: TrainingAuditor, peer: PeerId) -> list[Found]:
    return [each.found for each in auditor.findings if each.peer_id == peer]


class Certain(random.Random):
    """Draws everybody who is audited always, and nobody else."""

    def random(self) -> float:
        return 0.5


def trust(auditor: TrainingAuditor, *nodes: TrainingNode) -> None:
    """Enough right answers that these are looked at rarely."""
    for node in nodes:
        for number in range(100):
            auditor.reputations.found(
                node.peer.peer_id, Found.PASSED, segment=str(number), now_unix_s=0.0
            )


async def evil_swarm(swarm: TrainingSwarm, evil: EvilTraining) -> PeerId:
    """A cheating node that is chosen before two honest ones for the same blocks."""
    await swarm.add_node(*BEFORE)
    cheating = await swarm.add_node(*CHEATED, evil=evil)
    for _ in range(2):
        await swarm.add_node(*CHEATED)
    await swarm.add_node(*BEHIND)
    return cheating.peer.peer_id


@pytest.fixture(autouse=True)
def evil_hops(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nodes can lie in what they say they handled."""
    monkeypatch.setattr(training_service, "TrainingHop", EvilHop)


@pytest.mark.parametrize(
    "cheat", [each for each in Cheat if each not in (Cheat.HIDE, Cheat.VANISH, Cheat.LIE)]
)
async def test_who_cheats_is_found_and_the_adapter_is_right(
    folder: Path, tmp_path: Path, honest_adapter: dict[str, torch.Tensor], cheat: Cheat
) -> None:
    observer = Watching()
    async with training_swarm(folder, []) as swarm:
        evil = await evil_swarm(swarm, EvilTraining(cheat))
        auditor = swarm.audit()
        assert await make_trainer(swarm, folder, settings(), tmp_path, observer).run()
        assert found(auditor, evil) == [Found.FAILED]
        assert all(each.found is Found.PASSED for each in auditor.findings if each.peer_id != evil)
        assert auditor.wrong == {evil}
        assert auditor.reputations.standing(evil, swarm.clock.unix_s()) is Standing.LAST_RESORT
        assert len(observer.chains) == 2
        assert evil in {hop.peer_id for hop in observer.chains[0].plan.hops}
        assert evil not in {hop.peer_id for hop in observer.chains[1].plan.hops}
    assert relative_difference(initial_adapter(tmp_path), honest_adapter) < 1e-3


async def test_no_snapshot_has_a_step_that_is_being_audited(
    folder: Path, tmp_path: Path, honest_adapter: dict[str, torch.Tensor]
) -> None:
    """Who begins to cheat after a snapshot costs the steps since."""
    observer = Watching()
    async with training_swarm(folder, []) as swarm:
        evil = await evil_swarm(swarm, EvilTraining(Cheat.HALF, after_steps=6))
        auditor = swarm.audit(Certain())
        trust(auditor, *(node for node in swarm.nodes if node.peer.peer_id != evil))
        assert await make_trainer(swarm, folder, settings(), tmp_path, observer).run()
        assert found(auditor, evil)[-1] is Found.FAILED
        assert observer.went_back_to == [4]
        assert isinstance(observer.reasons[0].__cause__, AuditFailed)
    assert relative_difference(initial_adapter(tmp_path), honest_adapter) < 1e-3


async def test_who_lies_about_a_neighbour_is_not_its_neighbour_again(
    folder: Path, tmp_path: Path, honest_adapter: dict[str, torch.Tensor]
) -> None:
    """Of two that contradict each other nobody knows which one lies."""
    observer = Watching()
    async with training_swarm(folder, []) as swarm:
        evil = await evil_swarm(swarm, EvilTraining(Cheat.LIE))
        auditor = swarm.audit()
        assert await make_trainer(swarm, folder, settings(), tmp_path, observer).run()
        before = swarm.nodes[0].peer.peer_id
        assert found(auditor, evil) == [Found.DISPUTED]
        assert Found.DISPUTED in found(auditor, before)
        assert swarm.apart == [{evil, before}]
        assert observer.went_back_to == [0]
    assert relative_difference(initial_adapter(tmp_path), honest_adapter) < 1e-3


async def test_who_lies_to_the_client_is_found_at_once(folder: Path, tmp_path: Path) -> None:
    observer = Watching()
    async with training_swarm(folder, []) as swarm:
        await swarm.add_node(0, 4, evil=EvilTraining(Cheat.LIE))
        await swarm.add_node(0, 6)
        auditor = swarm.audit()
        assert await make_trainer(swarm, folder, settings(), tmp_path, observer).run()
        assert found(auditor, swarm.nodes[0].peer.peer_id) == [Found.FAILED]
        assert observer.went_back_to == [0]


async def test_who_hides_its_work_is_the_last_resort(folder: Path, tmp_path: Path) -> None:
    """The training goes on; in the next one others are chosen."""
    observer = Watching()
    async with training_swarm(folder, []) as swarm:
        evil = await evil_swarm(swarm, EvilTraining(Cheat.HIDE))
        auditor = swarm.audit(Certain())
        trust(auditor, *(node for node in swarm.nodes if node.peer.peer_id != evil))
        assert await make_trainer(swarm, folder, settings(), tmp_path / "1", observer).run()
        assert found(auditor, evil) == [Found.REFUSED] * STEPS
        assert await make_trainer(swarm, folder, settings(), tmp_path / "2", observer).run()
        assert not observer.reasons
        assert evil in {hop.peer_id for hop in observer.chains[0].plan.hops}
        assert evil not in {hop.peer_id for hop in observer.chains[1].plan.hops}


async def test_who_leaves_instead_of_showing_is_the_last_resort(
    folder: Path, tmp_path: Path, honest_adapter: dict[str, torch.Tensor]
) -> None:
    observer = Watching()
    async with training_swarm(folder, []) as swarm:
        evil = await evil_swarm(swarm, EvilTraining(Cheat.VANISH))
        auditor = swarm.audit()
        assert await make_trainer(swarm, folder, settings(), tmp_path, observer).run()
        assert found(auditor, evil) == [Found.REFUSED] * 3
        assert evil not in {hop.peer_id for hop in observer.chains[-1].plan.hops}
    assert relative_difference(initial_adapter(tmp_path), honest_adapter) < 1e-3


async def test_a_replica_that_cheats_is_found_by_the_third(folder: Path, tmp_path: Path) -> None:
    """The honest hop passes, and the training is not disturbed."""
    observer = Watching()
    async with training_swarm(folder, [(0, 3), (3, 6)]) as swarm:
        await swarm.add_node(0, 3, evil=EvilTraining(Cheat.SKIP))
        await swarm.add_node(0, 3)
        auditor = swarm.audit()
        assert await make_trainer(swarm, folder, settings(), tmp_path, observer).run()
        first, _, evil, _ = (node.peer.peer_id for node in swarm.nodes)
        assert set(found(auditor, first)) == {Found.PASSED}
        assert found(auditor, evil) == [Found.FAILED]
        assert not observer.reasons


async def test_one_against_one_is_a_dispute_and_the_training_goes_on(
    folder: Path, tmp_path: Path
) -> None:
    observer = Watching()
    async with training_swarm(folder, [(0, 3), (3, 6)]) as swarm:
        await swarm.add_node(0, 3, evil=EvilTraining(Cheat.SKIP))
        auditor = swarm.audit()
        assert await make_trainer(swarm, folder, settings(steps=4), tmp_path, observer).run()
        assert set(found(auditor, swarm.nodes[0].peer.peer_id)) == {Found.DISPUTED}
        assert auditor.wrong == set()
        assert not observer.reasons


async def test_a_hop_whose_blocks_nobody_else_has_is_not_asked_at_every_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    honest = TrainingAuditor.shown_by

    async def count(
        auditor: TrainingAuditor, training: AuditedTraining, place: int, taken: TakenStep
    ) -> Any:
        asked.append(place)
        return await honest(auditor, training, place, taken)

    monkeypatch.setattr(TrainingAuditor, "shown_by", count)
    async with training_swarm(folder, [(0, 3), (3, 6)]) as swarm:
        auditor = swarm.audit()
        assert await make_trainer(swarm, folder, settings(), tmp_path).run()
        assert not auditor.findings
    assert sorted(asked) == [0, 1]


async def test_who_is_found_wrong_while_a_chain_opens_ends_it(folder: Path, tmp_path: Path) -> None:
    """An audit of a chain that broke ends when the next chain is planned already."""
    async with training_swarm(folder, []) as swarm:
        evil = await evil_swarm(swarm, EvilTraining(Cheat.HALF))
        auditor = swarm.audit(Certain())
        request = chain_request(swarm.base, settings(), maximum_tokens=48)
        first = await swarm.open_chain(request)
        resolve = swarm.nodes[-1].service._resolve

        async def audit_meanwhile(peer: PeerId, *, afresh: bool = False) -> Any:
            await auditor.contradicted(first, [evil], 1, AuditFailed("it cheats"))
            return await resolve(peer, afresh=afresh)

        for node in swarm.nodes:
            node.service._resolve = audit_meanwhile
        second = await swarm.open_chain(request)
        assert evil in {hop.peer_id for hop in second.plan.hops}
        for chain in (first, second):
            assert isinstance(chain.failure, HopFailed)
            assert chain.failure.peer_id == evil
        third = await swarm.open_chain(request)
        assert evil not in {hop.peer_id for hop in third.plan.hops}


async def test_nodes_that_know_no_audits_train_and_count_as_hiding(
    folder: Path,
    tmp_path: Path,
    honest_adapter: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As nodes of an older version, which ignore the field."""
    known = training_service.training_request

    def older(message: OpenTraining) -> TrainingRequest:
        return replace(known(message), audited_micro_batches=0)

    monkeypatch.setattr(training_service, "training_request", older)
    observer = Watching()
    async with training_swarm(folder, [BEFORE, CHEATED, BEHIND]) as swarm:
        auditor = swarm.audit()
        assert await make_trainer(swarm, folder, settings(), tmp_path, observer).run()
        assert {each.found for each in auditor.findings} == {Found.REFUSED}
        assert not observer.reasons
    assert relative_difference(initial_adapter(tmp_path), honest_adapter) < 1e-3


async def test_of_long_steps_the_latest_micro_batches_are_looked_at(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hops keep fewer than a step has; norm and optimizer are not judged then."""
    monkeypatch.setattr(model, "MOST_AUDITED_MICRO_BATCHES", 1)
    observer = Watching()
    async with training_swarm(folder, []) as swarm:
        evil = await evil_swarm(swarm, EvilTraining(Cheat.STALE))
        auditor = swarm.audit()
        assert await make_trainer(swarm, folder, settings(), tmp_path, observer).run()
        assert found(auditor, evil) == [Found.FAILED]
        passed = [each for each in auditor.findings if each.peer_id != evil]
        assert {each.found for each in passed} == {Found.PASSED}
        assert all(len(each.difference.forward) == 1 for each in passed if each.difference)


async def test_several_replicas_for_one_hop(folder: Path, tmp_path: Path) -> None:
    """Where no single node has all blocks of a hop, several do its step one after the other."""
    observer = Watching()
    async with training_swarm(folder, [(0, 6), (0, 2), (2, 6), (0, 4), (4, 6)]) as swarm:
        auditor = swarm.audit()
        assert await make_trainer(swarm, folder, settings(), tmp_path, observer).run()
        passed = found(auditor, swarm.nodes[0].peer.peer_id)
        assert passed
        assert set(passed) == {Found.PASSED}
        assert not observer.reasons


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor"])
@pytest.mark.parametrize("method", ["lora", "dora", "prompt"])
async def test_honest_nodes_of_other_precisions_pass(
    folder: Path, tmp_path: Path, method: str, optimizer: str
) -> None:
    observer = Watching()
    async with training_swarm(folder, []) as swarm:
        for first, end, dtype in (
            (0, 3, "bfloat16"),
            (3, 6, "float32"),
            (0, 6, "float32"),
            (3, 6, "bfloat16"),
        ):
            await swarm.add_node(first, end, dtype=dtype)
        auditor = swarm.audit()
        given = settings(method=method, optimizer=optimizer, steps=8)
        trainer = make_trainer(swarm, folder, given, tmp_path, observer, dtype="auto")
        assert await trainer.run()
        assert len(auditor.findings) > 2
        assert {each.found for each in auditor.findings} == {Found.PASSED}, auditor.findings
        assert not observer.reasons
