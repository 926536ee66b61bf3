"""A span's part of one training step done again by other nodes: a short training session.

The replicas see a session like any other. Dropout follows from the seed, the names of tensors and
the number of a micro-batch, so that theirs is the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from swarm.client.finetune.chain import TrainingChain
from swarm.client.finetune.commitments import MicroBatchRecord
from swarm.client.finetune.step_comparison import StepInputs, StepWork
from swarm.compute.lora import Method
from swarm.protocol.tensors import WireTensor


async def replay_step(
    chain: TrainingChain,
    given: StepInputs,
    micro_batches: tuple[MicroBatchRecord, ...],
    *,
    step: int,
    change: tuple[float, float] | None,
) -> StepWork:
    """Run a fresh chain for the span, do the step on it and close it; raises what it failed of.

    ``change``: scale and learning rate of the optimizer's step; None: the micro-batches are not all
    of the step, so that none is taken.
    """
    async with _running(chain):
        await chain.restore(step - 1, given.state)
        outputs, gradients = [], []
        for record, inputs, upstream in zip(
            micro_batches, given.activations, given.gradients, strict=True
        ):
            outputs.append(
                await chain.forward(
                    record.number, record.lengths, inputs, use_adapter=record.use_adapter
                )
            )
            gradients.append(await chain.backward(record.number, upstream))
        bare: list[WireTensor] = []
        if chain.request.terms.adapter.method is not Method.NONE and all(
            record.use_adapter for record in micro_batches
        ):
            for index, record in enumerate(micro_batches, 1):
                bare.append(
                    await chain.forward(
                        micro_batches[-1].number + index,
                        record.lengths,
                        given.activations[index - 1],
                        use_adapter=False,
                        needs_gradient=False,
                    )
                )
        square_sum = state = None
        if change is not None:
            square_sum = sum(await chain.square_sums(step, len(micro_batches)))
            await chain.apply_gradients(step, *change)
            state = await chain.export_state(step)
        return StepWork(
            tuple(outputs),
            tuple(gradients),
            tuple(link.dtype_class for link in chain.links),
            square_sum,
            state,
            tuple(bare),
        )


@asynccontextmanager
async def _running(chain: TrainingChain) -> AsyncIterator[None]:
    running = asyncio.create_task(chain.run())
    try:
        await chain.opened()
        yield
    finally:
        await chain.close()
        await running
