"""Audits of real nodes of SmolLM2 on loopback: one skips a block, one the session's adapter."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch

from swarm.catalogue.adapter import AdapterFiles
from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.app import SwarmClient
from swarm.client.auditing import Finding
from swarm.client.hops import SessionRequest
from swarm.compute.wire_tensors import tensor_from_wire, tensor_to_wire
from swarm.ledger.audit_rule import SIXTEEN_BIT
from swarm.ledger.reputation import Found, Standing
from swarm.node.engine.api import Engine
from swarm.node.engine.engine import load_engine_blocking
from swarm.protocol.identity import PeerId
from swarm.protocol.tensors import DType
from swarm.simulation.evil import Behaviour
from swarm.simulation.evil_frames import Foul
from tests.adapter_making import make_adapter
from tests.integration.ledger.test_live_audits import LiveSwarm

NEW_TOKENS = 6
PROMPT_TOKENS = 16
MOST_SESSIONS = 4


class ModelSwarm(LiveSwarm):
    """Three nodes for each half of a real model, computing in float32."""

    def __init__(self, evil: tuple[Behaviour, ...], folder: Path, checkpoint: Checkpoint) -> None:
        super().__init__(evil, folder)
        self.spans = ((0, 15), (15, 30))
        self.revision = checkpoint.revision
        self.hidden_size = checkpoint.config["hidden_size"]
        self._checkpoint = checkpoint

    def _tokens_per_s(self, behaviour: Behaviour | Foul | None) -> int:
        return 1000 if behaviour is None else 4000  # who computes less is faster, and chosen first

    async def _engine(self, stack: AsyncExitStack, span: tuple[int, int]) -> Engine:
        engine = await asyncio.to_thread(
            load_engine_blocking,
            self._checkpoint,
            *span,
            device="cpu",
            dtype="float32",
            threads=1,
            cache_tokens=1024,
        )
        stack.push_async_callback(engine.close)
        return engine


async def ask(
    client: SwarmClient, model: Any, adapted: Any, request: SessionRequest, seed: int
) -> tuple[bool, list[Finding], set[str]]:
    """Greedy tokens of a random prompt: whether they are the whole model's, and what audits say."""
    prompt = torch.randint(
        0, 40_000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(seed)
    )
    with torch.no_grad():
        expected = adapted.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )[0, PROMPT_TOKENS:].tolist()
        chain = await client.open_chain(request, number_of_blocks=30)
        try:
            made: list[int] = []
            tokens, position = prompt, 0
            while len(made) < NEW_TOKENS:
                embedded = model.get_input_embeddings()(tokens)
                wire = tensor_to_wire(embedded, DType.FLOAT32)
                answered = await chain.step(wire, position, output_tokens=1)
                position += tokens.shape[1]
                states = tensor_from_wire(answered)
                tokens = model.lm_head(model.model.norm(states)).argmax(-1)
                made.append(int(tokens))
            findings = await client.auditor.audit(chain)
            return made == expected, findings, {hop.peer_id for hop in chain.plan.hops}
        finally:
            await chain.close()


async def test_a_left_out_block_and_a_left_out_adapter_are_found(
    smollm2_path: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    # So small that errors alone would pass as rounding.
    adapted = make_adapter(
        model, tmp_path / "adapter", std=0.03, r=8, target_modules=["q_proj", "v_proj"]
    )
    checkpoint = Checkpoint.open(smollm2_path)
    swarm = ModelSwarm((Behaviour.LEFT_OUT, Behaviour.NO_ADAPTER), tmp_path, checkpoint)
    request = SessionRequest(
        swarm.revision,
        swarm.hidden_size,
        1,
        64,
        DType.FLOAT32,
        adapter=AdapterFiles.open(tmp_path / "adapter"),
    )
    failed: dict[str, list[Finding]] = {}
    async with swarm.running() as client:

        def standing(peer: PeerId) -> Standing:
            return client.auditor.reputations.standing(peer, swarm.clock.unix_s())

        for number in range(MOST_SESSIONS):
            right, findings, peers = await ask(client, model, adapted, request, number)
            for each in findings:
                if each.found is not Found.PASSED:
                    failed.setdefault(each.peer_id, []).append(each)
            suspects = {each.peer_id for each in findings if each.found is not Found.PASSED}
            assert right or suspects & peers  # what a client trusts is right
            if set(failed) == swarm.evil:
                break
        assert set(failed) == swarm.evil
        for node in swarm.nodes:
            reputation = client.auditor.reputations.of(node.peer_id)
            if node.behaviour is None:
                assert standing(node.peer_id) is Standing.USABLE
                continue
            assert standing(node.peer_id) is not Standing.USABLE
            # A new node is audited each time, so the first audit that sees its work finds it.
            assert reputation.audits - reputation.clean <= 2
            first = failed[node.peer_id][0]
            assert first.comparison is not None
            passes = first.comparison.passes(SIXTEEN_BIT)
            assert passes is (node.behaviour is Behaviour.NO_ADAPTER)
        # And the swarm goes on without them.
        for number in range(MOST_SESSIONS, MOST_SESSIONS + 2):
            right, findings, peers = await ask(client, model, adapted, request, number)
            assert right
            assert not peers & swarm.evil
            assert all(each.found is Found.PASSED for each in findings)
