"""The head for many answers at once: batched, cancelled, failing."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from swarm.client.choosing import ChoiceQueue, TokenChooser
from swarm.client.config import SamplingSettings
from swarm.compute.wire_tensors import tensor_to_wire
from swarm.protocol.tensors import DType

HIDDEN, VOCABULARY = 4, 8


class Ends:
    """The head is a fixed matrix; the thread can be held up while others queue."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.matrix = torch.randn(HIDDEN, VOCABULARY, generator=generator)
        self.batches: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.failure: Exception | None = None

    def logits(self, activations: torch.Tensor) -> torch.Tensor:
        self.go.wait(10)
        self.batches.append(activations.shape[0])
        if self.failure is not None:
            raise self.failure
        return activations @ self.matrix

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return token_ids[..., None].expand(*token_ids.shape, HIDDEN).float()


def chooser(ends: Any, seed: int | None = None) -> TokenChooser:
    settings = SamplingSettings(temperature=0.0 if seed is None else 1.0, seed=seed)
    return TokenChooser(ends, settings, [1, 2], DType.FLOAT32)


def hidden(number: int) -> torch.Tensor:
    return torch.randn(1, 1, HIDDEN, generator=torch.Generator().manual_seed(number))


async def settled(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  (a thread's progress has no event here)
            await asyncio.sleep(0.001)


async def test_those_who_wait_share_one_product_and_get_their_own_token() -> None:
    ends: Any = Ends()
    queue = ChoiceQueue(ends)
    ends.go.clear()
    work = [
        asyncio.create_task(
            queue.choose(chooser(ends, seed), tensor_to_wire(hidden(number), DType.FLOAT32))
        )
        for number, seed in enumerate([None, 3, None, 4, 5])
    ]
    await settled(lambda: len(queue._waiting) == 4)
    ends.go.set()
    tokens = [token for token, _ in await asyncio.gather(*work)]
    assert ends.batches == [1, 4]
    alone = [
        chooser(ends, seed).choose((hidden(number) @ ends.matrix)[:, -1])[0]
        for number, seed in enumerate([None, 3, None, 4, 5])
    ]
    assert tokens == alone
    queue.close()


async def test_a_cancelled_choice_takes_nobody_with_it() -> None:
    ends: Any = Ends()
    queue = ChoiceQueue(ends)
    ends.go.clear()
    wires = [tensor_to_wire(hidden(number), DType.FLOAT32) for number in range(4)]
    first = asyncio.create_task(queue.choose(chooser(ends), wires[0]))
    await settled(lambda: not queue._waiting)
    others = [asyncio.create_task(queue.choose(chooser(ends), wire)) for wire in wires[1:]]
    await settled(lambda: len(queue._waiting) == 3)
    first.cancel()
    others[0].cancel()
    ends.go.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(asyncio.CancelledError):
        await others[0]
    for number, task in enumerate(others[1:], start=2):
        token, _ = await task
        assert token == int((hidden(number) @ ends.matrix)[0, -1].argmax())
    assert not queue._waiting
    queue.close()


async def test_a_failure_reaches_all_who_shared_it_and_the_queue_goes_on() -> None:
    ends: Any = Ends()
    queue = ChoiceQueue(ends)
    ends.failure = RuntimeError("device lost")
    wire = tensor_to_wire(hidden(1), DType.FLOAT32)
    outcomes = await asyncio.gather(
        *(queue.choose(chooser(ends), wire) for _ in range(3)), return_exceptions=True
    )
    assert all(isinstance(outcome, RuntimeError) for outcome in outcomes)
    ends.failure = None
    await queue.choose(chooser(ends), wire)
    queue.close()
