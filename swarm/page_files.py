"""Web pages that are a few files of a package, with headers that allow them nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources

from aiohttp import web

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
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class PageFiles:
    """Read once; browsers ask again each time, and mostly hear that nothing changed."""

    def __init__(self, package: str, files: Mapping[str, tuple[str, str]]) -> None:
        """``files``: by path, the name in the package's folder ``page`` and the content type."""
        folder = resources.files(package) / "page"
        self._contents = {
            path: ((folder / name).read_bytes(), kind) for path, (name, kind) in files.items()
        }

    def routes(self) -> list[web.RouteDef]:
        return [web.get(path, self._handler(path)) for path in self._contents]

    def _handler(self, path: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        content, kind = self._contents[path]
        tag = hashlib.sha256(content).hexdigest()[:16]

        async def serve(request: web.Request) -> web.StreamResponse:
            headers = {**HEADERS, "ETag": f'"{tag}"'}
            if any(known.value == tag for known in request.if_none_match or ()):
                return web.Response(status=304, headers=headers)
            return web.Response(body=content, content_type=kind, charset="utf-8", headers=headers)

        return serve
