"""The official ``openai`` package talks to a gateway as it does to OpenAI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import openai
import pytest
import torch

from swarm.protocol.adapter_index import AdapterIndex, ModuleSpec
from tests.integration.client.gateway.waiting import until

MESSAGES: Any = [{"role": "user", "content": "Hello?"}]


def greedy_text(running: Any, prompt: str, new_tokens: int) -> str:
    """What transformers itself would answer."""
    ids = torch.tensor([running.model.encode(prompt)])
    output = running.whole.generate(
        ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    return str(running.model.decode(output[0, ids.shape[1] :].tolist()))


async def test_models(run_gateway: Any) -> None:
    async with run_gateway() as running:
        client = running.openai()
        (model,) = (await client.models.list()).data
        assert model.id == "tiny"
        assert (await client.models.retrieve("tiny")).id == "tiny"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("huge")
        assert caught.value.code == "model_not_found"


class NoBytes:
    """An adapter that only has a name."""

    index = AdapterIndex(b"", ())

    def read(self, module: ModuleSpec) -> Sequence[bytes]:
        raise AssertionError("the tiny swarm computes without it")


async def test_adapters_are_models(run_gateway: Any) -> None:
    law = NoBytes()
    async with run_gateway(adapters={"law": law}) as running:
        client = running.openai()
        listed = [model.id for model in (await client.models.list()).data]
        assert listed == ["tiny", "tiny@law"]
        for name, adapter in (("tiny", None), ("tiny@law", law)):
            reply = await client.completions.create(model=name, prompt="Once", max_tokens=2)
            assert reply.model == name
            assert running.swarm.client.chains[-1].request.adapter is adapter
        for name in ("tiny@", "tiny@medicine", "@law", "huge@law", "tiny@law@law"):
            with pytest.raises(openai.NotFoundError, match="tiny@law"):
                await client.completions.create(model=name, prompt="Once")


async def test_chat(run_gateway: Any) -> None:
    async with run_gateway() as running:
        reply = await running.openai().chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=12, temperature=0
        )
        (choice,) = reply.choices
        assert choice.message.content == greedy_text(running, "user: Hello?\nassistant: ", 12)
        assert choice.message.role == "assistant"
        assert choice.finish_reason == "length"
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 12
        assert reply.usage.prompt_tokens == len(running.model.encode_chat(MESSAGES))
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12
        assert reply._request_id
        assert reply.swarm[0]["chain"][0]["name"] == "here"
        again = await running.openai().chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=12, temperature=1e-250
        )
        assert again.choices[0].message.content == choice.message.content


async def test_streaming_says_the_same(run_gateway: Any) -> None:
    async with run_gateway() as running:
        client = running.openai()
        options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
        whole = await client.chat.completions.create(**options)
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                **options, stream=True, stream_options={"include_usage": True}
            )
        ]
        texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(texts) == whole.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].usage == whole.usage
        assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_text_completions(run_gateway: Any) -> None:
    async with run_gateway() as running:
        client = running.openai()
        reply = await client.completions.create(
            model="tiny", prompt="Once", max_tokens=10, temperature=0, logprobs=2
        )
        expected = greedy_text(running, "Once", 10)
        assert reply.choices[0].text == expected
        logprobs = reply.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert len(logprobs.tokens) == len(logprobs.text_offset or ()) == 10
        assert all(len(likely) == 2 for likely in logprobs.top_logprobs or ())
        ids = running.model.encode("Once")
        again = await client.completions.create(
            model="tiny", prompt=ids, max_tokens=10, temperature=0
        )
        assert again.choices[0].text == expected
        streamed = [
            chunk.choices[0].text
            async for chunk in await client.completions.create(
                model="tiny", prompt="Once", max_tokens=10, temperature=0, stream=True
            )
        ]
        assert "".join(streamed) == expected


async def test_stop(run_gateway: Any) -> None:
    async with run_gateway() as running:
        text = greedy_text(running, "user: Hello?\nassistant: ", 24)
        stop = text[8]
        reply = await running.openai().chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=24, temperature=0, stop=[stop, "never"]
        )
        assert reply.choices[0].message.content == text[: text.index(stop)]
        assert reply.choices[0].finish_reason == "stop"


async def test_several_choices_and_seeds(run_gateway: Any) -> None:
    async with run_gateway() as running:
        client = running.openai()

        async def texts(**options: Any) -> list[str | None]:
            reply = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=16, temperature=1.0, **options
            )
            assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
            return [choice.message.content for choice in reply.choices]

        both = await texts(n=2, seed=5)
        assert both[0] != both[1]
        assert await texts(n=2, seed=5) == both
        assert await texts(seed=6) != both[:1]
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=16, seed=5, n=2, stream=True
            )
        ]
        for index in (0, 1):
            choices = [c.choices[0] for c in chunks if c.choices[0].index == index]
            assert "".join(c.delta.content or "" for c in choices) == both[index]


async def test_logprobs(run_gateway: Any) -> None:
    async with run_gateway() as running:
        reply = await running.openai().chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=6,
            temperature=0,
            logprobs=True,
            top_logprobs=3,
        )
        tokens = reply.choices[0].logprobs
        assert tokens is not None
        assert tokens.content is not None
        ids = running.model.encode_chat(MESSAGES)
        output = running.whole.generate(
            torch.tensor([ids]),
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        new_ids = output.sequences[0, len(ids) :].tolist()
        for token, token_id, logits in zip(tokens.content, new_ids, output.logits, strict=True):
            expected = torch.log_softmax(logits[0], -1)
            assert token.logprob == pytest.approx(float(expected[token_id]), abs=1e-4)
            likely = [other.logprob for other in token.top_logprobs]
            assert likely == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)
        content = b"".join(bytes(token.bytes or ()) for token in tokens.content)
        assert content.decode(errors="replace") == reply.choices[0].message.content


async def test_bias_and_penalties(run_gateway: Any) -> None:
    async with run_gateway() as running:
        client = running.openai()
        letter = running.model.encode("x")[0]
        options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
        reply = await client.chat.completions.create(**options, logit_bias={str(letter): 100})
        assert reply.choices[0].message.content == "x" * 8
        reply = await client.chat.completions.create(
            **options,
            logit_bias={str(letter): 50, str(letter + 1): 49.5},
            presence_penalty=1.0,
        )
        content = reply.choices[0].message.content or ""
        assert content[0] == "x"
        assert set(content) == {"x", "y"}


async def test_json(run_gateway: Any) -> None:
    """Whatever a random model would like to say: what is finished is JSON of the schema."""
    async with run_gateway() as running:
        client = running.openai()
        schema = {
            "type": "object",
            "properties": {"rain": {"type": "boolean"}, "where": {"enum": ["Kisumu", "Lamu"]}},
            "required": ["rain", "where"],
            "additionalProperties": False,
        }
        for seed in range(4):
            reply = await client.chat.completions.create(
                model="tiny",
                messages=MESSAGES,
                max_tokens=300,
                seed=seed,
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "weather", "schema": schema},
                },
            )
            said = json.loads(reply.choices[0].message.content or "")
            assert isinstance(said["rain"], bool)
            assert said["where"] in ("Kisumu", "Lamu")
            assert reply.choices[0].finish_reason == "stop"
        # Quotes, braces and the end made likely: a random model would never close what it opens.
        likely = {str(running.model.encode(sign)[0]): 8 for sign in '"}'}
        reply = await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=400,
            seed=1,
            logit_bias=likely,
            response_format={"type": "json_object"},
        )
        assert reply.choices[0].finish_reason == "stop"
        assert isinstance(json.loads(reply.choices[0].message.content or ""), dict)
        with pytest.raises(openai.BadRequestError, match="schema cannot be used"):
            await client.chat.completions.create(
                model="tiny",
                messages=MESSAGES,
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "odd", "schema": {"type": "objekt"}},
                },
            )


async def test_error_types(run_gateway: Any) -> None:
    async with run_gateway() as running:
        client = running.openai()

        async def fails(kind: type[openai.APIStatusError], code: str, **options: Any) -> None:
            full = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4} | options
            with pytest.raises(kind) as caught:
                await client.chat.completions.create(**full)
            assert caught.value.code == code
            assert caught.value.request_id

        bad = openai.BadRequestError
        await fails(openai.NotFoundError, "model_not_found", model="huge")
        await fails(bad, "invalid_type", temperature=9)
        await fails(bad, "invalid_type", messages=[])
        await fails(bad, "invalid_type", messages=[{"role": "wizard", "content": "x"}])
        await fails(bad, "invalid_value", max_tokens=10**9)
        await fails(bad, "invalid_value", n=9)
        await fails(bad, "unsupported_parameter", tools=[{"type": "function"}])
        await fails(
            bad, "context_length_exceeded", messages=[{"role": "user", "content": "long " * 200}]
        )
        await fails(bad, "invalid_value", messages=[{"role": "assistant", "content": "secret"}])
        for key in ("wrong", "sk-swarm-" + "0" * 16 + "-" + "A" * 43, running.key[:-1] + "~"):
            with pytest.raises(openai.AuthenticationError):
                await running.openai(api_key=key).models.list()


async def test_a_slow_swarm_and_the_client_s_timeout(run_gateway: Any) -> None:
    async with run_gateway() as running:
        running.swarm.gate.close_after(3)
        client = running.openai(timeout=openai.Timeout(5, read=0.3))
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=16)
        await until(lambda: running.swarm.open_sessions == 0)


async def test_an_answer_that_takes_too_long(run_gateway: Any) -> None:
    async with run_gateway(request_timeout_s=0.3) as running:
        running.swarm.gate.close_after(3)
        with pytest.raises(openai.InternalServerError) as caught:
            await running.openai().chat.completions.create(model="tiny", messages=MESSAGES)
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")


async def test_fifty_streams_at_a_time(run_gateway: Any) -> None:
    async with run_gateway() as running:
        client = running.openai()
        prompts = [f"Number {number}" for number in range(50)]

        async def text_of(prompt: str) -> str:
            stream = await client.completions.create(
                model="tiny", prompt=prompt, max_tokens=12, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*map(text_of, prompts))
        assert texts == [greedy_text(running, prompt, 12) for prompt in prompts]
        metrics = await running.metrics()
        assert metrics['swarm_gateway_tokens_total{kind="completion",model="tiny"}'] == 50 * 12
