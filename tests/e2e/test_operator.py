"""A real swarm with an operator: answers are paid for, proven and verified, nodes are challenged;
without it they are served."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from scripts.local_swarm import LocalSwarm, SwarmPlan, equal_spans
from scripts.process_keeper import KeptProcess
from tests.adapter_making import make_adapter

SWARM = Path(sys.executable).with_name("swarm")
DEADLINE_S = 90.0


def swarm(*arguments: str | Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(SWARM), *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def operator(books: Path) -> Iterator[None]:
    """Open, until the end of the block."""
    process = KeptProcess(
        [str(SWARM), "operator", "run", str(books)], stdout=subprocess.PIPE, stderr=None
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"listening on http://")
        yield
    finally:
        process.stop()
        if process.stdout is not None:
            process.stdout.close()


def read(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - ours, on loopback
        return json.load(response)


def until_paid(url: str, units: int) -> Any:
    """Totals once more than ``units`` were paid."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        totals = read(f"{url}/v1/totals")
        if totals["served"]["paid"] > units:
            return totals
        time.sleep(0.2)
    raise AssertionError("nothing was settled")


def test_answers_are_paid_for_when_there_is_an_operator(smollm2_path: Path, tmp_path: Path) -> None:
    publics = [swarm("operator", "key", tmp_path / f"{n}.key").split()[0] for n in "abc"]
    books = tmp_path / "books"
    address = f"127.0.0.1:{free_port()}"
    url = f"http://{address}"
    said = swarm(
        "operator", "init", books, "--origin", "e2e.example/ledger", "--listen", address,
        *(part for public in publics for part in ("--mint-key", public)),
    )  # fmt: skip
    operator_key = said.split()[-1]
    settings = books / "operator.toml"
    settings.write_text(
        "checkpoint_interval_s = 0.2\n"
        + settings.read_text()
        + "[policy]\nminimum_node_age_s = 0\nnodes_per_allowance = 2\n"
    )
    plan = SwarmPlan(
        smollm2_path,
        equal_spans(30, 2),
        environment={
            "SWARM_NODE_OPERATOR_URL": url,
            "SWARM_NODE_OPERATOR_KEYS": operator_key,
            "SWARM_NODE_SETTLE_INTERVAL_S": "0.5",
        },
    )
    with LocalSwarm(plan) as nodes:

        def ask() -> str:
            return swarm(
                "generate", smollm2_path, "The capital of Kenya is", "--peers", nodes.peers[0],
                "--max-new-tokens", "8",
                environment={"SWARM_OPERATOR": url, "SWARM_OPERATOR_KEY": operator_key},
            )  # fmt: skip

        away = ask()
        with operator(books):
            swarm(
                "operator", "mint", "public", "100", "--operator", url, "--reason", "e2e",
                "--key", tmp_path / "a.key", "--key", tmp_path / "b.key",
            )  # fmt: skip
            priced = swarm("operator", "price", books, smollm2_path, "--operator", url)
            assert "30 blocks" in priced
            assert ask() == away
            totals = until_paid(url, 0)
            paid = totals["served"]["paid"]
            assert totals["nodes"] == 2
            assert {leader["node"] for leader in totals["leaders"]} == {
                node.peer_id for node in nodes.nodes
            }
        assert ask() == away
        with operator(books):
            assert ask() == away
            until_paid(url, paid)
            log_key = read(f"{url}/v1/terms")["log_key"]
            verified = swarm("operator", "verify", "--operator", url, "--log-key", log_key)
            assert "events add up" in verified
            assert "2 nodes were paid" in verified
            peers = {node.peer_id for node in nodes.nodes}
            assert validated(books, url, smollm2_path, nodes.peers[0], operator_key) == peers
            for peer in peers:
                assert read(f"{url}/v1/nodes/{peer}")["clean_audits"] == 1
            at = ("--operator", url, "--operator-key", operator_key)
            challenged_with_an_adapter(tmp_path, smollm2_path, nodes.peers[0], *at)


def validated(books: Path, url: str, model: Path, seed: str, operator_key: str) -> set[str]:
    """One challenge by an organisation with own weights; whom the operator took verdicts about."""
    folder = books.parent
    public = swarm("operator", "key", folder / "lab.key").split()[0]
    swarm("operator", "organisation", books, "Lab", public, "--validator", "--operator", url)
    at = ("--operator", url, "--operator-key", operator_key, "--key", folder / "lab.key")
    (folder / "letters.txt").write_text(
        "My aunt kept bees behind the railway station. In March she painted all hives yellow."
    )
    said = swarm(
        "validator", "run", model, "--peers", seed, *at, "--prompts", folder / "letters.txt",
        "--state", folder / "lab.state", "--weights", "--once", "--json",
    )  # fmt: skip
    events = [json.loads(line) for line in said.splitlines()]
    assert [event["event"] for event in events] == ["ready", "challenge", "posted", "posted"]
    assert events[0]["organisation"] == "Lab"
    # There is one node for each half, so nobody but us could compute it again.
    assert all(each["by_own_weights"] for each in events[1]["findings"])
    shown = json.loads(swarm("validator", "show", "--state", folder / "lab.state", "--json"))
    assert {each["node"] for each in shown["nodes"]} == {each["node"] for each in events[2:]}
    return {event["node"] for event in events[2:] if event["outcome"] == "passed"}


def challenged_with_an_adapter(folder: Path, model: Path, seed: str, *at: str) -> None:
    """Somebody publishes an adapter and asks with it; the validator then does so too, by lot."""
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    make_adapter(whole, folder / "weather", std=0.03, r=8, target_modules=["q_proj", "v_proj"])
    publish = ["adapters", "publish", folder / "weather", "--base", model, "--copies", "9"]
    publishing = KeptProcess(
        [str(SWARM), *map(str, publish), "--peers", seed, "--json"],
        environment={**os.environ, "XDG_DATA_HOME": str(folder / "author")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    others = {"XDG_DATA_HOME": str(folder / "others")}
    with publishing:
        assert publishing.stdout is not None
        (publisher,) = json.loads(publishing.stdout.readline())["publishers"]
        swarm(
            "generate", model, "Tomorrow it will", "--peers", seed, "--adapter", "weather",
            "--max-new-tokens", "2", environment=others,
        )  # fmt: skip
        (folder / "diary.txt").write_text(
            " ".join(f"On day {day} of our journey we saw {day + 2} ships." for day in range(999))
        )
        validating = KeptProcess(
            [
                str(SWARM), "validator", "run", str(model), "--peers", seed, *at,
                "--key", str(folder / "lab.key"), "--prompts", str(folder / "diary.txt"),
                "--state", str(folder / "lab.state"), "--weights", "--publisher", publisher,
                "--period", "1", "--json",
            ],
            environment={**os.environ, **others},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        with validating:
            assert validating.stdout is not None
            events = map(json.loads, validating.stdout)
            for made in (event for event in events if event["event"] == "challenge"):
                assert {each["found"] for each in made["findings"]} == {"passed"}
                assert all(each["by_own_weights"] for each in made["findings"])
                if made["adapter"].startswith("weather@"):
                    break
            else:
                raise AssertionError("the validator ended without asking with the adapter")
            validating.stop()
        publishing.stop()
