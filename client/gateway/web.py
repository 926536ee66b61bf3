"""The routes of a gateway, and what holds for all of them: ids, keys, bounds, errors, metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from aiohttp import web

from swarm.client.gateway.admission import Admission, Caller
from swarm.client.gateway.answers import Event, Question, answering, log_bug
from swarm.client.gateway.bodies import Body, ChatBody, TextBody, read_body
from swarm.client.gateway.errors import ApiError, from_swarm, internal_error
from swarm.client.gateway.limits import Usage
from swarm.client.gateway.metrics import GatewayMetrics
from swarm.client.gateway.openapi import document
from swarm.client.gateway.page_files import PageFiles
from swarm.client.gateway.replies import DONE, KEEP_ALIVE, Reply, event_of
from swarm.client.gateway.settings import GatewaySettings
from swarm.client.gateway.shelf import ServedModel, Shelf, SwarmView
from swarm.client.gateway.token_text import TokenTexts
from swarm.protocol.errors import SwarmError
from swarm.protocol.version import software_version

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CLIENT_LEFT = 499
OPEN_HOSTS = ("localhost", "127.0.0.1", "[::1]")
CALLER = web.RequestKey("caller", Caller)
REQUEST_ID = web.RequestKey("request_id", str)
STARTED_S = web.RequestKey("started_s", float)


class Gateway:
    """Answers HTTP requests by a swarm."""

    def __init__(
        self,
        settings: GatewaySettings,
        client: SwarmView,
        shelf: Shelf,
        admission: Admission,
        metrics: GatewayMetrics,
    ) -> None:
        self._settings = settings
        self._client = client
        self._shelf = shelf
        self._admission = admission
        self._metrics = metrics
        self._page = PageFiles()
        self._document = document()
        self._busy: set[asyncio.Task[Any]] = set()
        self.stopping = False

    def application(self) -> web.Application:
        app = web.Application(
            middlewares=[self._around], client_max_size=self._settings.maximum_body_bytes
        )
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics_text),
                web.get("/openapi.json", self._openapi),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{model:.+}", self._model),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._text),
                web.route("OPTIONS", "/v1/{rest:.*}", self._preflight),
                *self._page.routes(),
            ]
        )
        return app

    async def finish(self, grace_s: float) -> None:
        """Refuse new answers, and wait for the running ones; after ``grace_s`` they are ended."""
        self.stopping = True
        if self._busy:
            await asyncio.wait(self._busy, timeout=grace_s)
        for task in self._busy:
            task.cancel()
        if self._busy:
            await asyncio.wait(self._busy, timeout=5)

    # --- around every request
    @web.middleware
    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Gives an id; turns every error into an answer; counts and logs, never what was said."""
        request[REQUEST_ID] = request_id = secrets.token_hex(12)
        request[STARTED_S] = started_s = time.monotonic()
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "unknown"
        status = CLIENT_LEFT
        try:
            response = await self._answered(request, handler)
            status = response.status
            if not response.prepared:
                self._add_headers(request, response)
            return response
        finally:
            duration_s = time.monotonic() - started_s
            self._metrics.answered(route, status, duration_s)
            log.info("%s %s %s %d %.3f s", request_id, request.method, route, status, duration_s)

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._check_host(request)
            return await handler(request)
        except ApiError as error:
            return _error_response(error)
        except SwarmError as error:
            return _error_response(from_swarm(error))
        except web.HTTPException as error:
            return _error_response(_from_http(error))
        except ConnectionError:
            raise  # the client has left
        except Exception as error:  # a bug: the caller learns nothing of it
            log_bug(f"request {request[REQUEST_ID]}", error)
            return _error_response(internal_error())

    def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers["x-request-id"] = request[REQUEST_ID]
        response.headers["X-Content-Type-Options"] = "nosniff"
        origin = request.headers.get("Origin")
        if origin is not None and origin in self._settings.allowed_origins:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "x-request-id"
            response.headers["Vary"] = "Origin"

    def _check_host(self, request: web.Request) -> None:
        """An open gateway on loopback answers to its own names only.

        Otherwise any web page could reach it through a name of its own that points here.
        """
        if self._settings.without_keys or self._admission.needs_keys:
            return
        name = re.sub(r":\d+$", "", request.host).lower()
        if name not in (*OPEN_HOSTS, *self._settings.allowed_hosts):
            raise ApiError(403, "this gateway does not answer to that name", code="wrong_host")

    def _identify(self, request: web.Request) -> Caller:
        caller = self._admission.identify(
            request.headers.get("Authorization"), request.remote or "unknown"
        )
        request[CALLER] = caller
        return caller

    async def _body(self, request: web.Request, kind: type[Body]) -> Body:
        """Read and check it, within bounds of size and time."""
        if request.content_type != "application/json":
            # Also keeps web pages of others out: browsers ask before they send this type.
            raise ApiError(415, "the body must be application/json", code="unsupported_media_type")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise ApiError(415, "the body must not be compressed", code="unsupported_media_type")
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                content = await request.read()
        except TimeoutError:
            raise ApiError(408, "the body came too slowly", code="timeout") from None
        return read_body(kind, content)

    # --- what is asked of the process
    async def _healthz(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "ok"})

    async def _readyz(self, request: web.Request) -> web.StreamResponse:
        if self.stopping:
            return web.json_response({"status": "stopping"}, status=503)
        if not self._shelf.any_complete:
            return web.json_response({"status": "no model is complete"}, status=503)
        return web.json_response({"status": "ready"})

    async def _metrics_text(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text=self._metrics.text(), content_type="text/plain")

    async def _openapi(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self._document)

    async def _preflight(self, request: web.Request) -> web.StreamResponse:
        origin = request.headers.get("Origin", "")
        if origin not in self._settings.allowed_origins:
            raise ApiError(403, "pages of that origin may not use this gateway", code="origin")
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": "authorization, content-type",
                "Access-Control-Max-Age": "600",
            },
        )

    # --- models
    async def _models(self, request: web.Request) -> web.StreamResponse:
        self._identify(request)
        return web.json_response(
            {"object": "list", "data": [_model_json(model) for model in self._shelf.models]}
        )

    async def _model(self, request: web.Request) -> web.StreamResponse:
        self._identify(request)
        return web.json_response(_model_json(self._shelf.find(request.match_info["model"])))

    # --- answers
    async def _chat(self, request: web.Request) -> web.StreamResponse:
        caller = self._identify(request)
        self._admission.count_request(caller)
        body = await self._body(request, ChatBody)
        model = self._shelf.find(body.model)
        settings = body.settings(self._settings)
        prompt_ids = await model.encode_chat(
            [
                {
                    "role": "system" if message.role == "developer" else message.role,
                    "content": message.text,
                }
                for message in body.messages
            ]
        )
        question = self._question(model, prompt_ids, settings, body.choices)
        return await self._answer(request, model, body, question)

    async def _text(self, request: web.Request) -> web.StreamResponse:
        caller = self._identify(request)
        self._admission.count_request(caller)
        body = await self._body(request, TextBody)
        model = self._shelf.find(body.model)
        settings = body.settings(self._settings)
        match body.prompt:
            case str() as text:
                prompt_ids = await model.encode(text)
            case [str() as text]:
                prompt_ids = await model.encode(text)
            case ids:
                prompt_ids = model.check_ids([item for item in ids if isinstance(item, int)])
        question = self._question(model, prompt_ids, settings, body.choices)
        return await self._answer(request, model, body, question)

    def _question(
        self, model: ServedModel, prompt_ids: list[int], settings: Any, choices: int
    ) -> Question:
        room = model.local.maximum_tokens - len(prompt_ids)
        if not prompt_ids:
            raise ApiError(400, "the prompt is empty", code="invalid_value", param="prompt")
        if room < 1:
            raise ApiError(
                400,
                f"this model's context is {model.local.maximum_tokens} tokens; "
                f"the prompt has {len(prompt_ids)}",
                code="context_length_exceeded",
                param="messages",
            )
        return Question(
            model.local, prompt_ids, settings, choices, self._settings.resume_patience_s
        )

    async def _answer(
        self, request: web.Request, model: ServedModel, body: ChatBody | TextBody, ask: Question
    ) -> web.StreamResponse:
        if self.stopping:
            raise ApiError(503, "this gateway is stopping", code="stopping", retry_after_s=1)
        options = body.stream_options
        reply = Reply(
            request_id=request[REQUEST_ID],
            model_name=body.model,
            fingerprint=f"fp_{model.revision.hex()[:12]}",
            created_unix_s=int(time.time()),
            is_chat=isinstance(body, ChatBody),
            choices=ask.choices,
            prompt_tokens=len(ask.prompt_ids),
            texts=TokenTexts(model.local.tokenizer, model.local.end_token_ids),
            wants_logprobs=ask.settings.top_logprobs is not None,
            wants_usage=bool(options and options.include_usage),
            wants_chain=bool(options and options.include_chain),
        )
        task = asyncio.current_task()
        if task is not None:
            self._busy.add(task)
        usage: Usage | None = None
        try:
            async with (
                asyncio.timeout(self._settings.request_timeout_s),
                AsyncExitStack() as stack,
            ):
                usage = await stack.enter_async_context(
                    self._admission.admitted(
                        request[CALLER],
                        prompt_tokens=len(ask.prompt_ids),
                        answers=ask.choices,
                    )
                )
                queue = await stack.enter_async_context(answering(self._client, ask))
                events = _events(queue, ask.choices, self._settings.keep_alive_s)
                if body.stream:
                    return await self._stream(request, reply, events)
                return await self._whole(request, reply, events)
        except TimeoutError:
            raise ApiError(504, "the answer took too long", code="timeout") from None
        finally:
            self._busy.discard(task)
            if usage is not None:
                usage.tokens.take(time.monotonic(), reply.completion_tokens)
                self._metrics.tokens(model.name, len(ask.prompt_ids), reply.completion_tokens)

    async def _whole(
        self, request: web.Request, reply: Reply, events: AsyncIterator[Event | None]
    ) -> web.StreamResponse:
        is_first = True
        async for event in events:
            if event is None:
                continue
            if event.failure is not None:
                raise event.failure
            if is_first:
                self._metrics.first_token(time.monotonic() - request[STARTED_S])
                is_first = False
            reply.add(event)
        return web.json_response(reply.whole(), headers=self._admission.headers(request[CALLER]))

    async def _stream(
        self, request: web.Request, reply: Reply, events: AsyncIterator[Event | None]
    ) -> web.StreamResponse:
        """Errors before the first piece have their HTTP status; later ones are events."""
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
                **self._admission.headers(request[CALLER]),
            }
        )

        async def send(content: bytes) -> None:
            try:
                async with asyncio.timeout(self._settings.write_timeout_s):
                    if not response.prepared:
                        self._add_headers(request, response)
                        await response.prepare(request)
                        content = reply.opening() + content
                    await response.write(content)
            except TimeoutError:
                raise ConnectionResetError("the client does not read") from None

        try:
            is_first = True
            async for event in events:
                if event is None:
                    await send(KEEP_ALIVE)
                    continue
                if event.failure is not None:
                    if not response.prepared:
                        raise event.failure
                    await send(event_of(event.failure.to_json()))
                    break
                if is_first:
                    self._metrics.first_token(time.monotonic() - request[STARTED_S])
                    is_first = False
                if content := reply.chunk(event):
                    await send(content)
            else:
                await send(reply.closing())
                await response.write_eof()
                return response
            await send(DONE)
        except asyncio.CancelledError:
            if self.stopping and response.prepared:
                stopped = ApiError(503, "this gateway is stopping", code="stopping")
                await send(event_of(stopped.to_json()) + DONE)
            raise
        await response.write_eof()
        return response


async def _events(
    queue: asyncio.Queue[Event], choices: int, keep_alive_s: float
) -> AsyncIterator[Event | None]:
    """Until each choice has ended; None when nothing happened for a while."""
    running = choices
    while running:
        try:
            event = queue.get_nowait()
        except asyncio.QueueEmpty:
            try:
                async with asyncio.timeout(keep_alive_s):
                    event = await queue.get()
            except TimeoutError:
                yield None
                continue
        running -= event.is_last
        yield event


def _model_json(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_unix_s,
        "owned_by": "swarm",
        "swarm": {
            "revision": model.revision.hex(),
            "number_of_blocks": model.number_of_blocks,
            "context_tokens": model.local.maximum_tokens,
            "nodes": model.coverage.nodes,
            "available": model.coverage.fewest_replicas > 0,
        },
    }


def _error_response(error: ApiError) -> web.Response:
    return web.Response(
        text=json.dumps(error.to_json()),
        status=error.status,
        content_type="application/json",
        headers=error.headers,
    )


def _from_http(error: web.HTTPException) -> ApiError:
    """aiohttp's own refusals."""
    match error.status:
        case 404:
            return ApiError(404, "no such path", code="not_found")
        case 405:
            return ApiError(405, "this path does not take that method", code="method_not_allowed")
        case 413:
            return ApiError(413, "the body is too large", code="request_too_large")
    return ApiError(error.status, error.reason or "refused", code="bad_request")


SERVER_NAME = f"swarm-gateway/{software_version()}"
