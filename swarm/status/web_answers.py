"""How requests are answered: rendered once per snapshot, tagged, compressed, with safe headers."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from swarm.status import api
from swarm.status.languages import negotiated
from swarm.status.rendered import Rendered, RenderedAnswers
from swarm.status.snapshot import NodeStatus, Snapshot
from swarm.status.status_page import StatusPage

HTML = "text/html; charset=utf-8"
JSON = "application/json; charset=utf-8"
LONGEST_PEER_ID = 64
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cross-Origin-Opener-Policy": "same-origin",
}
FOR_ALL_SITES = {"Access-Control-Allow-Origin": "*", "Cross-Origin-Resource-Policy": "cross-origin"}


class NotFound(Exception):
    """``key`` is the message that says what."""

    def __init__(self, key: str = "error.not_found") -> None:
        super().__init__(key)
        self.key = key


class BadParameter(Exception):
    """Its text is ours, never the reader's."""


class Answers:
    """Makes answers from the page's latest snapshot."""

    def __init__(self, page: StatusPage) -> None:
        self.page = page
        self._rendered = RenderedAnswers()

    async def donor(self, request: web.Request) -> tuple[NodeStatus, ...]:
        peer_id = request.match_info["peer_id"]
        nodes = await self.page.donor(peer_id) if len(peer_id) <= LONGEST_PEER_ID else ()
        if not nodes:
            raise NotFound("donor.unknown")
        return nodes

    async def html(
        self,
        request: web.Request,
        make: Callable[[Snapshot, str, bool], Awaitable[str]],
        query: object = None,
    ) -> web.Response:
        async def rendered() -> Rendered:
            text = await make(
                self.page.snapshot, request.match_info["language"], self.page.is_stale
            )
            return Rendered.of(text.encode(), HTML)

        return await self.rendered(request, (request.path, query), rendered)

    async def json(
        self, request: web.Request, make: Callable[[Snapshot], Any], query: object = None
    ) -> web.Response:
        async def rendered() -> Rendered:
            return json_rendered(make(self.page.snapshot))

        return await self.open_json(request, rendered, query)

    async def open_json(
        self, request: web.Request, make: Callable[[], Awaitable[Rendered]], query: object = None
    ) -> web.Response:
        answer = await self.rendered(request, (request.path, query), make)
        answer.headers.update(FOR_ALL_SITES)
        return answer

    async def rendered(
        self, request: web.Request, key: object, make: Callable[[], Awaitable[Rendered]]
    ) -> web.Response:
        version = (self.page.snapshot.version, self.page.is_stale)
        rendered = await self._rendered.get(version, key, make)
        headers = {
            "ETag": rendered.tag,
            "Cache-Control": "no-cache",
            "Vary": "Accept-Encoding",
        }
        if request.headers.get("If-None-Match") == rendered.tag:
            return web.Response(status=304, headers=headers)
        headers["Content-Type"] = rendered.content_type
        accepted = request.headers.get("Accept-Encoding", "")
        if rendered.compressed is not None and "gzip" in accepted:
            headers["Content-Encoding"] = "gzip"
            return web.Response(body=rendered.compressed, headers=headers)
        return web.Response(body=rendered.body, headers=headers)

    def problem(self, request: web.Request, status: int, code: str, key: str) -> web.Response:
        language = request.match_info.get("language")
        if language is None:
            language = negotiated(request.headers.get("Accept-Language", ""))
        if request.path.startswith("/api/"):
            message = self.page.pages.languages["en"].text(key)
            return json_answer(api.error_json(code, message), status)
        page = self.page.pages.error(self.page.snapshot, language, self.page.is_stale, key)
        return web.Response(status=status, body=page.encode(), headers={"Content-Type": HTML})


def json_rendered(value: Any) -> Rendered:
    return Rendered.of(json.dumps(value, ensure_ascii=False).encode(), JSON)


def json_answer(value: Any, status: int) -> web.Response:
    return web.Response(
        status=status,
        body=json.dumps(value).encode(),
        headers={"Content-Type": JSON, **FOR_ALL_SITES},
    )
