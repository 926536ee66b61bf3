"""Training sessions of engines against PEFT on the whole model, in float32."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from swarm.compute.lora import AdapterShape, Method, peft_name
from swarm.compute.training_terms import OptimizerSettings, TrainingTerms
from swarm.compute.wire_tensors import tensor_from_wire, tensor_to_wire
from swarm.node.engine.api import StepInput
from swarm.node.engine.training import SpanTrainingSession
from swarm.node.engine.training_api import MicroBatch, TrainingRequest, TrainingSession
from swarm.node.engine.worker import BetweenShare, Worker
from swarm.protocol.tensors import DType, WireTensor

# peft 0.21 asks transformers 5.23 by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

LENGTHS = (7, 12, 12, 3)
SPANS = [(0, 2), (2, 3), (3, 6)]


def terms(method: Method = Method.LORA, **changes: Any) -> TrainingTerms:
    targets = ("q_proj", "v_proj", "down_proj", "qkv_proj")
    shape = AdapterShape(method, 4, 8.0, targets)
    if method is Method.NONE:
        shape = AdapterShape(Method.NONE, 0, 0.0, ())
    given: dict[str, Any] = {
        "adapter": shape,
        "optimizer": OptimizerSettings(weight_decay=0.01),
        "dropout": 0.0,
        "seed": 3,
        "maximum_tokens": 64,
        "micro_batches_in_flight": 2,
    }
    return TrainingTerms(**given | changes)


async def open_all(chain: Any, wanted: TrainingTerms) -> list[TrainingSession]:
    return [
        await engine.open_training(
            TrainingRequest(engine.first_block, engine.end_block, DType.FLOAT32, wanted)
        )
        for engine in chain.engines
    ]


async def forward(
    sessions: Sequence[TrainingSession], micro_batch: MicroBatch, hidden: torch.Tensor
) -> torch.Tensor:
    wire = tensor_to_wire(hidden, DType.FLOAT32)
    for session in sessions:
        wire = await session.forward(micro_batch, wire)
    return tensor_from_wire(wire)


async def backward(
    sessions: Sequence[TrainingSession], number: int, gradient: torch.Tensor
) -> torch.Tensor:
    wire = tensor_to_wire(gradient, DType.FLOAT32)
    for session in reversed(sessions):
        wire = await session.backward(number, wire)
    return tensor_from_wire(wire)


async def states(sessions: Sequence[TrainingSession]) -> dict[str, WireTensor]:
    joined: dict[str, WireTensor] = {}
    for session in sessions:
        joined.update(await session.export_state())
    return joined


def as_peft(tiny: Any, wanted: TrainingTerms, state: dict[str, WireTensor]) -> Any:
    """PEFT on the whole model, beginning with the same values."""
    import copy

    import peft

    config = peft.LoraConfig(
        r=wanted.adapter.rank,
        lora_alpha=int(wanted.adapter.alpha),
        target_modules=list(wanted.adapter.target_modules),
        use_dora=wanted.adapter.method is Method.DORA,
    )
    model = peft.get_peft_model(copy.deepcopy(tiny.model), config)
    own = peft.get_peft_model_state_dict(model)
    values = {
        key: tensor_from_wire(state[key.removeprefix("base_model.model.")]).view(own[key].shape)
        for key in own
    }
    peft.set_peft_model_state_dict(model, values)
    return model


def next_token_loss(logits: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> torch.Tensor:
    losses = [
        torch.nn.functional.cross_entropy(part[:-1], row[0, 1:], reduction="sum")
        for part, row in zip(logits, rows, strict=True)
    ]
    return torch.stack(losses).sum()


def difference(model: Any, state: dict[str, WireTensor]) -> float:
    """The largest relative difference of any tensor."""
    import peft

    worst = 0.0
    for key, tensor in peft.get_peft_model_state_dict(model).items():
        own = tensor_from_wire(state[key.removeprefix("base_model.model.")]).view(tensor.shape)
        assert peft_name(key.removeprefix("base_model.model.")) == key
        worst = max(worst, float((own - tensor).norm() / tensor.norm()))
    return worst


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", Method.LORA),
        ("llama_rope_scaled", Method.DORA),  # with biases
        ("mistral_sliding", Method.LORA),
        ("qwen3", Method.DORA),
        ("gemma3", Method.LORA),
        ("phi3", Method.LORA),
        ("mixtral", Method.LORA),
    ],
)
async def test_a_chain_trains_as_peft_does(
    make_tiny: Any, load_chain: Any, family: str, method: Method
) -> None:
    """Loss, gradient of the inputs, and every tensor after each of four steps."""
    tiny = make_tiny(family)
    chain = load_chain(tiny, SPANS, cache_tokens=1 << 16)
    wanted = terms(method)
    try:
        sessions = await open_all(chain, wanted)
        model = as_peft(tiny, wanted, await states(sessions))
        trained = [one for one in model.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.01)
        torch.manual_seed(1)
        for step in range(4):
            rows = [torch.randint(0, 128, (1, length)) for length in LENGTHS]
            inputs = [tiny.embed(row).requires_grad_() for row in rows]
            logits = [model(inputs_embeds=one).logits[0] for one in inputs]
            loss = next_token_loss(logits, rows)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

            hidden = torch.cat([one.detach() for one in inputs], dim=1)
            output = await forward(sessions, MicroBatch(step + 1, LENGTHS), hidden)
            output.requires_grad_()
            whole = model.base_model.model
            own_loss = next_token_loss(
                whole.lm_head(whole.model.norm(output))[0].split(LENGTHS), rows
            )
            (gradient,) = torch.autograd.grad(own_loss, output)
            into_inputs = await backward(sessions, step + 1, gradient)
            own_norm = sum([await one.gradient_square_sum() for one in sessions]) ** 0.5
            for session in sessions:
                await session.apply(min(1.0, 1.0 / (own_norm + 1e-6)), 1e-2)

            assert own_loss.item() == pytest.approx(loss.item(), rel=1e-4)
            assert own_norm == pytest.approx(norm.item(), rel=1e-3)
            expected = torch.cat([one.grad for one in inputs], dim=1)
            assert (into_inputs - expected).norm() / expected.norm() < 1e-3
            assert difference(model, await states(sessions)) < 1e-3
    finally:
        await chain.close()


async def test_activations_that_are_dropped_are_computed_again(
    make_tiny: Any, load_chain: Any
) -> None:
    """With and without memory for graphs, and with dropout, the gradients are the same."""
    tiny = make_tiny("llama")
    wanted = terms(dropout=0.3)
    hidden = torch.randn(1, sum(LENGTHS), 64)
    norms, kept = [], []
    for cache_tokens in (1 << 16, 1500):
        chain = load_chain(tiny, [(0, 6)], cache_tokens=cache_tokens)
        try:
            (session,) = await open_all(chain, wanted)
            assert isinstance(session, SpanTrainingSession)
            await forward([session], MicroBatch(1, LENGTHS), hidden)
            kept.append(session.kept_graph_bytes)
            await backward([session], 1, hidden)
            norms.append(await session.gradient_square_sum())
            assert session.kept_graph_bytes == 0
        finally:
            await chain.close()
    assert kept[0] > kept[1]  # only some blocks keep their activations
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


class CountingShare(BetweenShare):
    """Counts calls of training, and those that steps waited for."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self.calls = 0
        self.waited_for: list[int] = []
        self._worker = worker
        self._in_a_row = 0

    def ran_steps(self, duration_s: float) -> None:
        self.waited_for.append(self._in_a_row)
        self._in_a_row = 0
        super().ran_steps(duration_s)

    def ran_between(self, duration_s: float) -> None:
        self.calls += 1
        self._in_a_row += bool(self._worker.queued_steps)
        super().ran_between(duration_s)


async def test_one_decodes_while_others_train(make_tiny: Any, load_chain: Any) -> None:
    """The tokens are right, a step waits for one block of training at most, training goes on."""
    tiny = make_tiny("llama")
    chain = load_chain(tiny, SPANS, cache_tokens=1 << 16)
    shares = [CountingShare(engine._worker) for engine in chain.engines]
    for engine, share in zip(chain.engines, shares, strict=True):
        engine._worker._share = share
    trained = asyncio.Semaphore(0)

    async def train() -> None:
        sessions = await open_all(chain, terms())
        number = 0
        while True:
            number += 1
            hidden = torch.randn(1, 64, tiny.model.config.hidden_size)
            output = await forward(sessions, MicroBatch(number, (40, 24)), hidden)
            await backward(sessions, number, torch.ones_like(output) / 64)
            trained.release()

    tokens = torch.tensor([[5, 17, 33, 60, 2, 9]])
    position = 0
    caches = chain.open(1, 64)
    try:
        async with asyncio.TaskGroup() as tasks:
            training = [tasks.create_task(train()) for _ in SPANS]  # so that no device is idle
            await trained.acquire()
            begun = [share.calls for share in shares]
            for _ in range(24):
                wire = tensor_to_wire(tiny.embed(tokens[:, position:]), DType.FLOAT32)
                for engine, cache in zip(chain.engines, caches, strict=True):
                    step = StepInput(wire, position, tokens.shape[1] - position)
                    wire = (await engine.step(cache, step)).activations
                position = tokens.shape[1]
                best = tiny.head(tensor_from_wire(wire))[:, -1:].argmax(-1)
                assert best.item() == tiny.logits(tokens)[0, -1].argmax().item()
                tokens = torch.cat([tokens, best], dim=1)
            assert all(share.calls > calls for share, calls in zip(shares, begun, strict=True))
            for task in training:
                task.cancel()
    finally:
        await chain.close()
    for share in shares:
        assert len(share.waited_for) == 24
        assert max(share.waited_for) <= 1
