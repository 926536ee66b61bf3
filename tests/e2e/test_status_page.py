"""The status page as its readers meet it: the command, three real nodes, a real browser."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import expect

from scripts.local_status_page import LocalStatusPage
from scripts.local_swarm import LocalSwarm, Span, SwarmPlan
from swarm.status.languages import LANGUAGES
from swarm.status.plain_text import ADDRESS
from tests.e2e.browser import PHONE, Visit, visit

PERIOD_S = 5.0
LOOK_S = 2.0
"""What a look, and a browser that fetches the page again, may take on a busy machine."""
ANNOUNCE_PERIOD_S = 10
SPANS = (Span(0, 10), Span(10, 20), Span(20, 30))
DECLARED = {
    "SWARM_NODE_COUNTRY": "KE",
    "SWARM_NODE_ORGANISATION": "University of Nairobi",
    "SWARM_NODE_DECLARED_WATTS": "65",
    "SWARM_NODE_ANNOUNCE_PERIOD_S": str(ANNOUNCE_PERIOD_S),
}
HEAVIEST_PAGE_BYTES = 200_000
PATIENCE_MS = 60_000


class StatusOfThree:
    """The swarm, and its page, which may be started again."""

    def __init__(self, swarm: LocalSwarm, model: Path, folder: Path) -> None:
        self.swarm = swarm
        self._options = ("--probe", str(model), "--period", str(PERIOD_S), "--probe-period", "10")
        self._folder = folder
        self.site = self._start()

    def _start(self) -> LocalStatusPage:
        site = LocalStatusPage(self.swarm.peers, self._folder, *self._options)
        return site.__enter__()

    def restart(self) -> None:
        assert self.site.stop() == 0, self.site.log
        self.site = self._start()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.site.url + path, timeout=10) as reply:  # noqa: S310
            return json.loads(reply.read())

    def until(self, condition: Callable[[Any], bool], within_s: float) -> Any:
        """The first status that fulfils the condition."""
        deadline_s = time.monotonic() + within_s
        while True:
            status = self.get("/api/v1/status")
            if condition(status):
                return status
            assert time.monotonic() < deadline_s, f"not in time: {status}\n{self.site.log}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def three(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StatusOfThree]:
    plan = SwarmPlan(smollm2_path, SPANS, environment=DECLARED)
    with LocalSwarm(plan) as swarm:
        three = StatusOfThree(swarm, smollm2_path, tmp_path_factory.mktemp("status"))
        try:
            three.until(lambda status: status["volunteers"]["online"] == 3, 30)
            yield three
            assert "Traceback" not in three.site.log
        finally:
            three.site.stop()


async def is_fine(here: Visit) -> None:
    """Accessible, light, no other host, and nothing hangs over."""
    assert await here.violations() == []
    assert await here.overflow_px() <= 0
    assert len(here.hosts) == 1
    assert here.loaded_bytes < HEAVIEST_PAGE_BYTES


async def test_the_page_of_three_nodes_with_a_probe(three: StatusOfThree) -> None:
    async with visit(three.site.url + "/en/") as here:
        cells = here.page.locator(".blocks li")
        assert await cells.count() == 30
        assert (await cells.first.inner_text()).split() == ["1", "0"]
        await expect(here.page.locator(".join").first).to_have_text(
            'swarm-node join SmolLM2-135M-Instruct --blocks 0:30 --peers "$SWARM_PEERS"'
        )
        # By live updates alone: the probe comes while the page is open.
        probed = here.page.locator(".speed tbody tr").nth(1).locator("td").first
        await expect(probed).not_to_have_text("–", timeout=PATIENCE_MS)  # noqa: RUF001
        await expect(here.page.locator("main")).to_contain_text("node-1 → node-2 → node-3")
        await is_fine(here)
        await here.picture("status-overview")


async def test_every_page_in_every_language_light_and_dark(three: StatusOfThree) -> None:
    revision = three.get("/api/v1/models")["models"][0]["revision"]
    for code, scheme in zip(LANGUAGES, ("light", "dark", "light", "dark"), strict=True):
        async with visit(f"{three.site.url}/{code}/", color_scheme=scheme) as here:
            assert await here.page.get_attribute("html", "lang") == code
            for path in ("/", "/nodes", "/donors", "/incidents", "/about", f"/models/{revision}"):
                here.loaded_bytes = 0
                await here.page.goto(f"{three.site.url}/{code}{path}")
                await is_fine(here)
                if path in ("/", "/nodes"):
                    await here.picture(f"status-{code}-{scheme}{path.replace('/', '-')}")


async def test_a_donor_with_badge_and_certificate(three: StatusOfThree) -> None:
    # Probes were served by all three: by now they have announced tokens and energy.
    three.until(lambda status: status["work_announced"]["today"]["energy_j"] > 0, 60)
    async with visit(three.site.url + "/en/nodes") as here:
        await here.page.click("text=node-2")
        await expect(here.page.locator("h1")).to_have_text("Contribution of node-2")
        main = here.page.locator("main")
        await expect(main).to_contain_text("University of Nairobi · Kenya (as declared)")
        await expect(main).to_contain_text("by declared power")
        badge = here.page.locator("img")
        assert await badge.evaluate("image => image.complete && image.naturalWidth > 100")
        await is_fine(here)
        await here.picture("status-donor")
        await here.page.click("text=Open the printable certificate")
        await expect(here.page.locator(".certificate .name")).to_have_text("node-2")
        await is_fine(here)
        await here.page.emulate_media(media="print")
        await expect(here.page.locator("header")).to_be_hidden()
        printed = await here.page.pdf(prefer_css_page_size=True)
        assert len(re.findall(rb"/Type /Page\b", printed)) == 1
        await here.picture("status-certificate")


async def test_on_a_phone_and_without_scripts(three: StatusOfThree) -> None:
    for name, options in (("phone", PHONE), ("no-script", {"java_script_enabled": False})):
        async with visit(three.site.url + "/hi/", **options) as here:
            assert await here.page.locator(".blocks li").count() == 30
            if name == "phone":
                await is_fine(here)
            await here.picture(f"status-{name}")
            await here.page.click("nav a[href='/hi/nodes']")
            assert await here.page.locator("tbody tr").count() == 3
            await here.page.fill("#find", "node-3")
            await here.page.click("form button")
            assert await here.page.locator("tbody tr").count() == 1
            if name == "phone":
                await is_fine(here)
            await here.picture(f"status-{name}-nodes")


def test_nothing_published_has_an_address_or_a_prompt(three: StatusOfThree) -> None:
    peers = [node["peer_id"] for node in three.get("/api/v1/nodes")["nodes"]]
    paths = ["/metrics", "/api/v1/status", "/api/v1/nodes", "/api/v1/donors", "/api/v1/history"]
    for code in LANGUAGES:
        own = ["/", "/nodes", "/donors", "/incidents", "/incidents.atom", "/about"]
        own += [f"/donors/{peer}{part}" for peer in peers for part in ("", "/certificate")]
        paths += [f"/{code}{path}" for path in own]
    known = [urlsplit(three.site.url).netloc, *three.swarm.peers, "127.0.0.1", "brown fox"]
    for path in paths:
        with urllib.request.urlopen(three.site.url + path, timeout=10) as reply:  # noqa: S310
            text = reply.read().decode()
        assert [secret for secret in known if secret in text] == [], path
        if path != "/metrics":  # its histograms have colons and decimals of their own
            shown = [found[0] for found in ADDRESS.finditer(text) if "T" not in found[0]]
            assert [item for item in shown if not item.replace(":", "").isdigit()] == [], path


def test_a_restart_loses_nothing(three: StatusOfThree) -> None:
    before = three.get("/api/v1/status")
    first = {node["peer_id"]: node["registered_unix_s"] for node in _nodes(three)}
    three.restart()
    after = three.until(lambda status: status["volunteers"]["online"] == 3, 60)
    assert {node["peer_id"]: node["registered_unix_s"] for node in _nodes(three)} == first
    assert (
        after["work_announced"]["ever"]["energy_j"] >= before["work_announced"]["ever"]["energy_j"]
    )
    assert after["models"][0]["probed"] is not None


async def test_a_killed_node_is_shown_within_one_period(three: StatusOfThree) -> None:
    async with visit(three.site.url + "/en/") as here:
        victim = three.swarm.nodes[1]
        await asyncio.to_thread(victim.process.kill)
        killed_s = time.monotonic()
        await expect(here.page.locator("main")).to_contain_text(
            "Nobody serves blocks 10 to 19.", timeout=PATIENCE_MS
        )
        shown_after_s = time.monotonic() - killed_s
        assert shown_after_s < PERIOD_S + LOOK_S
        await expect(here.page.locator(".join").first).to_contain_text("--blocks 10:20")
        assert await here.page.locator(".blocks .l0").count() == 10
        await expect(here.page.locator(".incidents")).to_contain_text(
            "SmolLM2-135M-Instruct: nobody serves blocks 10-19"
        )
        await here.picture("status-node-killed")
        await here.page.goto(three.site.url + "/en/nodes")
        await expect(here.page.locator(".state.lost")).to_have_text("gone")
        await is_fine(here)


def _nodes(three: StatusOfThree) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = three.get("/api/v1/nodes")["nodes"]
    return nodes
