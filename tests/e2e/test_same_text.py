"""The swarm's text is the model's text: real processes, the real model, float32.

The reference is ``transformers.generate`` on the whole model in this process. Each swarm is a seed
and nodes started by the commands that volunteers use.
"""

from __future__ import annotations

import asyncio
import os
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.local_swarm import LocalSwarm, SwarmPlan, equal_spans
from swarm.client import SwarmModelForCausalLM
from swarm.client.app import SwarmClient
from swarm.client.config import ClientSettings, SamplingSettings
from swarm.client.generate import LocalModel, stream_generate
from swarm.client.metrics import ClientMetrics

BLOCKS = 30
NEW_TOKENS = 128
FULL_LENGTH_NODES = 3
FEWER_NEW_TOKENS = 32
FEWER_PROMPTS = slice(None, None, -3)
"""For other numbers of nodes: other borders, the same positions, a third of the prompts with the
longest among them. ``SWARM_TEST_FULL_LENGTH=1`` asks for all tokens of all prompts for all, which
takes six minutes more."""
USERS = 8
CLEAR_MARGIN = 1e-3
"""Between two logits; rounding in float32 is below a tenth of it."""

QUESTIONS = (
    "Hi",
    "Why is the sky blue?",
    "Write a haiku about rain in Nairobi.",
    "List five uses of a bicycle wheel.",
    "Explain photosynthesis to a child of eight years.",
    "Translate to French: The library opens at nine.",
    "What is the sum of 17 and 25? Show the steps.",
    "Name the planets in order and say one thing about each.",
    "Write a Python function that reverses a list without using slices.",
    "Tell a short story about a baker who finds a map in a loaf of bread.",
)
PARAGRAPH = (
    "The cooperative met on the first Monday of each month in the school by the river. Members "
    "brought figures on milk, maize and repairs, and the treasurer read them out while children "
    "played outside. In dry years they argued about the pump; in wet years about the road. "
)


def prompts(tokenizer: Any) -> list[list[int]]:
    """20 prompts of 5 to 600 tokens: raw and with the chat template, short and long."""
    texts = ["The capital of Kenya is", "Once upon a time, in a", "def fibonacci(n):"]
    raw = [tokenizer(text)["input_ids"] for text in texts]
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for question in (
            *QUESTIONS,
            *(f"Summarise in one sentence: {PARAGRAPH * count}" for count in (1, 2, 3, 4, 5, 7)),
        )
    ]
    encoded = [*raw, *(tokenizer(text, add_special_tokens=False)["input_ids"] for text in chats)]
    encoded.append(tokenizer(PARAGRAPH * 12)["input_ids"][:600])
    return encoded


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_path)


@pytest.fixture(scope="module")
def whole_model(smollm2_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()


def generate(model: Any, ids: list[int], **options: Any) -> list[int]:
    """New tokens after ``ids``."""
    inputs = torch.tensor([ids])
    with torch.inference_mode():
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
    return [int(token) for token in output[0, len(ids) :]]


GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}


class Reference:
    """Greedy answers of the whole model."""

    def __init__(self, whole_model: Any) -> None:
        self._model = whole_model
        self._answers: dict[tuple[int, ...], list[int]] = {}

    def answer(self, ids: list[int], proposed: list[int] | None = None) -> list[int]:
        """What ``transformers.generate`` gives; quickly when ``proposed`` is just that."""
        known = self._answers.get(tuple(ids))
        if known is None:
            if proposed is not None and self._is_greedy(ids, proposed):
                known = proposed
            else:
                known = generate(self._model, ids, **GREEDY)
            self._answers[tuple(ids)] = known
        return known

    @torch.inference_mode()
    def _is_greedy(self, ids: list[int], proposed: list[int]) -> bool:
        """Whether one pass over all tokens shows each to be the likeliest, beyond any rounding.

        Generating token by token computes the same numbers, and takes ten times as long.
        """
        if len(proposed) != NEW_TOKENS:
            return False
        logits = self._model(torch.tensor([ids + proposed[:-1]])).logits[0, len(ids) - 1 :]
        logits[:, self._model.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens does
        best, second = logits.topk(2).values.unbind(-1)
        likeliest = logits.argmax(-1).tolist()
        return bool(likeliest == proposed and (best - second).min() > CLEAR_MARGIN)


@pytest.fixture(scope="module")
def encoded(tokenizer: Any) -> list[list[int]]:
    encoded = prompts(tokenizer)
    lengths = [len(ids) for ids in encoded]
    assert len(encoded) == 20
    assert min(lengths) <= 5
    assert max(lengths) == 600
    return encoded


@pytest.fixture(scope="module")
def reference(whole_model: Any, encoded: list[list[int]]) -> Reference:
    """It has generated some answers, of the shortest and the longest prompt, token by token."""
    reference = Reference(whole_model)
    for ids in (min(encoded, key=len), max(encoded, key=len)):
        reference.answer(ids)
    return reference


@pytest.fixture(
    scope="module", params=[FULL_LENGTH_NODES, 1, 2, 5], ids=lambda count: f"{count}-nodes"
)
def swarm(request: pytest.FixtureRequest, smollm2_path: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(SwarmPlan(smollm2_path, equal_spans(BLOCKS, request.param))) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def model(swarm: LocalSwarm, smollm2_path: Path) -> Iterator[SwarmModelForCausalLM]:
    with SwarmModelForCausalLM.from_swarm(
        str(smollm2_path), peers=swarm.peers, dtype="float32"
    ) as model:
        yield model


def read_metric(url: str, pattern: str) -> float:
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310  (loopback)
        text = response.read().decode()
    found = re.findall(rf"^{pattern} (\S+)$", text, re.MULTILINE)
    assert found, f"no metric {pattern} in:\n{text}"
    return float(found[0])


def test_greedy_text_is_the_models_with_users_side_by_side(
    swarm: LocalSwarm,
    model: SwarmModelForCausalLM,
    encoded: list[list[int]],
    reference: Reference,
) -> None:
    """20 prompts, 8 users at a time, at different positions, batched together by the nodes."""
    is_full = len(swarm.nodes) == FULL_LENGTH_NODES or "SWARM_TEST_FULL_LENGTH" in os.environ
    tokens = NEW_TOKENS if is_full else FEWER_NEW_TOKENS
    asked = encoded if is_full else encoded[FEWER_PROMPTS]
    options = {**GREEDY, "max_new_tokens": tokens, "min_new_tokens": tokens}
    with ThreadPoolExecutor(USERS) as users:
        answers = list(users.map(lambda ids: generate(model, ids, **options), asked))
    for ids, answer in zip(asked, answers, strict=True):
        assert len(answer) == tokens
        assert answer == reference.answer(ids, answer)[:tokens], f"prompt of {len(ids)} tokens"
    for node in swarm.nodes:
        url = node.metrics_url
        assert url is not None
        batches = read_metric(url, "swarm_node_batch_size_steps_count")
        alone = read_metric(url, r'swarm_node_batch_size_steps_bucket\{le="1.0"\}')
        assert alone < batches, "no batch ever held more than one step"
        assert read_metric(url, "swarm_node_sessions_open") == 0


@pytest.mark.parametrize("swarm", [3], indirect=True, ids=["3-nodes"])
class TestEverythingThatGenerateDoes:
    """Sampling, beams, speculation: once, over three nodes."""

    def test_sampling_with_a_seed(
        self, model: SwarmModelForCausalLM, whole_model: Any, tokenizer: Any
    ) -> None:
        options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 64}
        for seed, ids in enumerate(prompts(tokenizer)[3:6]):
            torch.manual_seed(seed)
            wanted = generate(whole_model, ids, **options)
            torch.manual_seed(seed)
            assert generate(model, ids, **options) == wanted

    def test_beam_search(
        self, model: SwarmModelForCausalLM, whole_model: Any, tokenizer: Any
    ) -> None:
        options = {"do_sample": False, "num_beams": 4, "max_new_tokens": 48}
        for ids in prompts(tokenizer)[4:6]:
            assert generate(model, ids, **options) == generate(whole_model, ids, **options)

    def test_batches_with_padding_on_the_left(
        self, model: SwarmModelForCausalLM, whole_model: Any, tokenizer: Any
    ) -> None:
        tokenizer.padding_side = "left"
        inputs = tokenizer(["The capital of Kenya is", "Hello"], padding=True, return_tensors="pt")
        options = {**inputs, "do_sample": False, "max_new_tokens": 24}
        assert torch.equal(model.generate(**options), whole_model.generate(**options))

    def test_prompt_lookup_saves_passes(
        self,
        model: SwarmModelForCausalLM,
        encoded: list[list[int]],
        reference: Reference,
    ) -> None:
        for ids in (encoded[2], encoded[13], encoded[19]):
            looked_up = generate(model, ids, **GREEDY, prompt_lookup_num_tokens=8)
            assert looked_up == reference.answer(ids, looked_up)
            assert model.latest_session is not None
            assert model.latest_session.passes < NEW_TOKENS  # without it a pass for each

    def test_the_async_api_streams_the_same_text_and_no_activation_crosses_the_client(
        self,
        swarm: LocalSwarm,
        smollm2_path: Path,
        encoded: list[list[int]],
        reference: Reference,
    ) -> None:
        metrics = ClientMetrics()

        async def answer(client: SwarmClient, local: LocalModel, ids: list[int]) -> list[int]:
            tokens: list[int] = []
            settings = SamplingSettings(max_new_tokens=NEW_TOKENS)
            async for piece in stream_generate(client, local, ids, settings):
                tokens += piece.token_ids
                if piece.result is not None:
                    assert piece.result.token_ids == tuple(tokens)
                    assert len(piece.result.plan.hops) == 3
            return tokens

        async def main() -> list[list[int]]:
            local = LocalModel.load(str(smollm2_path), dtype="float32")
            settings = ClientSettings(peers=tuple(swarm.peers))
            async with await SwarmClient.connect(settings, observer=metrics) as client:
                return await asyncio.gather(
                    *(answer(client, local, ids) for ids in encoded[:USERS])
                )

        answers = asyncio.run(main())
        for ids, tokens in zip(encoded[:USERS], answers, strict=True):
            wanted = reference.answer(ids)
            # The reference never ends before its time; this answer may, with a token of its own.
            said = tokens if len(tokens) == NEW_TOKENS else tokens[:-1]
            assert said == wanted[: len(said)]
        text = metrics.text()
        assert "swarm_client_hops_through_client_total 0.0" in text
        assert float(re.findall(r"^swarm_client_chain_passes_total (\S+)", text, re.M)[0]) > 100
