"""``torch.autograd`` through a swarm: a loss of one's own, gradients on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from swarm.client.app import SwarmClient
from swarm.client.background import BackgroundLoop
from swarm.client.finetune.chain import TrainingChain
from swarm.client.finetune.chain_request import TrainingChainRequest
from swarm.client.finetune.remote import TrainableSwarmModel
from swarm.client.finetune.settings import FinetuneSettings
from swarm.protocol.errors import UsageError
from tests.training_swarm import TrainingSwarm, load_ends, save_tiny_model, training_swarm

torch.set_num_threads(1)


class Client:
    """As much of ``SwarmClient`` as a session needs."""

    def __init__(self, swarm: TrainingSwarm) -> None:
        self._swarm = swarm

    async def open_training(self, request: TrainingChainRequest, **_: Any) -> TrainingChain:
        return await self._swarm.open_chain(request)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, save_tiny_model(folder, blocks=3)


@pytest.fixture
def remote(tiny: tuple[Path, Any]) -> Iterator[TrainableSwarmModel]:
    folder, _ = tiny
    background = BackgroundLoop()
    stack = AsyncExitStack()

    async def start() -> TrainingSwarm:
        return await stack.enter_async_context(training_swarm(folder, [(0, 2), (2, 3)]))

    swarm = background.run(start())
    settings = FinetuneSettings(rank=2, micro_batches_in_flight=2)
    model = TrainableSwarmModel(
        load_ends(folder),
        swarm.base,
        settings,
        cast(SwarmClient, Client(swarm)),
        background,
        maximum_tokens=64,
    )
    yield model
    model.close()
    background.run(stack.aclose())
    background.close()


def test_gradients_of_a_loss_of_ones_own(
    remote: TrainableSwarmModel, tiny: tuple[Path, Any]
) -> None:
    _, whole = tiny
    ids = torch.randint(3, 96, (2, 7))
    embedded = remote.embed(ids).requires_grad_()
    (remote.logits(remote.blocks(embedded)) ** 2).mean().backward()  # type: ignore[no-untyped-call]
    expected = whole.get_input_embeddings()(ids).detach().requires_grad_()
    (whole(inputs_embeds=expected).logits ** 2).mean().backward()
    assert embedded.grad is not None
    assert torch.allclose(embedded.grad, expected.grad, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(remote(ids), whole(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_loop_of_ones_own_learns(remote: TrainableSwarmModel) -> None:
    ids = torch.randint(3, 96, (2, 7))
    losses = []
    for _ in range(8):
        logits = remote(ids)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        assert remote.optimizer_step(0.05, maximum_norm=1.0) > 0
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_graphs_that_nobody_needs_are_forgotten(remote: TrainableSwarmModel) -> None:
    ids = torch.randint(3, 96, (1, 5))
    for _ in range(5):  # more than may be in flight; each graph is dropped
        remote(ids)
    kept = [remote(ids), remote(ids)]
    with pytest.raises(UsageError, match="wait for their gradients"):
        remote(ids)
    torch.stack(kept).sum().backward()  # type: ignore[no-untyped-call]
    remote.optimizer_step(0.01)
