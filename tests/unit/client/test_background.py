from __future__ import annotations

import asyncio
import threading
from typing import NoReturn

import pytest

from swarm.client.background import BackgroundLoop


def test_results_and_errors_come_back() -> None:
    async def add(left: int, right: int) -> int:
        await asyncio.sleep(0)
        return left + right

    async def fail() -> NoReturn:
        raise KeyError("mine")

    background = BackgroundLoop()
    assert background.run(add(2, 3)) == 5
    with pytest.raises(KeyError, match="mine"):
        background.run(fail())
    background.close()


def test_close_cancels_what_runs_and_ends_the_thread() -> None:
    started, cleaned_up = threading.Event(), threading.Event()

    async def wait_for_ever() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cleaned_up.set()

    background = BackgroundLoop()
    background.submit(wait_for_ever())
    assert started.wait(5)
    background.close()
    background.close()
    assert cleaned_up.is_set()
    assert background.is_closed
    with pytest.raises(RuntimeError, match="closed"):
        background.run(asyncio.sleep(0))


def test_an_interrupt_cancels_and_waits_for_the_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    started = threading.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            events.append("cleaned up")

    def interrupt(self: object, timeout: float | None = None) -> NoReturn:
        assert started.wait(5)
        raise KeyboardInterrupt

    background = BackgroundLoop()
    with monkeypatch.context() as patched:
        patched.setattr("swarm.client.background.Future.result", interrupt)
        with pytest.raises(KeyboardInterrupt):
            background.run(work())
    assert events == ["cleaned up"]
    background.close()


def test_no_call_from_its_own_loop() -> None:
    background = BackgroundLoop()

    async def call_back() -> None:
        background.run(asyncio.sleep(0))

    with pytest.raises(RuntimeError, match="never end"):
        background.run(call_back())
    background.close()
