"""The routes of a gateway, and what holds for all of them: ids, keys, bounds, errors, metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from swarm.client.gateway.admission import Admission, Caller
from swarm.client.gateway.answer_desk import (
    CALLER,
    CLIENT_LEFT,
    REQUEST_ID,
    STARTED_S,
    STATUS,
    AnswerDesk,
)
from swarm.client.gateway.answers import log_bug
from swarm.client.gateway.bodies import Body, ChatBody, TextBody, read_body
from swarm.client.gateway.errors import ApiError, from_swarm, internal_error
from swarm.client.gateway.metrics import GatewayMetrics
from swarm.client.gateway.openapi import document
from swarm.client.gateway.settings import GatewaySettings
from swarm.client.gateway.shelf import ServedModel, Shelf, SwarmView
from swarm.page_files import PageFiles
from swarm.protocol.errors import SwarmError
from swarm.protocol.version import software_version

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SERVER_NAME = f"swarm-gateway/{software_version()}"
CHAT_PAGE = {
    "/": ("chat.html", "text/html"),
    "/page/chat.css": ("chat.css", "text/css"),
    "/page/chat.js": ("chat.js", "text/javascript"),
    "/page/markdown.js": ("markdown.js", "text/javascript"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
OPEN_HOSTS = ("localhost", "127.0.0.1", "[::1]")


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
        self._shelf = shelf
        self._admission = admission
        self._metrics = metrics
        self._page = PageFiles("swarm.client.gateway", CHAT_PAGE)
        self._desk = AnswerDesk(settings, client, admission, metrics, self._add_headers)

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
        await self._desk.finish(grace_s)

    @property
    def stopping(self) -> bool:
        return self._desk.stopping

    # --- around every request
    @web.middleware
    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Gives an id; turns every error into an answer; counts and logs, never what was said."""
        request[REQUEST_ID] = request_id = secrets.token_hex(12)
        request[STARTED_S] = started_s = time.monotonic()
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "unknown"
        request[STATUS] = CLIENT_LEFT
        try:
            response = await self._answered(request, handler)
            request[STATUS] = response.status
            if not response.prepared:
                self._add_headers(request, response)
            return response
        finally:
            status, duration_s = request[STATUS], time.monotonic() - started_s
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
        response.headers["Server"] = SERVER_NAME
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
        return web.json_response(document(self._shelf.names))

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
            {"object": "list", "data": [_model_json(*named) for named in self._shelf.named]}
        )

    async def _model(self, request: web.Request) -> web.StreamResponse:
        self._identify(request)
        name = request.match_info["model"]
        return web.json_response(_model_json(name, self._shelf.find(name)[0]))

    # --- answers
    async def _chat(self, request: web.Request) -> web.StreamResponse:
        caller = self._identify(request)
        self._admission.count_request(caller)
        body = await self._body(request, ChatBody)
        model, adapter = self._shelf.find(body.model)
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
        return await self._desk.answer(request, model, body, adapter, prompt_ids, settings)

    async def _text(self, request: web.Request) -> web.StreamResponse:
        caller = self._identify(request)
        self._admission.count_request(caller)
        body = await self._body(request, TextBody)
        model, adapter = self._shelf.find(body.model)
        settings = body.settings(self._settings)
        match body.prompt:
            case str() as text:
                prompt_ids = await model.encode(text)
            case [str() as text]:
                prompt_ids = await model.encode(text)
            case ids:
                prompt_ids = model.check_ids([item for item in ids if isinstance(item, int)])
        return await self._desk.answer(request, model, body, adapter, prompt_ids, settings)


def _model_json(name: str, model: ServedModel) -> dict[str, Any]:
    return {
        "id": name,
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
            text = "this path does not take that method"
            allow = error.headers.get("Allow", "")
            return ApiError(405, text, code="method_not_allowed", allow=allow)
        case 413:
            return ApiError(413, "the body is too large", code="request_too_large")
    return ApiError(error.status, error.reason or "refused", code="bad_request")
