"""The network lab against what its links state. Needs root; skipped with the reason elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from scripts.netlab import PROBE, Host, Lab, Link, measure, why_unavailable
from scripts.process_keeper import KeptProcess

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def lab() -> Iterator[Lab]:
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    with Lab(seed=3) as lab:
        yield lab


def test_latency_rate_and_counts_of_a_link(lab: Lab) -> None:
    a, b = lab.host("a"), lab.host("b")
    lab.link(a, b, Link(latency_ms=20, rate_mbit_s=40))
    assert 40 <= measure(a, b, "round-trip", 11) < 50
    # Headers, slow start and a busy machine cost some; more than the rate is never right.
    assert 20 < measure(a, b, "rate", 4_000_000) < 40
    assert lab.counts()["a-b/up"]["bytes"] > 4_000_000


def test_hosts_of_a_star_are_the_stated_round_trip_apart(lab: Lab) -> None:
    hosts = [lab.host(name) for name in ("a", "b", "c")]
    lab.star(hosts, Link(latency_ms=15))
    for one, other in ((0, 1), (2, 0)):
        assert 30 <= measure(hosts[one], hosts[other], "round-trip", 11) < 40


def test_a_cut_lets_nothing_pass_until_healed(lab: Lab) -> None:
    a, b, c = (lab.host(name) for name in ("a", "b", "c"))
    lab.star([a, b, c], Link(latency_ms=1))
    lab.cut(a, b)
    with pytest.raises(subprocess.TimeoutExpired):
        measure(a, b, "round-trip", 1, timeout_s=1.0)
    assert measure(a, c, "round-trip", 3) < 20
    lab.heal(a, b)
    assert measure(a, b, "round-trip", 3) < 20


def test_hosts_without_a_link_do_not_reach_each_other_nor_this_machine(lab: Lab) -> None:
    a, b = lab.host("a"), lab.host("b")
    with pytest.raises(subprocess.TimeoutExpired):
        measure(a, b, "round-trip", 1, timeout_s=1.0)
    links = json.loads(a.run(["ip", "-json", "link"]))
    assert sorted(link["ifname"] for link in links) == ["lab0", "lo"]
    routes = json.loads(a.run(["ip", "-json", "route"]))
    assert [route["dev"] for route in routes] == ["lab0"]


def seen_by(server: Host, client: Host) -> str:
    """The address under which ``server`` knows ``client``."""
    python = [sys.executable, "-I", "-S", str(PROBE)]
    with server.popen([*python, "serve", server.address], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = process.stdout.readline().decode().strip()
        return str(json.loads(client.run([*python, "origin", server.address, port])))


def test_a_gateway_masquerades(lab: Lab) -> None:
    if shutil.which("nft") is None:
        pytest.skip("NAT needs the package nftables")
    server, router = lab.host("server"), lab.gateway("router")
    lab.link(server, router, Link(latency_ms=5))
    inside = lab.host("inside", behind=router)
    assert seen_by(server, inside) == router.address
    with pytest.raises((subprocess.TimeoutExpired, subprocess.CalledProcessError)):
        measure(server, inside, "round-trip", 1, timeout_s=1.0)


LEFT_ALONE = """
import os, signal, subprocess, sys
from scripts.netlab import Lab, Link
lab = Lab().__enter__()
a, b = lab.host("a"), lab.host("b")
lab.link(a, b, Link())
program = ["sh", "-c", "echo started; exec sleep 1000"]
processes = [a.popen(program, stdout=subprocess.PIPE) for _ in range(2)]
for process in processes:
    process.stdout.readline()
print(lab._process.pid, *[process.keeper_pid for process in processes], flush=True)
sys.stdin.read()
"""


def test_nothing_is_left_when_the_lab_is_killed(lab: Lab) -> None:
    """``lab`` is there for its skip: as root only."""
    with KeptProcess(
        [sys.executable, "-c", LEFT_ALONE],
        folder=REPOSITORY,
        environment=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        started = [psutil.Process(pid) for pid in pids]
        below = psutil.Process(owner.keeper_pid).children(recursive=True)
        programs = [process for keeper in started for process in keeper.children(recursive=True)]
        assert len(programs) == 2
        victim = next(process for process in below if process.ppid() == owner.keeper_pid)
        victim.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs([victim, *started, *programs], timeout=20)
        assert not alive
