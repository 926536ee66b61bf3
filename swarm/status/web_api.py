"""The JSON API; ``openapi.json`` describes it, and is published with it."""

from __future__ import annotations

import json
from importlib.resources import files

from aiohttp import web

from swarm.status import api
from swarm.status.history import DAY, RANGES
from swarm.status.rendered import Rendered
from swarm.status.web_answers import Answers, BadParameter, NotFound, json_rendered

MOST_OFFSET = 1_000_000
LONGEST_REVISION = 64


class ApiRoutes:
    """Handlers of the API."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._page = answers.page
        schema = files("swarm.status") / "openapi.json"
        self._schema = json.loads(schema.read_text(encoding="utf-8"))

    def routes(self) -> list[web.RouteDef]:
        own = (
            ("openapi.json", self.schema),
            ("status", self.status),
            ("models", self.models),
            ("nodes", self.nodes),
            ("donors", self.donors),
            ("donors/{peer_id}", self.donor),
            ("incidents", self.incidents),
            ("history", self.history),
        )
        return [web.get(f"/api/v1/{path}", handler) for path, handler in own]

    async def schema(self, request: web.Request) -> web.StreamResponse:
        return await self._answers.json(request, lambda _: self._schema)

    async def status(self, request: web.Request) -> web.StreamResponse:
        return await self._answers.json(
            request,
            lambda snapshot: api.status_json(
                snapshot, self._page.pages.swarm_name, self._page.now_unix_s
            ),
        )

    async def models(self, request: web.Request) -> web.StreamResponse:
        return await self._answers.json(
            request, lambda snapshot: api.models_json(snapshot, self._page.now_unix_s)
        )

    async def nodes(self, request: web.Request) -> web.StreamResponse:
        model = _model_parameter(request)
        offset = _whole_parameter(request, "offset", 0, 0, MOST_OFFSET)
        limit = _whole_parameter(request, "limit", 100, 1, api.MOST_NODES)
        return await self._answers.json(
            request,
            lambda snapshot: api.nodes_json(
                snapshot, self._page.now_unix_s, model=model, offset=offset, limit=limit
            ),
            (model, offset, limit),
        )

    async def donors(self, request: web.Request) -> web.StreamResponse:
        return await self._answers.json(
            request, lambda snapshot: api.donors_json(snapshot, self._page.settled)
        )

    async def donor(self, request: web.Request) -> web.StreamResponse:
        async def make() -> Rendered:
            nodes = await self._answers.donor(request)
            days = await self._page.work_by_day(nodes[0].peer_id, 0)
            return json_rendered(api.donor_json(nodes, days))

        return await self._answers.open_json(request, make)

    async def incidents(self, request: web.Request) -> web.StreamResponse:
        return await self._answers.json(request, api.incidents_json)

    async def history(self, request: web.Request) -> web.StreamResponse:
        model = _model_parameter(request)
        wanted = request.query.get("range", DAY.name)
        if wanted not in RANGES:
            raise BadParameter("range is day or month")
        if model and self._page.snapshot.model(model) is None:
            raise NotFound("model.unknown")

        async def make() -> Rendered:
            history = await self._page.history(model, RANGES[wanted])
            return json_rendered(api.history_json(history))

        return await self._answers.open_json(request, make, (model, wanted))


def _model_parameter(request: web.Request) -> str:
    model = request.query.get("model", "")
    if len(model) > LONGEST_REVISION or set(model) - set("0123456789abcdef"):
        raise BadParameter("model is a revision in hexadecimal digits")
    return model


def _whole_parameter(request: web.Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise BadParameter(f"{name} is a whole number from {least} to {most}")
    return int(text)
