"""A headless Chromium for tests of pages: what they load, how accessible they are, how they look.

Set SWARM_TEST_SCREENSHOTS to a folder to keep pictures of what the tests saw.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Page, Request, Response, async_playwright

PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
SERIOUS = ("serious", "critical")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium_path() -> str:
    """Skips the test where there is no Chromium; scripts/test installs Debian's."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this computer (Debian: apt-get install chromium)")
    return found


@dataclass
class Visit:
    """One page in a browser, and everything that it asked for."""

    page: Page
    requests: list[Request] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    """Errors on the page's console, and exceptions of its scripts."""
    loaded_bytes: int = 0

    @property
    def hosts(self) -> set[str]:
        return {urlsplit(request.url).netloc for request in self.requests}

    async def violations(self) -> list[str]:
        """What axe-core finds seriously wrong for people with disabilities."""
        script = resources.files("axe_playwright_python") / "axe.min.js"
        await self.page.evaluate(script.read_text(encoding="utf-8"))
        found = await self.page.evaluate("() => axe.run()")
        return [
            f"{item['id']}: {item['help']} ({item['nodes'][0]['html'][:120]})"
            for item in found["violations"]
            if item["impact"] in SERIOUS
        ]

    async def overflow_px(self) -> int:
        """How far the page is wider than the window."""
        width: int = await self.page.evaluate(
            "() => document.documentElement.scrollWidth - window.innerWidth"
        )
        return width

    async def picture(self, name: str) -> None:
        folder = os.environ.get("SWARM_TEST_SCREENSHOTS")
        if folder:  # Playwright makes it
            await self.page.screenshot(path=f"{folder}/{name}.png")


@asynccontextmanager
async def visit(url: str, **options: Any) -> AsyncIterator[Visit]:
    """Open ``url`` in a fresh browser; at the end no script may have failed."""
    executable = chromium_path()
    sandbox = [] if os.getuid() else ["--no-sandbox"]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=sandbox)
        try:
            context = await browser.new_context(**options)
            here = Visit(await context.new_page())

            async def received(response: Response) -> None:
                try:
                    here.loaded_bytes += len(await response.body())
                except Exception:  # streams that go on, and answers without a body
                    return

            here.page.on("request", lambda request: here.requests.append(request))
            here.page.on("response", received)
            here.page.on("pageerror", lambda error: here.complaints.append(str(error)))
            here.page.on(
                "console",
                lambda message: (
                    here.complaints.append(message.text) if message.type == "error" else None
                ),
            )
            await here.page.goto(url)
            yield here
            assert here.complaints == []
        finally:
            await browser.close()
