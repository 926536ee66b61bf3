"""Sessions follow their requests: freed when clients leave, healed, shared fairly, let finish."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from swarm.client.config import ClientSettings
from swarm.client.gateway.keys import make_key
from swarm.client.gateway.process import run_gateway as run_gateway_process
from swarm.client.gateway.settings import GatewaySettings
from swarm.protocol.errors import ConfigError
from tests.integration.client.gateway.waiting import until, until_it_is

PEERS = ("/ip4/192.0.2.7/tcp/31330/p2p/12D3KooWA",)
ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello?"}],
    "max_tokens": 64,
    "temperature": 0,
    "stream": True,
}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_sessions(run_gateway: Any, stream: bool) -> None:
    async with run_gateway() as running:
        running.swarm.gate.close_after(5)
        asking = asyncio.create_task(_read(running, ASK | {"stream": stream, "n": 3}))
        await until(lambda: running.swarm.gate.held == 3)
        assert running.swarm.open_sessions == 3
        asking.cancel()
        left_s = time.monotonic()
        await until(lambda: running.swarm.open_sessions == 0, 2.0)
        assert time.monotonic() - left_s < 2
        metrics = await running.metrics()
        route = 'route="/v1/chat/completions",status="499"'
        assert metrics[f"swarm_gateway_requests_total{{{route}}}"] == 1
        assert metrics["swarm_gateway_answers_running"] == 0


async def test_a_client_that_does_not_read_is_given_up(run_gateway: Any) -> None:
    async with run_gateway(write_timeout_s=0.3, maximum_new_tokens=480) as running:
        asks = ASK | {"max_tokens": 480, "logprobs": True, "top_logprobs": 20, "n": 8}
        request = json.dumps(asks).encode()
        host, port = running.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Authorization: Bearer {running.key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(request)}\r\n\r\n"
        )
        writer.write(head.encode() + request)
        await until(lambda: running.swarm.client.chains and running.swarm.open_sessions == 0, 30)
        assert running.swarm.client.passes < 8 * 480
        writer.close()


async def test_lost_blocks_are_waited_for(run_gateway: Any) -> None:
    """The swarm loses blocks in mid-answer for a moment: the answer is the undisturbed one."""
    async with run_gateway() as running:
        undisturbed = await _read(running, ASK)
        running.swarm.client.lost_at_passes = {7, 8}
        assert await _read(running, ASK) == undisturbed


async def test_blocks_that_stay_away(run_gateway: Any) -> None:
    async with run_gateway(resume_patience_s=0) as running:
        running.swarm.client.lost_at_passes = set(range(7, 500))
        said = await _read(running, ASK)
        error = json.loads(said[-2])["error"]
        assert error["code"] == "swarm_unavailable"
        assert "blocks 1-2 are lost" in error["message"]
        assert said[-1] == "[DONE]"


async def test_an_answer_that_cannot_begin_has_a_status(run_gateway: Any) -> None:
    async with run_gateway() as running:
        running.swarm.client.fail_at_pass = 1
        async with running.post(json=ASK) as reply:
            assert reply.status == 503
            assert reply.headers["Retry-After"]


async def test_a_quiet_stream_says_that_it_lives(run_gateway: Any) -> None:
    async with run_gateway(keep_alive_s=0.05) as running:
        running.swarm.gate.close_after(0)
        async with running.post(json=ASK) as reply:
            first = await reply.content.readuntil(b"\n\n")
            assert b"assistant" in first
            assert await reply.content.readuntil(b"\n\n") == b": waiting\n\n"
            running.swarm.gate.open()
            assert (await reply.content.read()).endswith(b"data: [DONE]\n\n")


async def test_a_stopping_gateway_lets_answers_finish(run_gateway: Any) -> None:
    async with run_gateway(grace_s=20) as running:
        running.swarm.gate.close_after(5)
        asking = asyncio.create_task(_read(running, ASK))
        await until(lambda: running.swarm.gate.held == 1)
        running.stop.set()
        await until(lambda: running.swarm.gate.held == 1)
        async with running.http.get(running.url + "/readyz") as reply:
            assert reply.status == 503
        async with running.post(json=ASK) as reply:
            assert reply.status == 503
            assert (await reply.json())["error"]["code"] == "stopping"
        running.swarm.gate.open()
        said = await asking
        assert said[-1] == "[DONE]"
        assert '"finish_reason": null' not in said[-2]
        await running.task


async def test_answers_that_outlast_the_grace_are_told(run_gateway: Any) -> None:
    async with run_gateway(grace_s=0.1) as running:
        running.swarm.gate.close_after(5)
        asking = asyncio.create_task(_read(running, ASK))
        await until(lambda: running.swarm.gate.held == 1)
        running.stop.set()
        said = await asking
        assert json.loads(said[-2])["error"]["code"] == "stopping"


async def test_limits_of_a_key(run_gateway: Any) -> None:
    limits = {"requests_per_minute": 4, "answers": 2}
    async with run_gateway(key_limits=limits) as running:
        async with running.post(json=ASK | {"n": 3}) as reply:
            assert reply.status == 429
        for remaining in (2, 1, 0):
            async with running.post(json=ASK | {"max_tokens": 1}) as reply:
                assert reply.status == 200
                assert reply.headers["x-ratelimit-remaining-requests"] == str(remaining)
        async with running.post(json=ASK) as reply:
            assert reply.status == 429
            assert 10 <= int(reply.headers["Retry-After"]) <= 15
        # Others are not concerned.
        other, running.key = make_key("other")
        running.keys.add(other)
        await until_it_is(lambda: _status(running), 200)
        # Revoked: within a second or so.
        running.keys.revoke(other.key_id)
        await until_it_is(lambda: _status(running), 401)


async def test_keys_take_turns(run_gateway: Any) -> None:
    """One with many requests does not hold up one with few."""
    async with run_gateway(maximum_answers=2) as running:
        many, few_key = running.key, make_key("few")
        running.keys.add(few_key[0])
        ended: list[str] = []

        async def ask(key: str) -> None:
            headers = {"Authorization": f"Bearer {key}"}
            body = ASK | {"max_tokens": 4}
            async with running.http.post(
                f"{running.url}/v1/chat/completions", json=body, headers=headers
            ) as reply:
                assert reply.status == 200
                await reply.read()
            ended.append(key)

        await until_it_is(lambda: _status(running, few_key[1]), 200)
        running.swarm.gate.close_after(0)
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(ask(many))
            await until(lambda: running.swarm.gate.held == 2)
            group.create_task(ask(few_key[1]))

            async def waiting() -> float:
                return float((await running.metrics())["swarm_gateway_requests_waiting"])

            await until_it_is(waiting, 19)
            running.swarm.gate.open()
        assert ended.index(few_key[1]) <= 5


async def test_a_gateway_that_others_reach_needs_keys(tmp_path: Path) -> None:
    settings = GatewaySettings(models=("x",), host="192.0.2.1", keys_file=tmp_path / "none")
    with pytest.raises(ConfigError, match="swarm gateway keys add"):
        await run_gateway_process(settings, ClientSettings(PEERS), lambda _: None)


async def _status(running: Any, key: str | None = None) -> float:
    headers = {"Authorization": f"Bearer {key or running.key}"}
    async with running.http.get(running.url + "/v1/models", headers=headers) as reply:
        return float(reply.status)


async def _read(running: Any, body: dict[str, Any]) -> list[str]:
    """The events of a stream without what differs between requests, or one whole answer."""
    async with running.post(json=body) as reply:
        assert reply.status == 200
        content = (await reply.read()).decode()
    if not body["stream"]:
        return [content]
    events = [event.removeprefix("data: ") for event in content.split("\n\n") if event]
    return [event.partition('"choices"')[2].partition('"swarm"')[0] or event for event in events]
