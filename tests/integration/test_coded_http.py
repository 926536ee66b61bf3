"""What a client makes of the answers, refusals and silence of an HTTP service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from swarm.coded_http import CodedHttp, read_answer
from swarm.ledger import operator_client
from swarm.ledger.operator_client import OperatorClient
from swarm.protocol.errors import ErrorCode, NetworkError, ProtocolError, RemoteError

LONG_S = 60.0


@asynccontextmanager
async def served(*routes: web.RouteDef) -> AsyncIterator[str]:
    application = web.Application()
    application.add_routes(routes)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield "http://{}:{}".format(*runner.addresses[0][:2])
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"code": 43}', None),
        (b'{"code": "no number"}', ErrorCode.INTERNAL),
        (b"<html>proxy</html>", ErrorCode.INTERNAL),
        (b"[" * 5000, ErrorCode.INTERNAL),
    ],
)
async def test_a_refusal_has_the_service_s_code(body: bytes, code: ErrorCode | None) -> None:
    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=429, body=body, headers={"Retry-After": "7"})

    async with served(web.get("/", refuse)) as url, CodedHttp(url, "clerk") as http:
        with pytest.raises(RemoteError) as refused:
            async with http.answer("GET", "/", timeout_s=LONG_S):
                pass
    assert refused.value.code is (ErrorCode(43) if code is None else code)
    assert (refused.value.peer, refused.value.retry_after_ms) == ("clerk", 7000)


async def test_bodies_are_bounded_and_redirects_not_followed() -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(1 << 16))

    async def elsewhere(request: web.Request) -> web.Response:
        raise web.HTTPFound("/endless")

    routes = (web.get("/endless", endless), web.get("/elsewhere", elsewhere))
    async with served(*routes) as url, CodedHttp(url, "clerk") as http:
        with pytest.raises(ProtocolError) as failed:
            async with http.answer("GET", "/endless", timeout_s=LONG_S) as response:
                await read_answer(response, 1 << 20)
        assert failed.value.code is ErrorCode.TOO_LARGE
        with pytest.raises(RemoteError):
            async with http.answer("GET", "/elsewhere", timeout_s=LONG_S):
                pass


async def test_silence_is_an_error_of_the_network() -> None:
    async with CodedHttp("http://127.0.0.1:1", "clerk") as http:
        with pytest.raises(NetworkError, match=r"the clerk at .* does not answer"):
            async with http.answer("GET", "/", timeout_s=LONG_S):
                pass


async def test_an_export_may_take_longer_than_other_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The session's limit for all requests used to cut it off."""
    monkeypatch.setattr(operator_client, "TIMEOUT_S", 0.05)
    released = asyncio.Event()

    async def export(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"one\n")
        await released.wait()
        await response.write(b"two\n")
        return response

    async def silent(request: web.Request) -> web.Response:
        await released.wait()
        return web.Response()

    routes = (web.get("/v1/export", export), web.get("/checkpoint", silent))
    async with served(*routes) as url, OperatorClient(url) as client:
        lines = client.export(2)
        assert await anext(lines) == b"one"
        for _ in range(3):  # what has the ordinary limit ends meanwhile
            with pytest.raises(NetworkError):
                await client.checkpoint()
        released.set()
        assert await anext(lines) == b"two"
