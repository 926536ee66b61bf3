"""Whatever a client sends gets the right status and an OpenAI error: no bug, and no leak."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest

WORDS = "zyxwv-the-words-of-a-person"
RIGHT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": WORDS}],
    "max_tokens": 1,
    "temperature": 0,
}
FAILURES = {400, 401, 403, 404, 405, 408, 413, 415}
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    "",
    WORDS,
    [],
    {},
    [[[]]],
    {"a": {"b": WORDS}},
)


def broken_bodies(dice: random.Random) -> list[bytes]:
    """Right bodies with something wrong in them, and bytes that are no bodies."""
    bodies: list[bytes] = [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"' + WORDS.encode() + b'"',
        b"\xff\xfe\xfa",
        json.dumps(RIGHT).encode()[:-1],
        json.dumps(RIGHT).replace(WORDS, "\\ud800").encode(),
        json.dumps(RIGHT).encode().replace(WORDS.encode(), WORDS.encode() + b"\xc3"),
        b'{"model": "tiny", "messages": ' + b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model": "tiny", "max_tokens": ' + b"9" * 10_000 + b"}",
        b'{"model": "tiny", "temperature": NaN, "messages": []}',
        json.dumps(RIGHT | {"logit_bias": {WORDS: 1}}).encode(),
        json.dumps(RIGHT | {"logit_bias": {str(n): 1 for n in range(5000)}}).encode(),
        json.dumps(RIGHT | {"stop": ["a"] * 5}).encode(),
        json.dumps(RIGHT | {"messages": [{"role": "user"}] * 5000}).encode(),
        json.dumps(RIGHT | {"messages": [{"role": "tool", "content": WORDS}]}).encode(),
        json.dumps(RIGHT | {"response_format": {"type": "json_schema"}}).encode(),
    ]
    names = [*RIGHT, "n", "stream", "stop", "seed", "logprobs", "top_p", "response_format", "user"]
    while len(bodies) < 300:
        body = dict(RIGHT)
        body[dice.choice(names)] = dice.choice(ODD_VALUES)
        if dice.random() < 0.3:
            del body[dice.choice(list(body))]
        content = bytearray(json.dumps(body).encode())
        if dice.random() < 0.5:
            content[dice.randrange(len(content))] = dice.randrange(256)
        bodies.append(bytes(content))
    return bodies


async def test_a_thousand_wrong_requests(
    run_gateway: Any, logged: pytest.LogCaptureFixture
) -> None:
    dice = random.Random(1)
    bodies = broken_bodies(dice)
    statuses: Counter[int] = Counter()

    async with run_gateway(maximum_body_bytes=256 * 1024, body_timeout_s=0.5) as running:
        json_type = {"Content-Type": "application/json"}

        async def check(reply: Any) -> None:
            content = await reply.read()
            statuses[reply.status] += 1
            assert reply.status in FAILURES | {200, 204}, content
            assert b"Traceback" not in content
            assert reply.headers["x-request-id"]
            if reply.status >= 400:
                error = json.loads(content)["error"]
                assert error["message"]
                assert error["type"]
                assert WORDS.encode() not in content
                assert running.key.encode() not in content

        async def post(data: Any, path: str = "/v1/chat/completions", **headers: str) -> None:
            async with running.post(path, data=data, headers=json_type | headers) as reply:
                await check(reply)

        async def get(path: str, method: str = "GET", **headers: str) -> None:
            options = {"headers": headers} if headers else {}
            async with running.http.request(method, running.url + path, **options) as reply:
                await check(reply)

        for content in bodies:
            await post(content)
            await post(content, "/v1/completions")
        for number in range(200):
            key = running.key[: dice.randrange(len(running.key))] + chr(33 + number % 90)
            await post(json.dumps(RIGHT), Authorization=f"Bearer {key}")
        for header in ("", "Bearer", "Basic Og==", "Bearer " + "x" * 5000, running.key):
            await post(json.dumps(RIGHT), Authorization=header)
        for kind in ("text/plain", "application/xml", "multipart/form-data; boundary=x", "%%"):
            await post(json.dumps(RIGHT), **{"Content-Type": kind})
        await post(json.dumps(RIGHT), **{"Content-Encoding": "gzip"})
        for _ in range(20):
            await post(b" " * 300_000 + json.dumps(RIGHT).encode())
        await asyncio.gather(*(post(_slowly(json.dumps(RIGHT).encode())) for _ in range(20)))
        for path in (
            "/nothing",
            "/v1",
            "/v1/models/" + "x" * 3000,
            "/..%2f..%2fetc/passwd",
            "/%00",
        ):
            for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
                await get(path, method)
        for _ in range(150):
            await get("/v1/models", Authorization=f"Bearer {dice.random()}")
        assert sum(statuses.values()) >= 1000
        assert statuses.keys() >= FAILURES
        assert statuses[408] == 20
        assert statuses[413] >= 20

    for record in logged.records:
        line = logged.handler.format(record)
        assert WORDS not in line
        assert "Traceback" not in line
        assert running.key not in line


async def _slowly(content: bytes) -> AsyncIterator[bytes]:
    for byte in content:
        yield bytes([byte])
        await asyncio.sleep(0.02)


async def test_bytes_that_are_no_http(run_gateway: Any, logged: pytest.LogCaptureFixture) -> None:
    async with run_gateway(body_timeout_s=0.5) as running:
        address = urlsplit(running.url)

        async def answer_to(content: bytes) -> bytes:
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(content)
            try:
                async with asyncio.timeout(5):
                    return await reader.read()
            finally:
                writer.close()

        assert b" 400 " in (await answer_to(b"\x16\x03\x01hello\r\n\r\n"))[:20]
        assert b" 400 " in (await answer_to(b"GET / HTTP/1.1\r\nx: " + b"y" * 100_000))[:20]
        bad_header = f"GET / HTTP/1.1\r\nAuthorization: Bearer {running.key}\x00\r\n\r\n"
        assert b" 400 " in (await answer_to(bad_header.encode()))[:20]
        assert running.key not in logged.text
        assert "Traceback" not in logged.text
        # Headers that never end, and a connection that says nothing: closed after a while.
        assert await answer_to(b"GET / HTTP/1.1\r\nHost: localhost\r\nx: ") == b""
        assert await answer_to(b"") == b""


async def test_a_bug_shows_nothing_of_what_was_said(
    run_gateway: Any, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_gateway() as running:

        def fail(*_: Any, **__: Any) -> None:
            raise KeyError(WORDS)

        monkeypatch.setattr(running.model, "chooser", fail)
        async with running.post(json=RIGHT) as reply:
            assert reply.status == 500
            assert WORDS not in await reply.text()
        assert "failed by a bug: KeyError at test_hostile_clients.py" in logged.text
        assert WORDS not in logged.text


async def test_pages_of_others_cannot_use_an_open_gateway(run_gateway: Any) -> None:
    async with run_gateway(with_key=False) as running:
        async with running.post(json=RIGHT) as reply:
            assert reply.status == 200
        # A name of the attacker's own that points to this computer.
        async with running.post(json=RIGHT, headers={"Host": "evil.example"}) as reply:
            assert reply.status == 403
        # What a page may send without being allowed to.
        text = json.dumps(RIGHT)
        async with running.post(data=text, headers={"Content-Type": "text/plain"}) as reply:
            assert reply.status == 415
        origin = {"Origin": "https://evil.example"}
        async with running.http.options(running.url + "/v1/models", headers=origin) as reply:
            assert reply.status == 403
            assert "Access-Control-Allow-Origin" not in reply.headers


async def test_pages_that_are_allowed(run_gateway: Any) -> None:
    origin = {"Origin": "https://chat.example"}
    async with run_gateway(allowed_origins=("https://chat.example",)) as running:
        url = running.url + "/v1/chat/completions"
        async with running.http.options(url, headers=origin) as reply:
            assert reply.status == 204
            assert reply.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        async with running.post(json=RIGHT, headers=origin) as reply:
            assert reply.headers["Access-Control-Allow-Origin"] == "https://chat.example"
