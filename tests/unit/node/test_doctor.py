"""The doctor's judgement of injected measurements."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from swarm.node.config import NodeSettings
from swarm.node.doctor import (
    GIB,
    Check,
    ComputeFacts,
    ModelFacts,
    NetworkFacts,
    examine,
    print_report,
)
from swarm.protocol.errors import CheckpointError, ConfigError, NetworkError

PEER = "/ip4/192.0.2.1/tcp/1/p2p/12D3KooWExample"
HOME = "/ip4/10.0.0.1/tcp/1"
SETTINGS = NodeSettings(model="m", peers=(PEER,))


@dataclass
class FixedProbes:
    python: tuple[int, int] = (3, 12)
    memory: tuple[int, int] = (32 * GIB, 20 * GIB)
    disk_free: int = 100 * GIB
    flags: frozenset[str] | None = frozenset({"avx2", "avx512_bf16"})
    clock: float | OSError | None = 0.01
    compute_facts: ComputeFacts | Exception = field(
        default_factory=lambda: ComputeFacts("2.13", ("cpu",), "cpu", "bfloat16")
    )
    peer_id: str | Exception = "12D3KooWMine"
    addresses: tuple[str, ...] | Exception = ("/ip4/8.8.8.8/tcp/31331", "/ip4/127.0.0.1/tcp/31331")
    clock_offset_s: float = 0.0
    behind_router: bool = False
    relays: int = 0
    reached: bool | None = None
    model_facts: ModelFacts | Exception = field(default_factory=lambda: ModelFacts(30, 10**7))

    def python_version(self) -> tuple[int, int]:
        return self.python

    def memory_bytes(self) -> tuple[int, int]:
        return self.memory

    def disk_free_bytes(self, path: Path) -> int:
        return self.disk_free

    def cpu(self) -> tuple[int, frozenset[str] | None]:
        return 8, self.flags

    def clock_error_s(self) -> float | None:
        if isinstance(self.clock, OSError):
            raise self.clock
        return self.clock

    def compute(self, device: str, dtype: str) -> ComputeFacts:
        if isinstance(self.compute_facts, Exception):
            raise self.compute_facts
        return self.compute_facts

    def identity(self, path: Path) -> str:
        if isinstance(self.peer_id, Exception):
            raise self.peer_id
        return self.peer_id

    async def network(self, settings: NodeSettings) -> NetworkFacts:
        if isinstance(self.addresses, Exception):
            raise self.addresses
        return NetworkFacts(
            self.addresses,
            clock_offset_s=self.clock_offset_s,
            behind_router=self.behind_router,
            relays=self.relays,
            reached=self.reached,
        )

    def model(self, name: str) -> ModelFacts:
        if isinstance(self.model_facts, Exception):
            raise self.model_facts
        return self.model_facts


async def report(probes: FixedProbes, settings: NodeSettings = SETTINGS) -> dict[str, Check]:
    return {check.name: check for check in await examine(settings, probes)}


async def test_a_good_computer_passes() -> None:
    checks = await report(FixedProbes())
    assert {name: check.level for name, check in checks.items() if check.level != "ok"} == {}
    assert len(checks) == 11


@pytest.mark.parametrize(
    ("probes", "name", "level", "words"),
    [
        (FixedProbes(python=(3, 10)), "python", "fail", "install Python 3.11"),
        (FixedProbes(memory=(GIB, GIB // 2)), "memory", "fail", "close programs"),
        (FixedProbes(memory=(4 * GIB, 2 * GIB)), "memory", "warn", "small models"),
        (FixedProbes(disk_free=0), "disk", "fail", "free some space"),
        (FixedProbes(disk_free=GIB), "disk", "warn", "large models"),
        (FixedProbes(flags=frozenset({"avx2"})), "processor", "ok", "float32"),
        (FixedProbes(flags=frozenset({"sse2"})), "processor", "warn", "slow"),
        (FixedProbes(flags=None), "processor", "ok", "not known"),
        (FixedProbes(clock=None), "clock", "warn", "NTP"),
        (FixedProbes(clock=60.0), "clock", "warn", "60.00 s off"),
        (FixedProbes(clock=OSError()), "clock", "warn", "not checked"),
        (FixedProbes(clock_offset_s=-605), "clock of the swarm", "warn", "10 min 5 s fast"),
        (FixedProbes(compute_facts=ImportError("no torch")), "compute", "fail", "no torch"),
        (FixedProbes(compute_facts=ConfigError("no cuda")), "compute", "fail", "no cuda"),
        (FixedProbes(peer_id=ConfigError("chmod 600 it")), "identity", "fail", "chmod 600"),
        (FixedProbes(peer_id=""), "identity", "ok", "first start makes"),
        (FixedProbes(addresses=NetworkError("port in use")), "network", "fail", "free the port"),
        (FixedProbes(addresses=(HOME,)), "reachability", "warn", "only the local network"),
        (FixedProbes(reached=True), "reachability", "ok", "directly"),
        (FixedProbes(reached=False), "reachability", "warn", "firewall"),
        (
            FixedProbes(addresses=(HOME,), behind_router=True, relays=2),
            "reachability",
            "ok",
            "2 re",
        ),
        (FixedProbes(addresses=(HOME,), behind_router=True), "reachability", "warn", "--announce"),
        (FixedProbes(model_facts=CheckpointError("no shard 2")), "model", "fail", "no shard 2"),
        (FixedProbes(model_facts=ModelFacts(1, 10**12)), "model", "fail", "not one block fits"),
    ],
)
async def test_what_is_wrong_is_said(
    probes: FixedProbes, name: str, level: str, words: str
) -> None:
    check = (await report(probes))[name]
    assert check.level == level
    assert words in f"{check.found} {check.advice}"


async def test_nothing_is_guessed_without_peers() -> None:
    checks = await report(FixedProbes(), NodeSettings(model=""))
    assert checks["peers"].found.startswith("not checked")
    assert "model" not in checks


def test_the_report_as_a_table_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("memory", "warn", "2 GiB [free]", "close programs")]
    console = Console(record=True, width=100, file=io.StringIO())
    print_report(checks, as_json=False, console=console)
    assert "2 GiB [free]" in console.export_text()
    print_report([*checks, Check("disk", "fail", "full")], as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is False
    assert printed["checks"][0] == {
        "name": "memory",
        "level": "warn",
        "found": "2 GiB [free]",
        "advice": "close programs",
    }
