"""The gateway as its users meet it: the command, real nodes, the chat page in a real browser."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import torch
from playwright.async_api import Page, expect
from transformers import AutoModelForCausalLM

from scripts.local_gateway import LocalGateway
from scripts.local_swarm import SWARM_NODE, LocalSwarm, Member, Span, SwarmPlan
from scripts.process_keeper import KeptProcess
from swarm.node.control import running_node
from tests.adapter_making import make_adapter
from tests.e2e.browser import PHONE, Visit, visit

QUESTION = "Name the planets in order and say one thing about each."
SPANS = (Span(0, 10), Span(10, 20), Span(10, 20), Span(20, 30))
HEAVIEST_PAGE_BYTES = 200_000
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def swarm(smollm2_path: Path) -> Iterator[LocalSwarm]:
    """Three spans; two nodes have the middle one."""
    with LocalSwarm(SwarmPlan(smollm2_path, SPANS)) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def adapter(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random: what it says is another text."""
    folder = tmp_path_factory.mktemp("adapter")
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32)
    make_adapter(model, folder, std=0.1, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture(scope="module")
def gateway(
    swarm: LocalSwarm,
    smollm2_path: Path,
    adapter: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LocalGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with LocalGateway(
        smollm2_path, swarm.peers, folder, "--adapter", f"parrot={adapter}"
    ) as gateway:
        yield gateway
        code = gateway.stop()
        assert code == 0, gateway.log
        assert QUESTION not in gateway.log
        assert "Traceback" not in gateway.log


def open_sessions(nodes: list[Member]) -> int:
    """On all nodes, by their own metrics."""
    total = 0
    for node in nodes:
        if node.process.poll() is None and node.metrics_url is not None:
            with urllib.request.urlopen(node.metrics_url, timeout=5) as reply:  # noqa: S310
                text = reply.read().decode()
            found = re.search(r"^swarm_node_sessions_open (\S+)$", text, re.MULTILINE)
            assert found is not None
            total += int(float(found[1]))
    return total


async def until_freed(nodes: list[Member], within_s: float) -> float:
    """Wait until no node has a session; how long that took."""
    started_s = time.monotonic()
    async with asyncio.timeout(within_s):
        while await asyncio.to_thread(open_sessions, nodes):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return time.monotonic() - started_s


async def ask(page: Page, question: str, *, temperature: float = 0.0) -> None:
    await expect(page.locator("#model")).to_be_enabled()
    await page.click("#show-settings")
    await page.fill("#temperature", str(temperature))
    await page.fill("#max-tokens", "96")
    await page.click("#settings button")
    await page.fill("#text", question)
    await page.press("#text", "Enter")


async def finished(page: Page) -> str:
    """The last answer, when it is whole."""
    await expect(page.locator("#status")).to_contain_text("after", timeout=PATIENCE_MS)
    return await page.locator(".answer").last.inner_text()


async def is_fine(here: Visit) -> None:
    """Accessible, light, no other host, and nothing hangs over."""
    assert await here.violations() == []
    assert await here.overflow_px() <= 0
    assert len(here.hosts) == 1
    assert here.loaded_bytes < HEAVIEST_PAGE_BYTES


async def test_an_answer_on_the_chat_page(swarm: LocalSwarm, gateway: LocalGateway) -> None:
    async with visit(gateway.url) as here:
        await is_fine(here)
        await here.picture("chat-welcome")
        await ask(here.page, QUESTION)
        growing = here.page.locator(".answer.growing p").first
        await expect(growing).not_to_be_empty(timeout=PATIENCE_MS)
        await expect(here.page.locator("#stop")).to_be_visible()
        text = await finished(here.page)
        assert len(text.split()) > 20
        hops = here.page.locator(".chain .hop")
        assert await hops.count() == 3
        names = [await hop.inner_text() for hop in await hops.all()]
        numbers = [re.findall(r"\d+", name)[-2:] for name in names]
        assert numbers == [["0", "9"], ["10", "19"], ["20", "29"]]
        await expect(here.page.locator(".served .speed")).to_contain_text("tokens per second")
        await is_fine(here)
        await here.picture("chat-answer")
        # The same question to the same model with an adapter.
        await here.page.click("#new")
        await here.page.select_option("#adapter", "parrot")
        await ask(here.page, QUESTION)
        assert await finished(here.page) != text
        await here.picture("chat-adapter")
    assert await until_freed(swarm.nodes, 10) < 10


@pytest.mark.parametrize(
    ("name", "options"), [("phone", PHONE), ("dark", {"color_scheme": "dark"})]
)
async def test_stop_on_a_phone_and_in_the_dark(
    swarm: LocalSwarm, gateway: LocalGateway, name: str, options: dict[str, Any]
) -> None:
    async with visit(gateway.url, **options) as here:
        await ask(here.page, "Tell a long story about a lighthouse.", temperature=0.5)
        await expect(here.page.locator(".chain")).to_be_visible(timeout=PATIENCE_MS)
        await here.page.click("#stop")
        assert await until_freed(swarm.nodes, 2.0) < 2
        await expect(here.page.locator(".served")).to_contain_text("Stopped.")
        await is_fine(here)
        await here.picture(f"chat-stopped-{name}")
        await here.page.click("#show-settings")
        assert await here.violations() == []
        await here.picture(f"chat-settings-{name}")
        await here.page.click("#settings button")
        await here.page.click("#new")
        assert await here.page.locator(".turn").count() == 0


async def test_a_client_that_disconnects_frees_its_sessions(
    swarm: LocalSwarm, gateway: LocalGateway
) -> None:
    (model,) = gateway.ready["models"]
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        for choices in (1, 4):
            stream = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": QUESTION}],
                max_tokens=500,
                n=choices,
                stream=True,
            )
            seen = 0
            async for _ in stream:
                seen += 1
                if seen == 8:
                    break
            assert open_sessions(swarm.nodes) >= 3
            await stream.close()
            assert await until_freed(swarm.nodes, 2.0) < 2


async def serving_middle(page: Page, swarm: LocalSwarm) -> Member:
    """The node that serves the middle span of the answer in the making."""
    middle = page.locator(".chain .hop").nth(1)
    title = await middle.get_attribute("title", timeout=PATIENCE_MS)
    assert title is not None
    (node,) = (node for node in swarm.nodes if node.peer_id in title)
    return node


async def test_its_owner_pauses_a_node_in_mid_answer(
    swarm: LocalSwarm, gateway: LocalGateway
) -> None:
    """The answer goes on elsewhere, not a token different; then the node comes back."""
    async with visit(gateway.url) as here:
        await ask(here.page, QUESTION)
        undisturbed = await finished(here.page)
        await here.page.click("#new")
        await ask(here.page, QUESTION)
        node = await serving_middle(here.page, swarm)
        with owner_page(node) as url:
            async with visit(url, **PHONE) as owner:
                page = owner.page
                await expect(page.locator("#state")).to_have_text("Working", timeout=PATIENCE_MS)
                await page.click("text=Pause 1 h")
                await expect(page.locator("#why")).to_contain_text("Paused. Until")
                assert await finished(here.page) == undisturbed
                await expect(here.page.locator(".changed")).to_contain_text("another one took over")
                await expect(page.locator("#state")).to_have_text("Resting", timeout=PATIENCE_MS)
                await is_fine(owner)
                await owner.picture("owner-resting")
                await page.click("#resume")
                await expect(page.locator("#state")).to_have_text("Working", timeout=PATIENCE_MS)


async def test_limits_on_the_owner_s_page(swarm: LocalSwarm) -> None:
    node = swarm.nodes[0]
    with owner_page(node) as url:
        async with visit(url, color_scheme="dark") as here:
            page = here.page
            await expect(page.locator("#state")).to_have_text("Working", timeout=PATIENCE_MS)
            assert "#" not in page.url, "the token is not left in the history"
            await expect(page.locator("#today")).to_contain_text("Tokens for others")
            await page.fill("[name=upload_bytes_per_s]", "0.01")
            await page.click("text=Save")
            assert await page.locator("#limits :invalid").count() > 0
            await page.fill("[name=upload_bytes_per_s]", "2.5")
            await page.fill("[name=hours]", "whenever")
            await page.click("text=Save")
            await expect(page.locator("#saved")).to_contain_text("write for example")
            await page.fill("[name=hours]", "")
            await page.click("text=Save")
            await expect(page.locator("#saved")).to_have_text("Saved.")
            await is_fine(here)
            await here.picture("owner-limits-dark")
            here.complaints.clear()  # the refusal is told on the console, too
        with running_node(node.key) as control:
            told = control.ask_owner("limits", changes={})
            assert told is not None
            assert told["limits"]["upload_bytes_per_s"] == 2_500_000
            control.ask_owner("limits", changes={"upload_bytes_per_s": None})
        # Without the token, from another name, or from another page: nothing.
        address = url.partition("#")[0]
        token = {"Authorization": f"Bearer {url.partition('#')[2]}"}
        async with aiohttp.ClientSession() as http:
            for headers in ({}, {"Authorization": "Bearer x"}, {**token, "Host": "evil.example"}):
                async with http.get(address + "api/owner", headers=headers) as reply:
                    assert reply.status in (401, 403)
                    assert node.peer_id not in await reply.text()
            async with http.post(address + "api/pause", headers=token, data="{}") as reply:
                assert reply.status == 415
            async with http.post(address + "api/pause", headers=token, json={"x": 1}) as reply:
                assert reply.status == 400


@contextmanager
def owner_page(node: Member) -> Iterator[str]:
    """``swarm-node page`` for a node; its address with the token."""
    command = [str(SWARM_NODE), "page", "--identity", str(node.key), "--json", "--no-open"]
    process = KeptProcess(command, stdout=subprocess.PIPE)
    try:
        stdout = process.stdout
        assert stdout is not None
        with stdout:
            yield str(json.loads(stdout.readline())["url"])
    finally:
        assert process.stop() == 0


async def test_a_node_killed_in_mid_answer(swarm: LocalSwarm, gateway: LocalGateway) -> None:
    """The last test here: one of the nodes of the middle span is gone afterwards."""
    async with visit(gateway.url) as here:
        await ask(here.page, QUESTION)
        undisturbed = await finished(here.page)
        await here.page.click("#new")
        await ask(here.page, QUESTION)
        node = await serving_middle(here.page, swarm)
        await asyncio.to_thread(node.process.kill)
        assert await finished(here.page) == undisturbed
        await expect(here.page.locator(".changed")).to_contain_text("another one took over")
        after = await here.page.locator(".chain .hop").nth(1).get_attribute("title")
        assert after is not None
        assert node.peer_id not in after
        await here.picture("chat-healed")
