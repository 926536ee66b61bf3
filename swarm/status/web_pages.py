"""The pages, in every language, with what belongs to each donor."""

from __future__ import annotations

from functools import partial

from aiohttp import web

from swarm.status.feed import incident_feed
from swarm.status.history import DAY, MONTH
from swarm.status.languages import LANGUAGES, negotiated
from swarm.status.pages import SHOWN_DAYS
from swarm.status.queries import NodeQuery
from swarm.status.rendered import Rendered
from swarm.status.rows import DAY_S
from swarm.status.snapshot import Snapshot
from swarm.status.web_answers import FOR_ALL_SITES, Answers, NotFound

SVG = "image/svg+xml; charset=utf-8"
ATOM = "application/atom+xml; charset=utf-8"
LANGUAGE = "/{language:" + "|".join(LANGUAGES) + "}"


class PageRoutes:
    """Handlers of the pages."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._page = answers.page
        self._pages = answers.page.pages

    def routes(self) -> list[web.RouteDef]:
        own = (
            ("/", self.overview),
            ("/models/{revision:[0-9a-f]{1,128}}", self.model),
            ("/nodes", self.nodes),
            ("/donors", self.donors),
            ("/donors/{peer_id}", self.donor),
            ("/donors/{peer_id}/badge.svg", self.badge),
            ("/donors/{peer_id}/certificate", self.certificate),
            ("/incidents", self.incidents),
            ("/incidents.atom", self.feed),
            ("/about", self.about),
        )
        plain = ("/", "/nodes", "/donors", "/incidents", "/about")
        return [
            *(web.get(LANGUAGE + path, handler) for path, handler in own),
            *(web.get(path, self.choose_language) for path in plain),
        ]

    async def choose_language(self, request: web.Request) -> web.StreamResponse:
        code = negotiated(request.headers.get("Accept-Language", ""))
        return web.Response(
            status=302,
            headers={
                "Location": f"/{code}{request.rel_url}",
                "Vary": "Accept-Language",
                "Cache-Control": "no-cache",
            },
        )

    async def overview(self, request: web.Request) -> web.StreamResponse:
        async def make(snapshot: Snapshot, code: str, stale: bool) -> str:
            histories = [await self._page.history("", of) for of in (DAY, MONTH)]
            return self._pages.overview(snapshot, code, stale, histories)

        return await self._answers.html(request, make)

    async def model(self, request: web.Request) -> web.StreamResponse:
        revision = request.match_info["revision"]

        async def make(snapshot: Snapshot, code: str, stale: bool) -> str:
            model = snapshot.model(revision)
            if model is None:
                raise NotFound("model.unknown")
            histories = [await self._page.history(revision, of) for of in (DAY, MONTH)]
            return self._pages.model(snapshot, code, stale, model, histories)

        return await self._answers.html(request, make)

    async def nodes(self, request: web.Request) -> web.StreamResponse:
        query = NodeQuery.of(request.query)

        async def make(snapshot: Snapshot, code: str, stale: bool) -> str:
            return self._pages.nodes(snapshot, code, stale, query)

        return await self._answers.html(request, make, query)

    async def donors(self, request: web.Request) -> web.StreamResponse:
        async def make(snapshot: Snapshot, code: str, stale: bool) -> str:
            return self._pages.donors(snapshot, code, stale, self._page.settled)

        return await self._answers.html(request, make)

    async def donor(self, request: web.Request) -> web.StreamResponse:
        async def make(snapshot: Snapshot, code: str, stale: bool) -> str:
            nodes = await self._answers.donor(request)
            first_day = int(snapshot.taken_unix_s) // DAY_S - SHOWN_DAYS
            days = await self._page.work_by_day(nodes[0].peer_id, first_day)
            return self._pages.donor(snapshot, code, stale, nodes, days)

        return await self._answers.html(request, make)

    async def certificate(self, request: web.Request) -> web.StreamResponse:
        async def make(snapshot: Snapshot, code: str, stale: bool) -> str:
            return self._pages.certificate(
                snapshot, code, stale, await self._answers.donor(request)
            )

        return await self._answers.html(request, make)

    async def incidents(self, request: web.Request) -> web.StreamResponse:
        async def make(snapshot: Snapshot, code: str, stale: bool) -> str:
            return self._pages.incidents(snapshot, code, stale)

        return await self._answers.html(request, make)

    async def about(self, request: web.Request) -> web.StreamResponse:
        async def make(snapshot: Snapshot, code: str, stale: bool) -> str:
            return self._pages.about(snapshot, code, stale)

        return await self._answers.html(request, make)

    async def badge(self, request: web.Request) -> web.StreamResponse:
        code = request.match_info["language"]

        async def make() -> Rendered:
            nodes = await self._answers.donor(request)
            return Rendered.of(self._pages.badge(code, nodes).encode(), SVG)

        answer = await self._answers.rendered(request, request.path, make)
        answer.headers.update(FOR_ALL_SITES)
        answer.headers["Cache-Control"] = "public, max-age=300"
        return answer

    async def feed(self, request: web.Request) -> web.StreamResponse:
        language = self._pages.languages[request.match_info["language"]]

        async def make() -> Rendered:
            body = incident_feed(
                self._page.snapshot,
                language,
                self._pages.swarm_name,
                self._pages.origin,
                partial(self._pages.incident_text, language=language),
            )
            return Rendered.of(body, ATOM)

        return await self._answers.rendered(request, request.path, make)
