"""The page over HTTP: what it shows, what it never shows, and what it answers to nonsense."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
from prometheus_client.parser import text_string_to_metric_families

from swarm.protocol.records import NodeState
from swarm.simulation.announced import AnnouncedSwarm
from swarm.status.languages import LANGUAGES
from swarm.status.plain_text import ADDRESS
from swarm.virtual_time import LoopClock
from tests.integration.status.conftest import HOSTILE, Site, hostile_swarm, running_site

VOID = {"meta", "link", "img", "input", "br"}
SHAPES = {"path", "circle", "line", "polyline", "polygon", "rect"}
WORDS = (
    "html head title body a header div small nav ul li main p h1 h2 h3 dl dt dd section span bdi ol"
    " b pre table thead tbody tr th td figure figcaption svg text g footer script form label select"
    " option button strong code article"
)
ALLOWED_TAGS = VOID | SHAPES | set(WORDS.split())
WEIGHT_BYTES = 200_000


class Outline(HTMLParser):
    """Tags, attributes and scripts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name in ("href", "src", "action"):
                self.links.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outline_of(page: str) -> Outline:
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    return outline


def paths_of(site: Site) -> list[str]:
    snapshot = site.page.snapshot
    peers = [node.peer_id for node in snapshot.nodes[: len(HOSTILE)]]
    own = ["/", "/nodes", "/donors", "/incidents", "/about"]
    own += [f"/models/{model.revision}" for model in snapshot.models]
    own += [f"/donors/{peer}{part}" for peer in peers for part in ("", "/certificate")]
    own += ["/nodes?q=%3Cscript%3E&sort=speed", "/nodes?q=%22%3E%3Csvg%20onload%3D1%3E&page=99"]
    return own


async def test_hostile_names_stay_text_on_every_page(tmp_path: Path) -> None:
    async with running_site(hostile_swarm(12), tmp_path) as site:
        await site.looked(3)  # with a probe
        for code in LANGUAGES:
            for path in paths_of(site):
                status, page = await site.get(f"/{code}{path}")
                assert status == 200, path
                outline = outline_of(page)
                assert outline.tags <= ALLOWED_TAGS, path
                assert not any(name.startswith("on") for name in outline.attributes)
                assert "style" not in outline.attributes
                assert page.count("<script") == 1, path
                assert all(link.startswith(("/", "#")) for link in outline.links), path
                assert len(page.encode()) < WEIGHT_BYTES
                assert "49}}" not in page
                assert "swarm-node join $(" not in page


async def test_nothing_published_has_an_address(tmp_path: Path) -> None:
    swarm = hostile_swarm(12)
    async with running_site(swarm, tmp_path) as site:
        await site.looked(3)
        addresses = [address for record in swarm.records for address in record.addresses]
        assert len(addresses) == 12  # they are announced all the same
        texts = [
            (await site.get(path))[1]
            for path in (
                *(f"/{code}{path}" for code in LANGUAGES for path in paths_of(site)),
                *(f"/{code}/incidents.atom" for code in LANGUAGES),
                *(f"/en/donors/{node.peer_id}/badge.svg" for node in site.page.snapshot.nodes),
                "/api/v1/status",
                "/api/v1/models",
                "/api/v1/nodes?limit=500",
                "/api/v1/donors",
                f"/api/v1/donors/{site.page.snapshot.nodes[0].peer_id}",
                "/api/v1/incidents",
                "/api/v1/history",
                "/metrics",
                "/healthz",
            )
        ]
        for text in texts:
            found = ADDRESS.search(re.sub(r"swarm_\w+|T\d\d:\d\d:\d\dZ", "", text))
            assert found is None, text[found.start() - 80 : found.end() + 80] if found else ""
            assert "/ip4/" not in text
            assert "quick brown fox" not in text  # what probes ask


# --- JSON ----------------------------------------------------------------------------------------
def schema_of(document: dict[str, Any], path: str, status: int) -> dict[str, Any]:
    answer = document["paths"][path]["get"]["responses"][str(status)]
    schema: dict[str, Any] = answer["content"]["application/json"]["schema"]
    return {**schema, "components": document["components"]}


def cases(site: Site) -> Iterator[tuple[str, str, int]]:
    revision = site.page.snapshot.models[0].revision
    peer = site.page.snapshot.nodes[0].peer_id
    for path in ("status", "models", "donors", "incidents"):
        yield f"/api/v1/{path}", f"/api/v1/{path}", 200
    yield "/api/v1/nodes", f"/api/v1/nodes?model={revision}&offset=3&limit=5", 200
    yield "/api/v1/nodes", "/api/v1/nodes?limit=501", 400
    yield "/api/v1/nodes", "/api/v1/nodes?offset=-1", 400
    yield "/api/v1/nodes", "/api/v1/nodes?model=<script>", 400
    yield "/api/v1/donors/{peer_id}", f"/api/v1/donors/{peer}", 200
    yield "/api/v1/donors/{peer_id}", "/api/v1/donors/nobody", 404
    yield "/api/v1/history", f"/api/v1/history?model={revision}&range=month", 200
    yield "/api/v1/history", "/api/v1/history?range=year", 400
    yield "/api/v1/history", "/api/v1/history?model=ff", 404


async def test_every_answer_fits_the_published_schema(tmp_path: Path) -> None:
    async with running_site(hostile_swarm(12), tmp_path) as site:
        await site.looked(3)
        document = json.loads((await site.get("/api/v1/openapi.json"))[1])
        for path, address, expected in cases(site):
            status, text = await site.get(address)
            assert status == expected, address
            jsonschema.validate(json.loads(text), schema_of(document, path, status))


async def test_pages_of_nodes_are_complete_and_do_not_overlap(tmp_path: Path) -> None:
    async with running_site(AnnouncedSwarm.of(130, LoopClock()), tmp_path) as site:
        found: list[str] = []
        for offset in range(0, 200, 50):
            text = (await site.get(f"/api/v1/nodes?offset={offset}&limit=50"))[1]
            found += [node["peer_id"] for node in json.loads(text)["nodes"]]
        assert sorted(found) == sorted(node.peer_id for node in site.page.snapshot.nodes)
        shown: list[str] = []
        for number in (1, 2, 3):
            page = (await site.get(f"/en/nodes?page={number}"))[1]
            shown += re.findall(r'href="/en/donors/(\w+)"', page)
        assert sorted(shown) == sorted(found)


# --- over HTTP -----------------------------------------------------------------------------------
async def test_headers_keep_everything_else_out(tmp_path: Path) -> None:
    async with running_site(AnnouncedSwarm.of(5, LoopClock()), tmp_path) as site:
        for path in ("/en/", "/nope", "/api/v1/status", "/en/donors/x/badge.svg"):
            async with site.reader.get(site.url + path) as answer:
                policy = answer.headers["Content-Security-Policy"]
                assert policy.startswith("default-src 'none'")
                assert "unsafe" not in policy
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert "Set-Cookie" not in answer.headers


async def test_language_is_negotiated_and_can_be_chosen(tmp_path: Path) -> None:
    async with running_site(AnnouncedSwarm.of(5, LoopClock()), tmp_path) as site:
        async with site.reader.get(
            site.url + "/nodes?sort=speed",
            headers={"Accept-Language": "sw, en;q=0.5"},
            allow_redirects=False,
        ) as answer:
            assert answer.status == 302
            assert answer.headers["Location"] == "/sw/nodes?sort=speed"
        assert 'lang="hi"' in (await site.get("/hi/"))[1]


NOWHERE = (
    "/en/donors/" + "x" * 5000,
    "/en/models/" + "f" * 64,
    "/en/donors/%00",
    "/en/donors/%ff%fe",
    "/xx/",
    "/static/..%2f..%2fopenapi.json",
    "/static/secret",
    "/en/donors/..%2f..",
    "/api/v2/status",
)


async def test_what_is_not_there_is_said_to_be_not_there(tmp_path: Path) -> None:
    async with running_site(AnnouncedSwarm.of(3, LoopClock()), tmp_path) as site:
        for path in NOWHERE:
            status, text = await site.get(path)
            assert status == 404, path
            assert "Traceback" not in text


async def test_other_methods_are_refused(tmp_path: Path) -> None:
    async with (
        running_site(AnnouncedSwarm.of(3, LoopClock()), tmp_path) as site,
        site.reader.post(site.url + "/en/", data=b"x" * 100) as answer,
    ):
        assert answer.status == 405


async def test_an_unchanged_page_is_not_sent_again_and_a_page_is_compressed(
    tmp_path: Path,
) -> None:
    async with running_site(AnnouncedSwarm.of(3, LoopClock()), tmp_path, period_s=300) as site:
        async with site.reader.get(site.url + "/en/about") as answer:
            assert answer.headers["Content-Encoding"] == "gzip"
            tag = answer.headers["ETag"]
            assert len(gzip.compress(await answer.read())) < 20_000
        async with site.reader.get(site.url + "/en/about", headers={"If-None-Match": tag}) as again:
            assert again.status == 304


async def test_readers_hear_of_a_new_look_and_leave_nothing_behind(tmp_path: Path) -> None:
    async with running_site(AnnouncedSwarm.of(3, LoopClock()), tmp_path) as site:
        async with site.reader.get(site.url + "/events") as answer:
            assert answer.content_type == "text/event-stream"
            heard = b""
            async with asyncio.timeout(10):
                while heard.count(b"event: snapshot\n") < 2:
                    heard += await answer.content.readany()
            assert site.page.live.readers == 1
        async with asyncio.timeout(10):
            while site.page.live.readers:
                await site.page.live.next_version(site.page.snapshot.version)


async def test_metrics_have_types_and_help(tmp_path: Path) -> None:
    async with running_site(hostile_swarm(12), tmp_path) as site:
        text = (await site.get("/metrics"))[1]
        families = {family.name: family for family in text_string_to_metric_families(text)}
        for name, kind in (
            ("swarm_volunteers_online", "gauge"),
            ("swarm_model_least_replicas", "gauge"),
            ("swarm_tokens", "counter"),
            ("swarm_status_requests", "counter"),
            ("swarm_status_request_seconds", "histogram"),
        ):
            assert families[name].type == kind
            assert families[name].documentation
        assert families["swarm_volunteers_online"].samples[0].value == 12


async def test_the_feed_is_atom_and_tells_of_missing_blocks(tmp_path: Path) -> None:
    swarm = AnnouncedSwarm.of(3, LoopClock(), number_of_blocks=32)
    for record in swarm.records:
        swarm.change(
            record.peer_id,
            replace(record, first_block=0, end_block=20, state=NodeState.ONLINE),
        )
    async with running_site(swarm, tmp_path, public_url="https://status.example.org") as site:
        text = (await site.get("/en/incidents.atom"))[1]
        feed = ElementTree.fromstring(text)  # noqa: S314 (made by the page under test)
        atom = "{http://www.w3.org/2005/Atom}"
        entry = feed.find(f"{atom}entry")
        assert entry is not None
        assert "nobody serves blocks 20-31" in (entry.findtext(f"{atom}title") or "")
        assert (entry.findtext(f"{atom}id") or "").startswith("urn:uuid:")
        page = (await site.get("/en/"))[1]
        assert "--blocks 20:32 --peers &#34;$SWARM_PEERS&#34;" in page


class LaterClock(LoopClock):
    """Real time, and what a test adds to it."""

    later_s = 0.0

    def unix_s(self) -> float:
        return super().unix_s() + self.later_s


async def test_old_figures_carry_a_banner(tmp_path: Path) -> None:
    clock = LaterClock()
    swarm = AnnouncedSwarm.of(4, LoopClock())
    async with running_site(swarm, tmp_path, clock=clock, period_s=300.0) as site:
        assert "banner" not in (await site.get("/en/"))[1]
        assert '"stale": false' in (await site.get("/api/v1/status"))[1]
        clock.later_s = 3 * 300.0
        assert "These figures are old. Nothing was heard" in (await site.get("/en/"))[1]
        assert "Ces chiffres sont anciens" in (await site.get("/fr/nodes"))[1]
        assert '"stale": true' in (await site.get("/api/v1/status"))[1]
