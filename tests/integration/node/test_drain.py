"""Real processes leave while an answer is made: it goes on elsewhere, and nothing is repeated."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.local_swarm import LocalSwarm, Member, Span, SwarmPlan
from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.app import SwarmClient
from swarm.client.chain import Chain
from swarm.client.config import ClientSettings
from swarm.client.hops import SessionRequest
from swarm.client.metrics import ClientMetrics
from swarm.compute.wire_tensors import tensor_from_wire, tensor_to_wire
from swarm.node.control import running_node
from swarm.node.engine.api import CacheRequest, StepInput
from swarm.node.engine.engine import SpanEngine, load_engine_blocking
from swarm.node.view import describe_absence
from swarm.protocol.tensors import DType

BLOCKS = 6
HIDDEN = 64
TOKENS = 600
LEAVE_TIMEOUT_S = 30.0
REPLAYED_TOKENS = "swarm_node_replayed_tokens_total "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=2 * TOKENS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def swarm(model: Path) -> Iterator[LocalSwarm]:
    spans = (Span(0, 2), Span(2, 4), Span(4, 6)) * 2
    with LocalSwarm(SwarmPlan(model, spans, threads=1)) as running:
        yield running


class Talk:
    """Steps through a chain, each compared with all blocks in this process."""

    def __init__(self, chain: Chain, engine: SpanEngine) -> None:
        self._chain = chain
        self._engine = engine
        self._cache = engine.reserve(CacheRequest(0, BLOCKS, 1, TOKENS, DType.FLOAT32))
        self._random = torch.Generator().manual_seed(1)
        self._length = 0
        self.steps_s: list[float] = []

    async def step(self, tokens: int = 1, back: int = 0) -> None:
        hidden = torch.randn(1, tokens, HIDDEN, generator=self._random)
        sent = tensor_to_wire(hidden, DType.FLOAT32)
        position = self._length - back
        started_s = time.perf_counter()
        received = await self._chain.step(sent, position, output_tokens=1)
        self.steps_s.append(time.perf_counter() - started_s)
        expected = await self._engine.step(self._cache, StepInput(sent, position, 1))
        torch.testing.assert_close(
            tensor_from_wire(received),
            tensor_from_wire(expected.activations),
            rtol=1e-4,
            atol=1e-4,
        )
        self._length = position + tokens

    def close(self) -> None:
        self._cache.close()


async def test_each_hop_leaves_in_turn(swarm: LocalSwarm, model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    engine = await asyncio.to_thread(
        lambda: load_engine_blocking(
            checkpoint, 0, BLOCKS, device="cpu", dtype="float32", cache_tokens=TOKENS, threads=1
        )
    )
    metrics = ClientMetrics()
    settings = ClientSettings(peers=tuple(swarm.peers))
    async with await SwarmClient.connect(settings, observer=metrics) as client:
        request = SessionRequest(checkpoint.revision, HIDDEN, 1, TOKENS, DType.FLOAT32)
        chain = await client.open_chain(request, number_of_blocks=BLOCKS)
        talk = Talk(chain, engine)
        await talk.step(tokens=200)
        for hop in range(3):
            leaving = serving(swarm, chain, hop)
            asking = asyncio.create_task(asyncio.to_thread(drain, leaving))
            for number in itertools.count():
                await talk.step(back=number % 5 == 4)
                if leaving.process.poll() is not None:
                    break
            await asking
            assert leaving.process.wait() == 0
            assert serving(swarm, chain, hop) is not leaving
            await talk.step()
        replayed = [replayed_tokens(serving(swarm, chain, hop)) for hop in range(3)]
        await chain.close()
        talk.close()
    await engine.close()
    assert replayed == [0, 0, 0]
    assert "swarm_client_healing_seconds_count 0.0" in metrics.text()


async def test_without_a_replacement_the_owner_is_told_and_may_leave_at_once(
    swarm: LocalSwarm, model: Path
) -> None:
    """After the test before there is one node left for each span."""
    checkpoint = Checkpoint.open(model)
    async with await SwarmClient.connect(ClientSettings(peers=tuple(swarm.peers))) as client:
        request = SessionRequest(checkpoint.revision, HIDDEN, 1, TOKENS, DType.FLOAT32)
        chain = await client.open_chain(request, number_of_blocks=BLOCKS)
        hidden = tensor_to_wire(torch.randn(1, 3, HIDDEN), DType.FLOAT32)
        await chain.step(hidden, 0, output_tokens=1)
        leaving = serving(swarm, chain, 1)
        (process,) = psutil.Process(leaving.process.keeper_pid).children()
        process.send_signal(signal.SIGINT)
        waits, alone = await asyncio.to_thread(explained, leaving)
        assert "1 session still here; waits " in waits
        assert alone.startswith("nobody else has blocks 2-3")
        await chain.step(hidden, 3, output_tokens=1)
        process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(leaving.process.wait, LEAVE_TIMEOUT_S) == 130
        await chain.close()


def serving(swarm: LocalSwarm, chain: Chain, hop: int) -> Member:
    peer_id = chain.plan.hops[hop].peer_id
    return next(node for node in swarm.nodes if node.peer_id == peer_id)


def drain(node: Member) -> None:
    """What ``swarm-node drain`` does."""
    with running_node(node.key) as control:
        control.ask("drain")


def explained(node: Member) -> list[str]:
    """What a draining node says, as soon as it has read that it is alone with its blocks."""
    with running_node(node.key) as control:
        while (status := control.ask("status")) is not None:
            lines = describe_absence(status)
            if len(lines) == 2:
                return lines
            time.sleep(0.1)
    raise AssertionError("the node has ended")


def replayed_tokens(node: Member) -> float:
    assert node.metrics_url is not None
    with urllib.request.urlopen(node.metrics_url, timeout=10) as answer:  # noqa: S310 (loopback)
        text = answer.read().decode()
    (line,) = (line for line in text.splitlines() if line.startswith(REPLAYED_TOKENS))
    return float(line.split()[-1])
