"""Nodes that train, in one process: real engines and services over the memory network."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.bans import FailureKind
from swarm.client.finetune.audited_training import StepAuditor
from swarm.client.finetune.auditing import TrainingAuditor
from swarm.client.finetune.chain import TrainingChain, TrainingTimeouts
from swarm.client.finetune.chain_request import TrainingChainRequest
from swarm.client.finetune.ends import TrainingEnds
from swarm.client.finetune.examples import Example
from swarm.client.finetune.model import BaseModel, base_model
from swarm.ledger.reputation import Standing
from swarm.memory_network import LinkSettings, MemoryNetwork, MemoryPeer, MemorySettings
from swarm.node.engine.engine import SpanEngine, load_engine_blocking
from swarm.node.metrics import NodeMetrics
from swarm.node.service import NodeService
from swarm.protocol.errors import NoRouteError
from swarm.protocol.identity import Identity, PeerId
from swarm.routing import ChainPlan, Hop
from swarm.virtual_time import LoopClock
from tests.evil_training import EvilTraining

VOCABULARY = 96


def save_tiny_model(folder: Path, *, blocks: int = 6, **changes: Any) -> Any:
    """A random float32 Llama; returns the whole model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return model


@dataclass
class TrainingNode:
    peer: MemoryPeer
    engine: SpanEngine
    service: NodeService

    @property
    def is_alive(self) -> bool:
        return self.peer._alive


class Planner:
    """Living nodes in their order, each as far as it reaches; sees deaths when it is asked.

    Nodes that quarrelled are no neighbours any more.
    """

    def __init__(self, swarm: TrainingSwarm) -> None:
        self._swarm = swarm

    async def plan(
        self,
        first_block: int,
        end_block: int,
        *,
        excluded: Collection[PeerId] = (),
        previous: PeerId | None = None,
        following: PeerId | None = None,
    ) -> ChainPlan:
        hops: list[Hop] = []
        start = first_block
        while start < end_block:
            for node in sorted(self._swarm.nodes, key=self._is_not_preferred):
                engine, peer = node.engine, node.peer.peer_id
                pair = {peer, hops[-1].peer_id} if hops else {peer}
                usable = node.is_alive and peer not in excluded and pair not in self._swarm.apart
                if usable and engine.first_block <= start < engine.end_block:
                    end = min(engine.end_block, end_block)
                    hops.append(Hop(peer, "a node", (), start, end))
                    start = end
                    break
            else:
                raise NoRouteError(f"block {start} is lost", missing_blocks=(start,))
        return ChainPlan(tuple(hops), 0.0)

    def _is_not_preferred(self, node: TrainingNode) -> tuple[bool, bool]:
        """As the router does: who failed audits or hides comes last."""
        peer, auditor = node.peer.peer_id, self._swarm.auditor
        is_last = False
        if isinstance(auditor, TrainingAuditor):
            now_s = self._swarm.clock.unix_s()
            is_last = auditor.reputations.standing(peer, now_s) is not Standing.USABLE
        return is_last, peer not in self._swarm.preferred

    async def is_online(self) -> bool:
        return True

    def failed(self, peer: PeerId, kind: FailureKind) -> None:
        return None

    def quarrelled(self, peers: Collection[PeerId]) -> None:
        self._swarm.apart.append(set(peers))

    def passed(self, hops: Sequence[Hop], reported_s: Sequence[float], step_s: float) -> None:
        return None

    def measured_round_trip(self, peer: PeerId, round_trip_s: float) -> None:
        return None


class TrainingSwarm:
    """Use :func:`training_swarm`."""

    def __init__(self, checkpoint: Checkpoint, latency_s: float) -> None:
        self.checkpoint = checkpoint
        self.network = MemoryNetwork(1, MemorySettings(link=LinkSettings(latency_s=latency_s)))
        self.client = self.network.join(Identity.generate())
        self.clock = LoopClock()
        self.nodes: list[TrainingNode] = []
        self.chains: list[TrainingChain] = []
        self.preferred: set[PeerId] = set()
        self.apart: list[set[PeerId]] = []
        self.auditor: StepAuditor | None = None
        self._running: set[asyncio.Task[None]] = set()

    @property
    def base(self) -> BaseModel:
        return base_model(self.checkpoint, "float32")

    def audit(self, dice: random.Random | None = None) -> TrainingAuditor:
        """Let chains that are opened from now on be audited."""
        auditor = TrainingAuditor(
            self.client, clock=self.clock, dice=dice or random.Random(0), own=self.own
        )
        self.auditor = auditor
        return auditor

    async def add_node(
        self,
        first: int,
        end: int,
        *,
        evil: EvilTraining | None = None,
        weights: Checkpoint | None = None,
        **settings: Any,
    ) -> TrainingNode:
        settings = {"cache_tokens": 1 << 17, "threads": 1, "dtype": "float32", **settings}
        engine = await asyncio.to_thread(
            load_engine_blocking,
            weights or self.checkpoint,
            first,
            end,
            device="cpu",
            **settings,
        )
        peer = self.network.join(Identity.generate())
        service = NodeService(
            peer,
            engine if evil is None else evil.engine(engine),
            model_revision=self.checkpoint.revision,
            resolve=self._resolve,
            observer=NodeMetrics(),
            clock=self.clock,
        )
        await service.start()
        self.nodes.append(TrainingNode(peer, engine, service))
        return self.nodes[-1]

    async def _resolve(self, peer: PeerId, *, afresh: bool = False) -> Sequence[str] | None:
        return () if any(node.peer.peer_id == peer for node in self.nodes) else None

    def kill(self, node: TrainingNode) -> None:
        """As by power failure."""
        self.network.crash(node.peer.peer_id)

    async def open_chain(
        self, request: TrainingChainRequest, timeouts: TrainingTimeouts | None = None
    ) -> TrainingChain:
        chain = TrainingChain(
            self.client,
            Planner(self),
            request,
            clock=self.clock,
            timeouts=timeouts,
            auditor=self.auditor,
        )
        self.own(chain.run())
        try:
            await chain.opened()
        except BaseException:
            await chain.close()
            raise
        self.chains.append(chain)
        return chain

    def own(self, work: Coroutine[Any, Any, None]) -> None:
        """Run until it ends; :meth:`close` waits for it."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        for chain in self.chains:
            await chain.close()
        await asyncio.gather(*self._running)
        for node in self.nodes:
            if node.is_alive:
                await node.service.close()
                assert node.service.sessions == 0
            await node.engine.close()
            assert node.engine._budget.reserved_bytes == 0


@asynccontextmanager
async def training_swarm(
    folder: Path, spans: Sequence[tuple[int, int]], *, latency_s: float = 0.0
) -> AsyncIterator[TrainingSwarm]:
    """Nodes for these spans and one client; afterwards all memory must be free again."""
    swarm = TrainingSwarm(Checkpoint.open(folder), latency_s)
    try:
        for first, end in spans:
            await swarm.add_node(first, end)
        yield swarm
    finally:
        await swarm.close()


def load_ends(folder: Path) -> TrainingEnds:
    return TrainingEnds.load(Checkpoint.open(folder))


def make_examples(count: int, seed: int = 5) -> list[Example]:
    dice = random.Random(seed)
    examples = []
    for _ in range(count):
        tokens = tuple(dice.randrange(3, VOCABULARY) for _ in range(dice.randint(6, 20)))
        examples.append(Example(tokens, dice.randint(0, 4)))
    return examples
