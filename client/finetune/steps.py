"""One step of a training over an open chain: micro-batches, losses, the optimizer.

Several micro-batches are on their way at the same time, so that all hops, and the head here, work
at once. What a step does follows from its number, the data and the state before it alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from swarm.client.finetune.adapter_files import PROMPT
from swarm.client.finetune.chain import TrainingChain
from swarm.client.finetune.ends import TrainingEnds
from swarm.client.finetune.examples import Order
from swarm.client.finetune.model import BaseModel
from swarm.client.finetune.objectives import Objective, Work
from swarm.client.finetune.settings import FinetuneSettings, learning_rate
from swarm.compute.optimizers import NamedOptimizer
from swarm.compute.wire_tensors import tensor_from_wire, tensor_to_wire
from swarm.protocol.tensors import WireTensor

T = TypeVar("T")

_STEP_BITS = 20
_EVALUATION = 1 << (_STEP_BITS - 1)


@dataclass(frozen=True, slots=True)
class StepResult:
    loss: float
    norm: float
    """Of all gradients together, before clipping."""
    learning_rate: float
    tokens: int


class Steps:
    """Takes the steps of one training; holds what the client itself trains."""

    def __init__(
        self,
        ends: TrainingEnds,
        base: BaseModel,
        settings: FinetuneSettings,
        objective: Objective,
    ) -> None:
        self._ends = ends
        self._base = base
        self._settings = settings
        self._objective = objective
        self._order = Order(objective.size, batch_size=settings.batch_size, seed=settings.seed)
        self._prompt, self.own = self._own_parameters()
        self._compute_thread = ThreadPoolExecutor(1, "swarm-training-ends")

    @property
    def total(self) -> int:
        return self._settings.steps or self._settings.epochs * self._order.steps_per_epoch

    def close(self) -> None:
        """End the thread that computes the ends."""
        self._compute_thread.shutdown(wait=False)

    async def take(self, chain: TrainingChain, step: int) -> StepResult:
        """Step ``step`` of all hops and of the client."""
        works = self._objective.works(self._order.batch(step))
        self.own.forget_gradients()
        losses = await self._pass_all(chain, self._objective, works, step << _STEP_BITS)
        rate = learning_rate(self._settings, step, self.total)
        norm, scale = await chain.optimizer_step(
            step,
            len(works),
            learning_rate=rate,
            maximum_norm=self._settings.maximum_norm,
            own_square_sum=self.own.square_sum(),
        )
        self.own.apply(scale, rate)
        tokens = sum(len(example.token_ids) for work in works for example in work.examples)
        return StepResult(sum(losses), norm, rate, tokens)

    async def evaluate(self, chain: TrainingChain, step: int, held_out: Objective) -> float:
        """The mean loss of other data, as the adapter is after ``step``."""
        works = held_out.works(range(held_out.size))
        base = (step << _STEP_BITS) + _EVALUATION
        return sum(await self._pass_all(chain, held_out, works, base, needs_gradient=False))

    async def _pass_all(
        self,
        chain: TrainingChain,
        objective: Objective,
        works: Sequence[Work],
        first_number: int,
        *,
        needs_gradient: bool = True,
    ) -> list[float]:
        """All micro-batches through the chain, some at the same time; their losses in order."""
        slots = asyncio.Semaphore(self._settings.micro_batches_in_flight)
        running: list[asyncio.Task[float]] = []
        try:
            for index, work in enumerate(works):
                number = first_number + 2 * index
                reference = None
                if objective.needs_reference(work):
                    await slots.acquire()
                    reference = await self._start(chain, number, work, is_reference=True)
                    reference.add_done_callback(lambda _: slots.release())
                await slots.acquire()
                output = await self._start(chain, number + 1, work, needs_gradient=needs_gradient)
                finish = self._finish(
                    chain, objective, work, number + 1, reference, output, slots, needs_gradient
                )
                running.append(asyncio.create_task(finish))
            return list(await asyncio.gather(*running))
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _start(
        self,
        chain: TrainingChain,
        number: int,
        work: Work,
        *,
        is_reference: bool = False,
        needs_gradient: bool = True,
    ) -> asyncio.Future[WireTensor]:
        prefix = 0 if is_reference else self._prefix
        wire = await self._compute(lambda: self._embed(work, is_reference=is_reference))
        return await chain.start_forward(
            number,
            [len(example.token_ids) + prefix for example in work.examples],
            wire,
            use_adapter=not is_reference,
            needs_gradient=needs_gradient and not is_reference,
        )

    async def _finish(
        self,
        chain: TrainingChain,
        objective: Objective,
        work: Work,
        number: int,
        reference: asyncio.Future[WireTensor] | None,
        output: asyncio.Future[WireTensor],
        slots: asyncio.Semaphore,
        needs_gradient: bool,
    ) -> float:
        try:
            if reference is not None:
                frozen = await reference
                await self._compute(
                    lambda: objective.learn_reference(self._ends, work, _tensor(frozen))
                )
            wire = await output
            loss, gradient = await self._compute(
                lambda: objective.loss(
                    self._ends, work, _tensor(wire), needs_gradient=needs_gradient
                )
            )
            if gradient is not None:
                gradients = tensor_to_wire(gradient, self._base.wire_dtype)
                into_inputs = await chain.backward(number, gradients)
                self._learn_prompt(work, into_inputs)
            return loss
        finally:
            slots.release()

    async def _compute(self, work: Callable[[], T]) -> T:
        """Torch's work beside the event loop, in one thread and in order."""
        return await asyncio.get_running_loop().run_in_executor(self._compute_thread, work)

    # --- what the client itself trains: the prompt
    @property
    def _prefix(self) -> int:
        return 0 if self._prompt is None else self._settings.virtual_tokens

    def _own_parameters(self) -> tuple[torch.nn.Parameter | None, NamedOptimizer]:
        settings = self._settings
        if settings.method != "prompt":
            return None, NamedOptimizer({}, settings.optimizer_settings())
        # Begins as the embeddings of tokens drawn by lot, which the blocks know how to read.
        generator = torch.Generator().manual_seed(settings.seed)
        tokens = torch.randint(
            0, int(self._ends.config.vocab_size), (settings.virtual_tokens,), generator=generator
        )
        prompt = torch.nn.Parameter(self._ends.embed(tokens)[0].clone())
        return prompt, NamedOptimizer({PROMPT: prompt}, settings.optimizer_settings())

    @torch.no_grad()
    def _embed(self, work: Work, *, is_reference: bool) -> WireTensor:
        parts = []
        for example in work.examples:
            if self._prompt is not None and not is_reference:
                parts.append(self._prompt.detach().unsqueeze(0))
            parts.append(self._ends.embed(torch.tensor(example.token_ids)))
        return tensor_to_wire(torch.cat(parts, dim=1), self._base.wire_dtype)

    def _learn_prompt(self, work: Work, gradients: WireTensor) -> None:
        if self._prompt is None:
            return
        gradient = _tensor(gradients)[0]
        start = 0
        for example in work.examples:
            part = gradient[start : start + self._prefix]
            before = self._prompt.grad
            self._prompt.grad = part.clone() if before is None else before + part
            start += self._prefix + len(example.token_ids)


def _tensor(wire: WireTensor) -> torch.Tensor:
    return tensor_from_wire(wire, torch.float32)
