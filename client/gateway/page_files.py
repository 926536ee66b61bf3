"""The chat page: a few files of this package, with headers that allow them nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources

from aiohttp import web

FILES = {
    "/": ("chat.html", "text/html"),
    "/page/chat.css": ("chat.css", "text/css"),
    "/page/chat.js": ("chat.js", "text/javascript"),
    "/page/markdown.js": ("markdown.js", "text/javascript"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-cache",
}


class PageFiles:
    """Read once; browsers ask again each time, and mostly hear that nothing changed."""

    def __init__(self) -> None:
        folder = resources.files(__package__) / "page"
        self._contents = {
            path: ((folder / name).read_bytes(), kind) for path, (name, kind) in FILES.items()
        }

    def routes(self) -> list[web.RouteDef]:
        return [web.get(path, self._handler(path)) for path in FILES]

    def _handler(self, path: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        content, kind = self._contents[path]
        tag = hashlib.sha256(content).hexdigest()[:16]

        async def serve(request: web.Request) -> web.StreamResponse:
            headers = {**HEADERS, "ETag": f'"{tag}"'}
            if any(known.value == tag for known in request.if_none_match or ()):
                return web.Response(status=304, headers=headers)
            return web.Response(body=content, content_type=kind, charset="utf-8", headers=headers)

        return serve
