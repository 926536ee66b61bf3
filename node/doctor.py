"""``swarm-node doctor``: what a donor needs, what was found, and what to do about it.

The checks are pure judgements of what :mod:`swarm.node.probes` measured; tests inject other
measurements. A probe that cannot measure says so: nothing is guessed, and no host is contacted but
the peers that the user named.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from swarm.clock_offset import describe_offset
from swarm.node.config import NodeSettings
from swarm.node.reachability import Way, judge
from swarm.protocol.errors import SwarmError

GIB = 1024**3
Level = Literal["ok", "warn", "fail"]
LEVELS: dict[Way, Level] = {
    "direct": "ok",
    "relayed": "ok",
    "local": "warn",
    "unreachable": "warn",
}
STYLES: dict[Level, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. ``advice`` is empty when there is nothing to do."""

    name: str
    level: Level
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class ComputeFacts:
    """What torch can compute on."""

    torch_version: str
    devices: tuple[str, ...]
    chosen_device: str
    chosen_dtype: str


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """What a started network reported before it was closed again."""

    addresses: tuple[str, ...]
    clock_offset_s: float = 0.0
    """By how much the peers' clocks are ahead of ours; 0 when they agree."""
    behind_router: bool = False
    relays: int = 0
    """That would relay for this computer."""
    reached: bool | None = None
    """Whether a peer that tried could dial this computer; None when nobody tried."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a checkpoint needs; ``block_bytes`` of its largest block, as stored."""

    number_of_blocks: int
    block_bytes: int


class Probes(Protocol):
    """Measurements of this computer. Each may raise OSError or SwarmError with a plain text."""

    def python_version(self) -> tuple[int, int]: ...

    def memory_bytes(self) -> tuple[int, int]:
        """Total and available."""

    def disk_free_bytes(self, path: Path) -> int: ...

    def cpu(self) -> tuple[int, frozenset[str] | None]:
        """Cores that this process may use; feature flags, or None where they cannot be read."""

    def clock_error_s(self) -> float | None:
        """Largest error of the clock by the kernel; None when it does not know.

        Raises OSError where the kernel cannot be asked.
        """

    def compute(self, device: str, dtype: str) -> ComputeFacts: ...

    def identity(self, path: Path) -> str:
        """Peer id of the key file, or nothing when there is no file yet."""

    async def network(self, settings: NodeSettings) -> NetworkFacts:
        """Start the network and end it again. Raises NetworkError when no peer answers."""

    def model(self, name: str) -> ModelFacts:
        """Look at the files on disk; nothing is downloaded."""


async def examine(settings: NodeSettings, probes: Probes) -> list[Check]:
    """Run all checks; one that fails does not keep others from running."""
    checks = [
        _guarded("python", lambda: check_python(probes)),
        _guarded("memory", lambda: check_memory(probes)),
        _guarded("disk", lambda: check_disk(settings, probes)),
        _guarded("processor", lambda: check_processor(probes)),
        _guarded("clock", lambda: check_clock(probes)),
        _guarded("compute", lambda: check_compute(settings, probes)),
        _guarded("identity", lambda: check_identity(settings, probes)),
        *await _guarded_network(lambda: check_network(settings, probes)),
    ]
    if settings.model:
        checks.append(_guarded("model", lambda: check_model(settings, probes)))
    return checks


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except (OSError, ImportError, SwarmError) as error:
        return Check(name, "fail", str(error))


async def _guarded_network(check: Callable[[], Awaitable[list[Check]]]) -> list[Check]:
    try:
        return await check()
    except (OSError, ImportError, SwarmError) as error:
        return [
            Check(
                "network",
                "fail",
                str(error),
                "free the port or choose another with --listen; check that --peers are right",
            )
        ]


# --- the checks ----------------------------------------------------------------------------------
def check_python(probes: Probes) -> Check:
    major, minor = probes.python_version()
    found = f"Python {major}.{minor}"
    if (major, minor) < (3, 11):
        return Check("python", "fail", found, "install Python 3.11 or newer")
    return Check("python", "ok", found)


def check_memory(probes: Probes) -> Check:
    total, available = probes.memory_bytes()
    found = f"{available / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    if available < GIB:
        return Check("memory", "fail", found, "close programs: a node takes 0.5 GiB and its blocks")
    if available < 4 * GIB:
        return Check("memory", "warn", found, "enough for small models or a few blocks")
    return Check("memory", "ok", found)


def check_disk(settings: NodeSettings, probes: Probes) -> Check:
    path = settings.data_dir.expanduser()
    free = probes.disk_free_bytes(path)
    found = f"{free / GIB:.1f} GiB free at {path}"
    if free < GIB // 10:
        return Check("disk", "fail", found, "free some space, or set data_dir to another disk")
    if free < 10 * GIB:
        return Check("disk", "warn", found, "weights of large models take tens of GiB")
    return Check("disk", "ok", found)


def check_processor(probes: Probes) -> Check:
    cores, flags = probes.cpu()
    if flags is None:
        return Check("processor", "ok", f"{cores} cores; features not known on this system")
    fast = flags & {"avx512_bf16", "amx_bf16"}
    if fast:
        return Check("processor", "ok", f"{cores} cores, bfloat16 in hardware ({min(fast)})")
    if flags & {"avx2", "asimd"}:
        return Check("processor", "ok", f"{cores} cores, no bfloat16 in hardware: float32 is used")
    return Check("processor", "warn", f"{cores} cores without AVX2", "expect it to be slow")


def check_clock(probes: Probes) -> Check:
    try:
        error_s = probes.clock_error_s()
    except OSError:
        return Check("clock", "warn", "not checked: this system cannot tell", CLOCK_ADVICE)
    if error_s is None:
        return Check("clock", "warn", "the kernel knows of no time source", CLOCK_ADVICE)
    found = f"synchronised, at most {error_s:.2f} s off"
    return (
        Check("clock", "ok", found) if error_s < 5 else Check("clock", "warn", found, CLOCK_ADVICE)
    )


CLOCK_ADVICE = "keep NTP on: a node makes up for a wrong clock, but has to ask others for the time"


def check_compute(settings: NodeSettings, probes: Probes) -> Check:
    facts = probes.compute(settings.device, settings.dtype)
    found = (
        f"torch {facts.torch_version}, devices {', '.join(facts.devices)}; "
        f"{facts.chosen_dtype} on {facts.chosen_device}"
    )
    return Check("compute", "ok", found)


def check_identity(settings: NodeSettings, probes: Probes) -> Check:
    peer_id = probes.identity(settings.identity_file)
    found = peer_id or f"no key yet; the first start makes {settings.identity_file}"
    return Check("identity", "ok", found)


async def check_network(settings: NodeSettings, probes: Probes) -> list[Check]:
    """Whether the daemon runs and listens, the peers answer, and how others can reach us."""
    facts = await probes.network(settings)
    checks = [Check("network", "ok", f"listening on {len(facts.addresses)} addresses")]
    if settings.peers:
        answered = "at least one of --peers answers"
        checks.append(Check("peers", "ok", answered))
    else:
        advice = "give --peers, as printed by a seed, to check the way to the swarm"
        checks.append(Check("peers", "warn", "not checked: none given", advice))
    if facts.clock_offset_s:
        found = f"{describe_offset(facts.clock_offset_s)}, by the word of the peers"
        checks.append(Check("clock of the swarm", "warn", found, CLOCK_ADVICE))
    checks.append(check_reachability(settings, facts))
    return checks


def check_reachability(settings: NodeSettings, facts: NetworkFacts) -> Check:
    if settings.announce_addresses and facts.reached is None:
        found = f"announces {', '.join(settings.announce_addresses)}; not tried from outside"
        return Check("reachability", "ok", found)
    judged = judge(
        facts.addresses,
        behind_router=facts.behind_router,
        relays=facts.relays,
        reached=facts.reached,
    )
    return Check("reachability", LEVELS[judged.way], judged.found, judged.advice)


def check_model(settings: NodeSettings, probes: Probes) -> Check:
    facts = probes.model(settings.model)
    found = f"{facts.number_of_blocks} blocks of {facts.block_bytes / 1024**2:.1f} MiB"
    _, available = probes.memory_bytes()
    if facts.block_bytes > 0.8 * available:
        return Check("model", "fail", found, "not one block fits into the free memory")
    return Check("model", "ok", found)


# --- report --------------------------------------------------------------------------------------
def print_report(checks: Sequence[Check], *, as_json: bool, console: Console | None = None) -> None:
    """A table for people, or one JSON object."""
    if as_json:
        healthy = all(check.level != "fail" for check in checks)
        report = {"ok": healthy, "checks": [asdict(check) for check in checks]}
        sys.stdout.write(json.dumps(report) + "\n")
        return
    table = Table(box=None, padding=(0, 2))
    for title in ("", "check", "found", "what to do"):
        table.add_column(title, overflow="fold", header_style="dim")
    for check in checks:
        level = Text(check.level, STYLES[check.level])
        table.add_row(level, check.name, Text(check.found), Text(check.advice))
    (console or Console()).print(table)
