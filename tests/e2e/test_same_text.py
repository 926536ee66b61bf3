"""The swarm's text is the model's text: real processes, the real model, float32.

The reference is ``transformers.generate`` on the whole model in this process. Each swarm is a seed
and nodes started by the commands that volunteers use.
"""

from __future__ import annotations

import asyncio
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
USERS = 8

pytestmark = pytest.mark.timeout(900)
"""The whole model needs minutes for its 20 answers on cores that it shares."""

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


@pytest.fixture(scope="module")
def expected(whole_model: Any, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Each prompt with the greedy answer of the whole model."""
    encoded = prompts(tokenizer)
    lengths = [len(ids) for ids in encoded]
    assert len(encoded) == 20
    assert min(lengths) <= 5
    assert max(lengths) == 600

    def answer(ids: list[int]) -> list[int]:
        torch.set_num_threads(1)  # of this thread: two prompts at a time, a core for each
        return generate(whole_model, ids, **GREEDY)

    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(zip(encoded, pool.map(answer, encoded), strict=True))


@pytest.fixture(scope="module", params=[1, 2, 3, 5], ids=lambda count: f"{count}-nodes")
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
    expected: list[tuple[list[int], list[int]]],
) -> None:
    """20 prompts, 8 users at a time, at different positions, batched together by the nodes."""
    with ThreadPoolExecutor(USERS) as users:
        answers = list(users.map(lambda pair: generate(model, pair[0], **GREEDY), expected))
    for (ids, wanted), answer in zip(expected, answers, strict=True):
        assert len(answer) == NEW_TOKENS
        assert answer == wanted, f"prompt of {len(ids)} tokens"
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
        expected: list[tuple[list[int], list[int]]],
    ) -> None:
        for ids, wanted in (expected[2], expected[13], expected[19]):
            plain = generate(model, ids, **GREEDY)
            assert model.latest_session is not None
            plain_passes = model.latest_session.passes
            looked_up = generate(model, ids, **GREEDY, prompt_lookup_num_tokens=8)
            assert looked_up == plain == wanted
            assert model.latest_session.passes < plain_passes

    def test_the_async_api_streams_the_same_text_and_no_activation_crosses_the_client(
        self,
        swarm: LocalSwarm,
        smollm2_path: Path,
        expected: list[tuple[list[int], list[int]]],
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
                prompts_ids = [ids for ids, _ in expected[:USERS]]
                return await asyncio.gather(*(answer(client, local, ids) for ids in prompts_ids))

        answers = asyncio.run(main())
        for (_, wanted), tokens in zip(expected[:USERS], answers, strict=True):
            # The reference never ends before its time; this answer may, with a token of its own.
            said = tokens if len(tokens) == NEW_TOKENS else tokens[:-1]
            assert said == wanted[: len(said)]
        text = metrics.text()
        assert "swarm_client_hops_through_client_total 0.0" in text
        assert float(re.findall(r"^swarm_client_chain_passes_total (\S+)", text, re.M)[0]) > 100
