"""The page over HTTP: all routes, and what holds for every request.

Read-only: GET and HEAD, no cookies, no forms but searches. Pages carry a strict content security
policy; everything they need comes from here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from swarm.status import api
from swarm.status.live import event
from swarm.status.pages import STATIC_FILES
from swarm.status.rendered import Rendered
from swarm.status.status_page import StatusPage
from swarm.status.web_answers import HEADERS, Answers, BadParameter, NotFound, json_answer
from swarm.status.web_api import ApiRoutes
from swarm.status.web_pages import PageRoutes

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_application(page: StatusPage) -> web.Application:
    """All routes."""
    answers = Answers(page)
    site = _WebSite(answers)
    application = web.Application(middlewares=[site.around], client_max_size=1024)
    application.add_routes(PageRoutes(answers).routes())
    application.add_routes(ApiRoutes(answers).routes())
    application.add_routes(site.routes())
    application.on_shutdown.append(site.close)
    return application


class _WebSite:
    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._page = answers.page
        self._streams: set[asyncio.Task[Any]] = set()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/static/{name}", self.static),
            web.get("/favicon.ico", self.favicon),
            web.get("/events", self.events),
            web.get("/metrics", self.metrics),
            web.get("/healthz", self.healthz),
        ]

    @web.middleware
    async def around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        started_s = time.perf_counter()
        try:
            answer = await handler(request)
        except NotFound as problem:
            answer = self._answers.problem(request, 404, "not_found", problem.key)
        except BadParameter as problem:
            answer = json_answer(api.error_json("bad_parameter", str(problem)), 400)
        except web.HTTPNotFound:
            answer = self._answers.problem(request, 404, "not_found", "error.not_found")
        except web.HTTPException as problem:  # a redirect, or a method that is not allowed
            answer = web.Response(status=problem.status, headers=_kept(problem))
        except (asyncio.CancelledError, ConnectionError):
            raise  # the reader has left
        except Exception:
            log.exception("a page could not be made")
            answer = web.Response(status=500, text="Something went wrong here.\n")
        route = _route(request)
        self._page.metrics.request_done(route, answer.status, time.perf_counter() - started_s)
        if not answer.prepared:
            answer.headers.update(HEADERS)
        return answer

    async def close(self, _: web.Application) -> None:
        """End the streams of events, which would otherwise never end."""
        for stream in tuple(self._streams):
            stream.cancel()

    async def static(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name not in STATIC_FILES:
            raise NotFound

        async def make() -> Rendered:
            return Rendered.of(self._page.pages.static[name], STATIC_FILES[name])

        answer = await self._answers.rendered(request, request.path, make)
        answer.headers["Cache-Control"] = "public, max-age=86400"
        return answer

    async def favicon(self, _: web.Request) -> web.StreamResponse:
        return web.Response(status=301, headers={"Location": "/static/mark.svg"})

    async def events(self, request: web.Request) -> web.StreamResponse:
        live = self._page.live
        if live.is_full:
            return json_answer(api.error_json("busy", "too many readers; ask again later"), 503)
        answer = web.StreamResponse(
            headers={
                **HEADERS,
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
        )
        task = asyncio.current_task()
        if task is not None:
            self._streams.add(task)
            task.add_done_callback(self._streams.discard)
        live.readers += 1
        try:
            await answer.prepare(request)
            known = self._page.snapshot.version
            await answer.write(b"retry: 5000\n\n")
            while True:
                version = await live.next_version(known)
                known = known if version is None else version
                await answer.write(event(version))
        except ConnectionError:
            return answer
        finally:
            live.readers -= 1

    async def metrics(self, _: web.Request) -> web.StreamResponse:
        return web.Response(
            body=self._page.metrics.text(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def healthz(self, _: web.Request) -> web.StreamResponse:
        """Whether the page does its work; that the swarm is silent is not the page's fault."""
        looking = self._page.snapshot.version > 0
        return json_answer({"status": "ok" if looking else "starting"}, 200 if looking else 503)


def _route(request: web.Request) -> str:
    """The pattern of the address: few, whatever readers ask for."""
    resource = request.match_info.route.resource
    return "other" if resource is None else resource.canonical


def _kept(problem: web.HTTPException) -> dict[str, str]:
    names = ("Allow", "Location")
    return {name: problem.headers[name] for name in names if name in problem.headers}
