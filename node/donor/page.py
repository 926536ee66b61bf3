"""The owner's page: a small web server on loopback that passes the owner's clicks to the node.

A process of its own, so that the node carries none of it; it speaks to the node through the
control socket, which only its user can open. Other users of the computer can connect to the port,
and web pages can point names at it: so every call needs a token that is in the address which the
command prints (behind ``#``, so that it is in no log and no Referer), and the Host must be ours.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from swarm.node.control import running_node
from swarm.page_files import HEADERS, PageFiles
from swarm.protocol.errors import ConfigError, UsageError

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MAXIMUM_BODY_BYTES = 16 * 1024
BODY_TIMEOUT_S = 10.0
COMMANDS = {"pause": "for_s", "resume": None, "limits": "changes", "drain": None}
OWNER_PAGE = {
    "/": ("owner.html", "text/html"),
    "/page/owner.css": ("owner.css", "text/css"),
    "/page/owner.js": ("owner.js", "text/javascript"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def run_page(identity_file: Path, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; ``ready`` gets the address with the token in it."""
    token = secrets.token_urlsafe(32)
    page = OwnerPage(identity_file, token)
    runner = web.AppRunner(
        page.application(), access_log=None, keepalive_timeout=BODY_TIMEOUT_S, shutdown_timeout=1.0
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, LOOPBACK, port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on port {port} ({error.strerror}); choose another by --port"
            ) from None
        own_port = int(runner.addresses[0][1])
        page.hosts = {f"{name}:{own_port}" for name in (LOOPBACK, "localhost")}
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        ready(f"http://{LOOPBACK}:{own_port}/#{token}")
        await stop.wait()
    finally:
        await runner.cleanup()


class OwnerPage:
    """The routes."""

    def __init__(self, identity_file: Path, token: str) -> None:
        self._identity_file = identity_file
        self._token = token
        self.hosts: set[str] = set()
        """As which browsers may know us, with the port."""

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._around], client_max_size=MAXIMUM_BODY_BYTES)
        app.add_routes(PageFiles("swarm.node.donor", OWNER_PAGE).routes())
        app.add_routes(
            [web.get("/api/owner", self._owner), web.post("/api/{command}", self._command)]
        )
        return app

    @web.middleware
    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.host not in self.hosts:
            return _refusal(403, "this page does not answer to that name")
        if request.path.startswith("/api/"):
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self._token.encode()):
                return _refusal(401, "open the address that swarm-node page printed")
        try:
            return await handler(request)
        except (UsageError, ConfigError) as error:
            return _refusal(409, str(error))
        except web.HTTPException as error:
            return _refusal(error.status, error.reason or "refused")

    async def _owner(self, request: web.Request) -> web.StreamResponse:
        return await self._ask("owner", {})

    async def _command(self, request: web.Request) -> web.StreamResponse:
        command = request.match_info["command"]
        if command not in COMMANDS:
            return _refusal(404, "no such command")
        if request.content_type != "application/json":
            return _refusal(415, "the body must be application/json")
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = json.loads(await request.read())
        except TimeoutError:
            return _refusal(408, "the body came too slowly")
        except (ValueError, RecursionError):
            return _refusal(400, "the body is no JSON")
        name = COMMANDS[command]
        if not isinstance(body, dict) or set(body) - {name}:
            return _refusal(400, "the body has fields that are not known")
        return await self._ask(command, body)

    async def _ask(self, command: str, details: dict[str, Any]) -> web.StreamResponse:
        def ask() -> dict[str, Any] | None:
            with running_node(self._identity_file) as node:
                if command == "drain":
                    node.ask_owner("drain")
                    return node.ask_owner("owner")
                return node.ask_owner(command, **details)

        answer = await asyncio.to_thread(ask)
        if answer is None:
            return _refusal(409, "the node has ended")
        return web.json_response(answer, headers=HEADERS | {"Cache-Control": "no-store"})


def _refusal(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status, headers=HEADERS)
