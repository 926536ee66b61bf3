"""What ``docker-compose.yml`` starts: a swarm that answers, and everything around it.

The same test runs over Docker (SWARM_TEST_DOCKER=1) and over processes that
``scripts.local_compose`` starts from the same file.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compose_spec
import pytest

from scripts.local_compose import COMPOSE_FILE, PORTS, LocalCompose, read_compose

REPOSITORY = Path(__file__).parents[2]
MODEL = "SmolLM2-135M-Instruct"
SERVICES = {"seed", "node-1", "node-2", "node-3", "gateway", "status-page", "operator"}
ONCE = {"model", "meeting", "operator-folder"}


# --- the file ------------------------------------------------------------------------------------
def test_the_file_fits_the_compose_specification() -> None:
    document = read_compose({})
    parsed = compose_spec.PyCompose.from_json(json.dumps(document))
    assert set(parsed.service_names()) == SERVICES | ONCE
    document["services"]["seed"]["nonsense"] = True
    with pytest.raises(ValueError, match="nonsense"):
        compose_spec.PyCompose.from_json(json.dumps(document))


def test_every_service_is_locked_in_and_watched() -> None:
    services: Mapping[str, dict[str, Any]] = read_compose({})["services"]
    for name, service in services.items():
        assert service["user"].split(":")[0] != "0", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert any(volume.split(":")[1] == "/data" for volume in service["volumes"]) or name in ONCE
        assert ("healthcheck" in service) == (name in SERVICES), name
    published = [port for service in services.values() for port in service.get("ports", ())]
    assert [port for port in published if not port.startswith("127.0.0.1:")] == ["31330:31330"]


# --- what it starts ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stack:
    """Where the services are."""

    gateway: str
    status: str
    operator: str
    log: Callable[[str], str]


@pytest.fixture(scope="module")
def stack(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if os.environ.get("SWARM_TEST_DOCKER") == "1":
        yield from docker_stack()
        return
    folder = tmp_path_factory.mktemp("compose")
    with LocalCompose(folder, models=smollm2_path.parents[2]) as compose:
        yield Stack(
            compose.url("SWARM_GATEWAY_PORT"),
            compose.url("SWARM_STATUS_PORT"),
            compose.url("SWARM_OPERATOR_PORT"),
            compose.log,
        )
        codes = compose.stop()
    assert set(codes.values()) == {0}, codes
    for name in SERVICES:
        assert "Traceback" not in compose.log(name), name


def docker_stack() -> Iterator[Stack]:
    compose = ["docker", "compose", "--file", str(COMPOSE_FILE)]

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [*compose, *arguments], check=True, capture_output=True, text=True, timeout=1800
        )
        return done.stdout

    try:
        run("up", "--build", "--wait")
        yield Stack(
            f"http://127.0.0.1:{PORTS['SWARM_GATEWAY_PORT']}",
            f"http://127.0.0.1:{PORTS['SWARM_STATUS_PORT']}",
            f"http://127.0.0.1:{PORTS['SWARM_OPERATOR_PORT']}",
            lambda name: run("logs", name),
        )
    finally:
        run("down", "--volumes")


def ask(url: str, body: Mapping[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=120) as reply:  # noqa: S310
        return json.loads(reply.read())


def until(found: Callable[[], Any], within_s: float) -> Any:
    deadline_s = time.monotonic() + within_s
    while not (value := found()):
        assert time.monotonic() < deadline_s, "not in time"
        time.sleep(0.2)
    return value


def test_the_stack_answers_and_is_seen(stack: Stack) -> None:
    (model,) = ask(f"{stack.gateway}/v1/models")["data"]
    assert model["id"] == MODEL
    answer = ask(
        f"{stack.gateway}/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
            "max_tokens": 16,
        },
    )
    assert "Paris" in answer["choices"][0]["message"]["content"]

    def complete() -> Any:
        status = ask(f"{stack.status}/api/v1/status")
        models = status["models"]
        return status if models and models[0]["complete"] and models[0]["probed"] else None

    status = until(complete, 60)
    assert status["volunteers"]["online"] == 3
    assert status["models"][0]["probed"]["succeeded"]
    hops = [hop["name"] for hop in status["models"][0]["probed"]["chain"]]
    assert hops == ["node-1", "node-2", "node-3"]
    assert ask(f"{stack.operator}/v1/terms")
