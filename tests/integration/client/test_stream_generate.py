"""The async API: the same tokens as transformers, sessions always freed, turns that share one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from swarm.client import cli, joining
from swarm.client.chat import Conversation
from swarm.client.config import SamplingSettings
from swarm.client.generate import (
    GenerationResult,
    LocalModel,
    TextPiece,
    TextSession,
    stream_generate,
)
from swarm.protocol.errors import GenerationInterrupted, NetworkError, UsageError

PROMPT = [5, 17, 33, 9, 60, 41, 8, 77, 20, 31, 5]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer() -> Any:
    """One token per printable ASCII character (token id = place in the alphabet + 3)."""
    alphabet = [bytes([byte]).decode() for byte in range(33, 126)]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {
        letter: number + 3 for number, letter in enumerate(alphabet)
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special_tokens = {"eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        **special_tokens,
    )


@pytest.fixture
def make_local(make_swarm: Any) -> Iterator[Callable[..., tuple[Any, LocalModel]]]:
    """A tiny swarm and what a client holds of its model; token 2 ends a text."""
    opened: list[LocalModel] = []

    def make(*, end_token_ids: frozenset[int] = frozenset(), **changes: Any) -> Any:
        swarm = make_swarm("llama", **changes)
        blocks = swarm.model._blocks
        model = LocalModel(
            swarm.model.ends,
            lambda client: replace(blocks, client=client),
            byte_tokenizer(),
            end_token_ids,
        )
        opened.append(model)
        return swarm, model

    yield make
    for model in opened:
        model.close()


async def collect(pieces: AsyncIterator[TextPiece]) -> list[TextPiece]:
    return [piece async for piece in pieces]


async def result_of(pieces: AsyncIterator[TextPiece]) -> GenerationResult:
    result = (await collect(pieces))[-1].result
    assert result is not None
    return result


def expected_tokens(swarm: Any, prompt: list[int], **options: Any) -> list[int]:
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    output = swarm.whole.generate(torch.tensor([prompt]), **options)
    return list(output[0, len(prompt) :].tolist())


async def test_greedy_is_that_of_transformers(make_local: Any) -> None:
    swarm, model = make_local()
    pieces = await collect(
        stream_generate(swarm.client, model, PROMPT, SamplingSettings(max_new_tokens=24))
    )
    result = pieces[-1].result
    assert result is not None
    assert list(result.token_ids) == expected_tokens(swarm, PROMPT, max_new_tokens=24)
    assert result.text == "".join(piece.text for piece in pieces) == model.decode(result.token_ids)
    assert result.finish_reason == "length"
    assert result.prompt_tokens == len(PROMPT)
    assert result.chain_passes == 24
    assert result.plan == swarm.client.chains[0].plan
    assert result.time_to_first_token_s > 0
    assert result.tokens_per_s > 0
    assert [token for piece in pieces for token in piece.token_ids] == list(result.token_ids)
    assert swarm.client.chains[0].closed


@pytest.mark.parametrize("top_k", [0, 20])
async def test_sampling_is_that_of_transformers(make_local: Any, top_k: int) -> None:
    swarm, model = make_local()
    settings = SamplingSettings(
        max_new_tokens=24, temperature=0.8, top_k=top_k, top_p=0.9, repetition_penalty=1.2, seed=11
    )
    result = await result_of(stream_generate(swarm.client, model, PROMPT, settings))
    torch.manual_seed(11)
    expected = expected_tokens(
        swarm,
        PROMPT,
        max_new_tokens=24,
        do_sample=True,
        temperature=0.8,
        top_k=top_k,
        top_p=0.9,
        repetition_penalty=1.2,
    )
    assert list(result.token_ids) == expected


async def test_end_token_and_stop_string(make_local: Any) -> None:
    swarm, model = make_local()
    tokens = expected_tokens(swarm, PROMPT, max_new_tokens=12)
    text = model.decode(tokens)

    model.end_token_ids = frozenset([tokens[5]])
    ended = await result_of(stream_generate(swarm.client, model, PROMPT))
    first = tokens.index(tokens[5])
    assert list(ended.token_ids) == tokens[: first + 1]
    assert ended.finish_reason == "stop"

    model.end_token_ids = frozenset()
    stop = text[6:8]
    stopped = await result_of(
        stream_generate(swarm.client, model, PROMPT, SamplingSettings(stop=(stop,)))
    )
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


async def test_many_users_at_once(make_local: Any) -> None:
    swarm, model = make_local()
    prompts = [PROMPT[start:] for start in range(6)]
    settings = SamplingSettings(max_new_tokens=10)
    answers = await asyncio.gather(
        *(result_of(stream_generate(swarm.client, model, prompt, settings)) for prompt in prompts)
    )
    for prompt, result in zip(prompts, answers, strict=True):
        assert list(result.token_ids) == expected_tokens(swarm, prompt, max_new_tokens=10)


async def test_leaving_early_closes_the_session(make_local: Any) -> None:
    swarm, model = make_local()
    async with aclosing(stream_generate(swarm.client, model, PROMPT)) as pieces:
        async for _ in pieces:
            break
    assert swarm.client.chains[0].closed


async def test_cancelling_closes_the_session(make_local: Any) -> None:
    swarm, model = make_local()
    waiting = asyncio.Event()

    async def consume() -> None:
        open_chain = swarm.client.open_chain

        async def open_slow_chain(*args: Any, **kwargs: Any) -> Any:
            chain = await open_chain(*args, **kwargs)

            async def never(*args: Any, **kwargs: Any) -> None:
                waiting.set()
                await asyncio.Event().wait()

            chain.step = never
            return chain

        swarm.client.open_chain = open_slow_chain
        await collect(stream_generate(swarm.client, model, PROMPT))

    task = asyncio.create_task(consume())
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert swarm.client.chains[0].closed


async def test_a_failing_hop_closes_the_session(make_local: Any) -> None:
    swarm, model = make_local()
    swarm.client.fail_at_pass = 3
    with pytest.raises(NetworkError, match="a hop is gone"):
        await collect(stream_generate(swarm.client, model, PROMPT))
    assert swarm.client.chains[0].closed


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("lost_at", [{1}, {2}, {7}, {3, 4, 9}])
async def test_an_interrupted_answer_goes_on_where_it_stopped(
    make_local: Any, temperature: float, lost_at: set[int]
) -> None:
    swarm, model = make_local()
    settings = SamplingSettings(max_new_tokens=12, temperature=temperature, seed=3)
    whole = await result_of(stream_generate(swarm.client, model, PROMPT, settings))
    swarm.client.lost_at_passes = lost_at
    pieces: list[TextPiece] = []
    async with TextSession(swarm.client, model, maximum_tokens=64) as session:
        stream = session.stream(PROMPT, settings)
        for _ in lost_at:
            with pytest.raises(GenerationInterrupted) as caught:
                async for piece in stream:
                    pieces.append(piece)  # noqa: PERF401  (those before the error count)
            assert caught.value.missing_blocks == (1, 2)
            seen = [token for piece in pieces for token in piece.token_ids]
            assert caught.value.token_ids == ((*PROMPT, *seen),)
            stream = session.resume()
        pieces += await collect(stream)
        with pytest.raises(UsageError, match="no answer"):
            await collect(session.resume())
    result = pieces[-1].result
    assert result is not None
    assert result.token_ids == whole.token_ids
    assert [token for piece in pieces for token in piece.token_ids] == list(whole.token_ids)
    assert "".join(piece.text for piece in pieces) == whole.text == result.text
    assert len(swarm.client.chains) == 2


async def test_an_interrupted_answer_goes_on_in_another_session(make_local: Any) -> None:
    swarm, model = make_local()
    swarm.client.lost_at_passes = {6}
    with pytest.raises(GenerationInterrupted) as caught:
        await collect(
            stream_generate(swarm.client, model, PROMPT, SamplingSettings(max_new_tokens=12))
        )
    assert swarm.client.chains[0].closed
    swarm.client.lost_at_passes = set()
    (token_ids,) = caught.value.token_ids
    left = SamplingSettings(max_new_tokens=12 - (len(token_ids) - len(PROMPT)))
    rest = await result_of(stream_generate(swarm.client, model, token_ids, left))
    assert [*token_ids, *rest.token_ids] == [
        *PROMPT,
        *expected_tokens(swarm, PROMPT, max_new_tokens=12),
    ]


async def test_turns_send_only_what_is_new(make_local: Any) -> None:
    swarm, model = make_local()
    settings = SamplingSettings(max_new_tokens=6)
    async with TextSession(swarm.client, model, maximum_tokens=64) as session:
        first = await result_of(session.stream(PROMPT, settings))
        second_prompt = [*PROMPT, *first.token_ids[:4], 7, 8]  # rolls two tokens back
        second = await result_of(session.stream(second_prompt, settings))
        assert len(swarm.client.chains) == 1
    assert list(second.token_ids) == expected_tokens(swarm, second_prompt, max_new_tokens=6)
    assert swarm.client.chains[0].closed


async def test_a_chain_that_died_between_turns_is_replaced(make_local: Any) -> None:
    swarm, model = make_local()
    settings = SamplingSettings(max_new_tokens=4)
    async with TextSession(swarm.client, model, maximum_tokens=64) as session:
        await collect(session.stream(PROMPT, settings))
        swarm.client.chains[0].fail_at_pass = swarm.client.chains[0].passes + 1
        second = await result_of(session.stream([*PROMPT, 9], settings))
    assert len(swarm.client.chains) == 2
    assert list(second.token_ids) == expected_tokens(swarm, [*PROMPT, 9], max_new_tokens=4)


@pytest.mark.parametrize(("prompt", "says"), [([], "empty"), ([5] * 256, "at most 255 fit")])
async def test_prompts_that_do_not_fit(make_local: Any, prompt: list[int], says: str) -> None:
    swarm, model = make_local()
    with pytest.raises(UsageError, match=says):
        await collect(stream_generate(swarm.client, model, prompt))


async def test_conversation_forgets_the_oldest_turns(make_local: Any) -> None:
    swarm, model = make_local()
    conversation = Conversation(swarm.client, model, system="be brief", maximum_tokens=90)
    settings = SamplingSettings(max_new_tokens=8)
    for question in ("one", "two", "three", "four"):
        result = await result_of(conversation.answer(question, settings))
        conversation.remember_answer(result.text)
        assert result.prompt_tokens <= 82
    asked = [turn["content"] for turn in conversation.turns if turn["role"] == "user"]
    assert asked[-1] == "four"
    assert "one" not in asked
    assert len(swarm.client.chains) == 1
    await conversation.close()


@pytest.fixture
def command(make_local: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run ``swarm`` on a tiny swarm."""
    swarm, model = make_local()

    @contextmanager
    def joined(model_name: str, settings: Any) -> Iterator[Any]:
        yield joining.Swarm(swarm.model._background, swarm.client, model)

    monkeypatch.setattr(cli, "joined", joined)
    monkeypatch.setenv("SWARM_PEERS", "/ip4/192.0.2.7/tcp/31330/p2p/12D3KooWA")

    def run(*arguments: str, typed: str = "") -> Any:
        return CliRunner().invoke(cli.app, list(arguments), input=typed, catch_exceptions=False)

    return run


def test_generate_command(command: Callable[..., Any]) -> None:
    result = command("generate", "tiny", "hello", "--max-new-tokens", "5")
    assert result.exit_code == 0
    assert "served by here [0:3]" in result.stderr
    assert "5 tokens, " in result.stderr
    assert len(result.stdout.strip()) <= 5

    as_json = command("generate", "tiny", "--raw", "--json", "--max-new-tokens", "5", typed="hello")
    answer = json.loads(as_json.stdout)
    assert not as_json.stderr
    assert answer["new_tokens"] == len(answer["token_ids"]) == 5
    assert answer["prompt_tokens"] == len("hello")
    assert [hop["name"] for hop in answer["chain"]] == ["here"]


def test_chat_command(command: Callable[..., Any]) -> None:
    result = command(
        "chat", "tiny", "--json", "--max-new-tokens", "4", typed="one\n\n/new\ntwo\n/quit\nthree\n"
    )
    assert result.exit_code == 0
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["new_tokens"] for answer in answers] == [4, 4]
