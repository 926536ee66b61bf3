"""The operator's door: HTTP with signed objects in, signed objects and proofs out.

Bodies of POST requests are envelopes in JSON, one per line. There are no passwords or sessions:
what may be done follows from who signed. docs/ledger.md lists the paths.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

from swarm.ledger.notes import decimal
from swarm.operator.books import Books
from swarm.operator.doors import OneThread, new_application, read_body
from swarm.operator.networks import networks_of
from swarm.operator.settings import OperatorSettings
from swarm.operator.settlement import MAX_VOUCHERS
from swarm.protocol.envelope import Envelope, parse_envelope
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.prices import CURRENT_EPOCH
from swarm.protocol.strict_json import MAX_INTEGER

EXPORT_LEAVES = 2000
MAX_EXPORTS = 4
TOTALS_LIFETIME_S = 10.0


class OperatorApi:
    """Handlers over books that belong to ``thread``."""

    def __init__(
        self,
        settings: OperatorSettings,
        books: Books,
        thread: OneThread,
        salt: bytes,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._books = books
        self._thread = thread
        self._salt = salt
        self._now = now
        self._exports = 0
        self._totals: tuple[float, dict[str, Any]] | None = None

    def application(self) -> web.Application:
        application = new_application()
        public = self._settings.folder / "public"
        (public / "tile").mkdir(parents=True, exist_ok=True)
        application.router.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/v1/terms", self._terms),
                web.post("/v1/allowances", self._allowances),
                web.post("/v1/settlements", self._settlements),
                web.post("/v1/enrolments", self._enrolments),
                web.post("/v1/orders", self._orders),
                web.post("/v1/verdicts", self._verdicts),
                web.post("/v1/revocations", self._revocations),
                web.post("/v1/rotations", self._rotations),
                web.get("/v1/accounts/{account}", self._account),
                web.get("/v1/nodes/{node}", self._node),
                web.get("/v1/quarantined", self._quarantined),
                web.get("/v1/validators", self._validators),
                web.get("/v1/nodes/{node}/evidence", self._evidence),
                web.get("/v1/proofs/{index}", self._proof),
                web.get("/v1/events/{event}", self._event),
                web.get("/v1/leaves/{index}", self._leaf),
                web.get("/v1/export", self._export),
                web.get("/v1/totals", self._totals_view),
                web.get("/checkpoint", self._checkpoint),
                web.static("/tile", public / "tile"),
            ]
        )
        return application

    # --- signed objects in ---
    async def _allowances(self, request: web.Request) -> web.Response:
        (sealed,) = await self._envelopes(request, 1)
        networks = networks_of(self._address(request), self._salt)
        issued = await self._thread.run(self._books.issue, sealed, networks, self._time())
        return web.Response(text=issued.to_json(), content_type="application/json")

    async def _settlements(self, request: web.Request) -> web.Response:
        settled, *vouchers = await self._envelopes(request, 1 + MAX_VOUCHERS)
        outcomes = await self._thread.run(self._books.settle, settled, vouchers, self._time())
        return web.json_response(
            {
                "outcomes": [
                    {"paid": outcome.paid_units, "code": int(outcome.code or 0)}
                    for outcome in outcomes
                ]
            }
        )

    async def _enrolments(self, request: web.Request) -> web.Response:
        enrolment, *rest = await self._envelopes(request, 2)
        certificate = rest[0] if rest else None
        index = await self._thread.run(self._books.enrol, enrolment, certificate, self._time())
        return web.json_response({"index": index})

    async def _orders(self, request: web.Request) -> web.Response:
        return await self._indexed(request, self._books.take_order)

    async def _revocations(self, request: web.Request) -> web.Response:
        return await self._indexed(request, self._books.revoke)

    async def _rotations(self, request: web.Request) -> web.Response:
        return await self._indexed(request, self._books.rotate)

    async def _verdicts(self, request: web.Request) -> web.Response:
        (sealed,) = await self._envelopes(request, 1)
        state = await self._thread.run(self._books.take_verdict, sealed, self._time())
        return web.json_response({"state": state})

    async def _indexed(
        self, request: web.Request, take: Callable[[Envelope, int], int]
    ) -> web.Response:
        (sealed,) = await self._envelopes(request, 1)
        return web.json_response({"index": await self._thread.run(take, sealed, self._time())})

    # --- the books and the log out ---
    async def _healthz(self, request: web.Request) -> web.Response:
        size = await self._thread.run(lambda: self._books.journal.size)
        return web.json_response({"log_size": size})

    async def _terms(self, request: web.Request) -> web.Response:
        """What clients and nodes must know and pin; nothing of it is secret."""
        policy = self._settings.policy
        return web.json_response(
            {
                "origin": policy.origin,
                "log_key": str(self._settings.log_verifier),
                "operator_key": policy.operator_key.hex(),
                "mint_keys": sorted(key.hex() for key in policy.mint_keys),
                "witnesses": [str(witness.key) for witness in self._settings.witnesses],
                "price_epoch": CURRENT_EPOCH,
                "nodes_per_allowance": policy.nodes_per_allowance,
                "anonymous_units": policy.anonymous_units,
                "grace_s": policy.grace_s,
                "minimum_node_age_s": policy.minimum_node_age_s,
            }
        )

    async def _account(self, request: web.Request) -> web.Response:
        before = decimal(request.query.get("before", str(MAX_INTEGER)))
        account = request.match_info["account"]
        return web.json_response(await self._thread.run(self._books.account, account, before))

    async def _node(self, request: web.Request) -> web.Response:
        node = await self._thread.run(self._books.node, request.match_info["node"])
        return web.json_response(node)

    async def _quarantined(self, request: web.Request) -> web.Response:
        """A page of nodes that validators shall look at again; ``after`` is the last one seen."""
        nodes = await self._thread.run(self._books.quarantined, request.query.get("after", ""))
        return web.json_response({"nodes": nodes})

    async def _validators(self, request: web.Request) -> web.Response:
        return web.json_response({"validators": await self._thread.run(self._books.validators)})

    async def _evidence(self, request: web.Request) -> web.Response:
        rows = await self._thread.run(self._books.evidence, request.match_info["node"])
        return web.json_response({"evidence": rows})

    async def _proof(self, request: web.Request) -> web.Response:
        index = decimal(request.match_info["index"])
        return web.Response(text=str(await self._thread.run(self._books.proof, index)))

    async def _event(self, request: web.Request) -> web.Response:
        index = await self._thread.run(self._books.index_of, request.match_info["event"])
        return web.json_response({"index": index})

    async def _leaf(self, request: web.Request) -> web.Response:
        leaf = await self._thread.run(self._books.leaf, decimal(request.match_info["index"]))
        return web.Response(body=leaf, content_type="application/json")

    async def _totals_view(self, request: web.Request) -> web.Response:
        now = time.monotonic()
        if self._totals is None or now - self._totals[0] > TOTALS_LIFETIME_S:
            self._totals = (now, await self._thread.run(self._books.totals))
        return web.json_response(self._totals[1])

    async def _checkpoint(self, request: web.Request) -> web.StreamResponse:
        path = self._settings.folder / "public" / "checkpoint"
        if not path.exists():
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "no checkpoint yet")
        return web.FileResponse(path, headers={"Cache-Control": "no-cache"})

    async def _export(self, request: web.Request) -> web.StreamResponse:
        """All leaves, one per line, from an index up to the size of the log at this moment."""
        start = decimal(request.query.get("from", "0"))
        end = await self._thread.run(lambda: self._books.journal.tree.size)
        if "to" in request.query:
            end = min(end, decimal(request.query["to"]))
        if self._exports >= MAX_EXPORTS:
            raise ProtocolError(ErrorCode.NO_CAPACITY, "too many exports at once")
        self._exports += 1
        try:
            response = web.StreamResponse(headers={"Content-Type": "application/jsonl"})
            await response.prepare(request)
            for first in range(start, end, EXPORT_LEAVES):
                last = min(end, first + EXPORT_LEAVES)
                leaves = await self._thread.run(self._books.journal.leaves, first, last)
                await response.write(b"".join(leaf + b"\n" for leaf in leaves))
            await response.write_eof()
            return response
        finally:
            self._exports -= 1

    async def _envelopes(self, request: web.Request, maximum: int) -> list[Envelope]:
        lines = (await read_body(request)).splitlines()
        if not 1 <= len(lines) <= maximum:
            raise ProtocolError(ErrorCode.BAD_FIELD, f"1 to {maximum} envelopes are expected")
        return [parse_envelope(line) for line in lines]

    def _address(self, request: web.Request) -> str:
        if self._settings.forwarded_header:
            # the last entry is our own proxy's; those before it are whatever the client wrote
            return request.headers.get(self._settings.forwarded_header, "").split(",")[-1].strip()
        return request.remote or ""

    def _time(self) -> int:
        return int(self._now())
