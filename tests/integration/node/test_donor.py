"""A node in this process that rests by its owner's limits: shifts with a rest between them."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swarm.node import app
from swarm.node.config import NodeSettings
from swarm.node.control import running_node
from swarm.node.donor import guard
from swarm.node.donor.readings import Readings
from swarm.node.engine.engine import SpanEngine
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


class Laptop:
    """A computer that is as the test says."""

    def __init__(self) -> None:
        self.readings = Readings()

    async def read(self) -> Readings:
        return self.readings


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
    laptop = Laptop()
    monkeypatch.setattr(app, "SystemSensors", lambda _: laptop)
    monkeypatch.setattr(guard, "READ_PERIOD_S", 0.01)
    key = tmp_path / "node.key"
    settings = NodeSettings(
        model=str(tmp_path / "model"),
        identity_path=key,
        listen_addresses=("/ip4/127.0.0.1/tcp/0",),
        cache_tokens=256,
        metrics=False,
    )
    view = States()
    running = asyncio.create_task(app.run_node(settings, view))

    def tell(command: str, **details: Any) -> Any:
        with running_node(key) as node:
            return node.ask_owner(command, **details)

    async def works() -> None:
        await view.wait_for("online")
        assert (view.last.first_block, view.last.end_block) == (0, 2)

    async def rests(reason: str) -> None:
        await view.wait_for("resting")
        assert (view.last.end_block, view.last.rests_because) == (0, (reason,))
        assert psutil.Process().children() == [], "no network while it rests"
        assert not [thread for thread in threading.enumerate() if thread.name == "swarm-device"]
        assert [each for each in gc.get_objects() if type(each) is SpanEngine] == []

    await works()
    laptop.readings = Readings(on_battery=True)
    await rests("on battery")
    laptop.readings = Readings(on_battery=False)
    await works()
    answer = await asyncio.to_thread(tell, "pause", for_s=3600)
    assert answer["reasons"] == ["paused"]
    await rests("paused")
    answer = await asyncio.to_thread(tell, "limits", changes={"hours": "00:00-24:00"})
    assert answer["limits"]["hours"] == "00:00-24:00"
    await asyncio.to_thread(tell, "resume")
    await works()
    assert "draining" in view.seen[view.seen.index("online") : view.seen.index("resting")]
    os.kill(os.getpid(), signal.SIGTERM)
    await running
    assert view.seen[-1] == "stopped"
    (day,) = json.loads((tmp_path / "node.diary.json").read_text()).values()
    assert day["online_s"] > 0
    assert set(day["rested_for"]) == {"on battery", "paused"}
