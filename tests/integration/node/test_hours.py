"""A node with working hours, in this process: two shifts with a rest between them."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from datetime import datetime
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swarm.node import shifts
from swarm.node.app import run_node
from swarm.node.config import NodeSettings
from swarm.node.engine.engine import SpanEngine
from swarm.node.hours import parse_hours
from swarm.node.view import NodeStatus, StatusSource


class States:
    """A view that only remembers the states, and lets a test wait for one."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.last = NodeStatus()

    async def watch(self, status: StatusSource) -> None:
        while True:
            self.last = status()
            if not self.seen or self.seen[-1] != self.last.state:
                self.seen.append(self.last.state)
            await asyncio.sleep(0.01)

    async def wait_for(self, state: str) -> None:
        while not self.seen or self.seen[-1] != state:  # noqa: ASYNC110 (a view has no events)
            await asyncio.sleep(0.01)

    def ready(self, status: NodeStatus) -> None:
        pass

    def stopped(self) -> None:
        self.seen.append("stopped")

    def error(self, message: str) -> None:
        self.seen.append(message)


async def test_a_node_works_rests_and_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    clock = [datetime.fromisoformat("2026-03-01T21:00:00")]
    monkeypatch.setattr(shifts, "_local_now", lambda: clock[0])
    monkeypatch.setattr(shifts, "CLOCK_CHECK_S", 0.01)
    settings = NodeSettings(
        model=str(tmp_path / "model"),
        identity_path=tmp_path / "node.key",
        listen_addresses=("/ip4/127.0.0.1/tcp/0",),
        hours=parse_hours("20:00-08:00"),
        cache_tokens=256,
        metrics=False,
    )
    view = States()
    running = asyncio.create_task(run_node(settings, view))
    for day in (1, 2):
        clock[0] = datetime.fromisoformat(f"2026-03-0{day}T21:00:00")
        await view.wait_for("online")
        assert (view.last.first_block, view.last.end_block) == (0, 2)
        clock[0] = datetime.fromisoformat(f"2026-03-0{day + 1}T09:00:00")
        await view.wait_for("resting")
        assert (view.last.end_block, view.last.rests_until) == (0, "20:00")
        assert psutil.Process().children() == [], "no network while it rests"
        assert not [thread for thread in threading.enumerate() if thread.name == "swarm-device"]
        assert [each for each in gc.get_objects() if type(each) is SpanEngine] == []
    os.kill(os.getpid(), signal.SIGTERM)
    await running
    assert view.seen[-1] == "stopped"
