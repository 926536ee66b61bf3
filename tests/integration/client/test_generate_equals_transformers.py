"""Every way to generate gives the tokens that transformers gives with the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from swarm.protocol.errors import GenerationInterrupted

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "mixtral")
PROMPT = torch.tensor([[5, 17, 33, 9, 60, 41, 8, 77, 20, 31, 5]])
BATCH = torch.tensor([[0, 0, 0, 5, 17, 33, 9], [11, 4, 50, 51, 52, 8, 90], [0, 7, 7, 3, 22, 31, 8]])
BATCH_MASK = (BATCH != 0).long()


def generate_both(swarm: Any, inputs: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0} | options
    torch.manual_seed(7)
    expected = swarm.whole.generate(inputs, **options)
    torch.manual_seed(7)
    return swarm.model.generate(inputs, **options), expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_greedy(make_swarm: Any, family: str, tied: bool) -> None:
    swarm = make_swarm(family, tie_word_embeddings=tied)
    actual, expected = generate_both(swarm, PROMPT)
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(make_swarm: Any, family: str) -> None:
    swarm = make_swarm(family)
    with torch.no_grad():
        expected = swarm.whole(PROMPT).logits
    torch.testing.assert_close(swarm.model(PROMPT).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        swarm.model(PROMPT, logits_to_keep=3).logits, expected[:, -3:], rtol=1e-4, atol=1e-4
    )


def test_sampling(make_swarm: Any) -> None:
    swarm = make_swarm()
    actual, expected = generate_both(
        swarm,
        PROMPT,
        do_sample=True,
        temperature=0.9,
        top_k=20,
        top_p=0.9,
        repetition_penalty=1.1,
        num_return_sequences=3,
    )
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_return_sequences": 2, "early_stopping": True}, {"do_sample": True, "top_k": 30}],
)
def test_beam_search(make_swarm: Any, family: str, options: dict[str, Any]) -> None:
    swarm = make_swarm(family)
    actual, expected = generate_both(swarm, PROMPT, num_beams=4, **options)
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_batch_with_left_padding(make_swarm: Any, options: dict[str, Any]) -> None:
    swarm = make_swarm()
    actual, expected = generate_both(swarm, BATCH, attention_mask=BATCH_MASK, **options)
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_prompt_lookup_in_fewer_passes(make_swarm: Any, family: str) -> None:
    swarm = make_swarm(family, initializer_range=0.2)
    # Far enough for the random model to run in circles, which is what can be looked up.
    prompt = swarm.whole.generate(PROMPT, max_new_tokens=150, do_sample=False, eos_token_id=None)
    plain, expected = generate_both(swarm, prompt, max_new_tokens=40, eos_token_id=None)
    plain_passes = swarm.client.passes
    looked_up, _ = generate_both(
        swarm, prompt, max_new_tokens=40, eos_token_id=None, prompt_lookup_num_tokens=8
    )
    assert plain.tolist() == expected.tolist()
    assert looked_up.tolist() == expected.tolist()
    assert swarm.client.passes - plain_passes < plain_passes


@pytest.mark.parametrize("same_weights", [True, False])
def test_assistant_model(
    make_swarm: Any, make_whole_model: Callable[..., Any], same_weights: bool
) -> None:
    swarm = make_swarm()
    assistant = make_whole_model("llama", seed=0 if same_weights else 1)
    actual, expected = generate_both(swarm, PROMPT, assistant_model=assistant)
    assert actual.tolist() == expected.tolist()
    plain = swarm.whole.generate(PROMPT, max_new_tokens=24, do_sample=False)
    assert actual.tolist() == plain.tolist()
    if same_weights:
        assert swarm.client.passes < 24


def test_assisted_sampling(make_swarm: Any, make_whole_model: Callable[..., Any]) -> None:
    swarm = make_swarm()
    assistant = make_whole_model("llama", seed=1)
    actual, expected = generate_both(swarm, PROMPT, assistant_model=assistant, do_sample=True)
    assert actual.tolist() == expected.tolist()


class StopAtLength(StoppingCriteria):  # type: ignore[misc]
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 16)


@pytest.mark.parametrize("criteria", [StopAtLength(), MaxLengthCriteria(14)])
def test_stopping_criteria(make_swarm: Any, criteria: StoppingCriteria) -> None:
    swarm = make_swarm()
    actual, expected = generate_both(
        swarm, PROMPT, stopping_criteria=StoppingCriteriaList([criteria]), eos_token_id=None
    )
    assert actual.tolist() == expected.tolist()
    assert actual.shape[1] < PROMPT.shape[1] + 24


class Recorder(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamer(make_swarm: Any) -> None:
    swarm = make_swarm()
    streamer = Recorder()
    expected = swarm.whole.generate(PROMPT, max_new_tokens=24, do_sample=False)
    swarm.model.generate(PROMPT, max_new_tokens=24, do_sample=False, streamer=streamer)
    assert streamer.tokens == expected[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prefill_chunk_size": 4}])
def test_other_ways_through_the_cache(make_swarm: Any, options: dict[str, Any]) -> None:
    swarm = make_swarm()
    actual, expected = generate_both(swarm, PROMPT, max_new_tokens=6, **options)
    assert actual.tolist() == expected.tolist()


def test_scores(make_swarm: Any) -> None:
    swarm = make_swarm()
    actual, expected = generate_both(
        swarm, PROMPT, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    assert actual.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(
        torch.stack(actual.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4
    )


def test_inputs_embeds(make_swarm: Any) -> None:
    swarm = make_swarm()
    embeds = swarm.whole.get_input_embeddings()(PROMPT).detach()
    expected = swarm.whole.generate(inputs_embeds=embeds, max_new_tokens=12, do_sample=False)
    actual = swarm.model.generate(inputs_embeds=embeds, max_new_tokens=12, do_sample=False)
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("own_cache", [False, True])
def test_an_interrupted_answer_goes_on_from_its_tokens(make_swarm: Any, own_cache: bool) -> None:
    swarm = make_swarm()
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = swarm.whole.generate(PROMPT[:1], max_new_tokens=16, **options)
    swarm.client.lost_at_passes = {5}
    cache = swarm.model.new_cache(maximum_tokens=64)
    if own_cache:
        options["past_key_values"] = cache
    with pytest.raises(GenerationInterrupted, match="blocks 1-2 are lost") as caught:
        swarm.model.generate(PROMPT[:1], max_new_tokens=16, **options)
    token_ids = torch.tensor(caught.value.token_ids)
    assert token_ids.shape[1] == PROMPT.shape[1] + 4
    swarm.client.lost_at_passes.clear()
    left = expected.shape[1] - token_ids.shape[1]
    rest = swarm.model.generate(token_ids, max_new_tokens=left, **options)
    cache.close()
    assert rest.tolist() == expected.tolist()
    assert len(swarm.client.chains) == (1 if own_cache else 2)
