"""A whole swarm on one machine: a seed and nodes as separate processes, owned by us.

Used by the quickstart, the benchmark and the end-to-end tests, and as a command:

    python -m scripts.local_swarm MODEL --nodes 3      # runs until Ctrl-C

Every process runs under a keeper (``process_keeper``), so nothing survives us. Readiness is the
line of JSON that ``swarm-node`` prints, never a fixed wait.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from scripts.process_keeper import KeptProcess
from swarm.catalogue.checkpoint import Checkpoint

SWARM_NODE = Path(sys.executable).with_name("swarm-node")


class SwarmStartError(Exception):
    """A seed or node did not come up; the text has its last words and where its log is."""


@dataclass(frozen=True, slots=True)
class Span:
    """Blocks ``[first_block, end_block)``."""

    first_block: int
    end_block: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process runs: on loopback, or behind a command prefix in a network namespace."""

    listen_ip: str = "127.0.0.1"
    command_prefix: tuple[str, ...] = ()


LOOPBACK = Place()


@dataclass(frozen=True, slots=True)
class SwarmPlan:
    """What to start. ``places`` are those of the seed and then of each node; empty: loopback."""

    model: Path
    spans: tuple[Span, ...]
    dtype: str = "float32"
    threads: int = 0
    """OpenMP threads of each node; 0: as ``OMP_NUM_THREADS`` says, else the cores, since only one
    node computes at a time in a chain that serves one session, and waiting threads sleep."""
    logs: Path | None = None
    """Folder for the logs; None: a temporary one, removed at the end unless the start failed."""
    start_deadline_s: float = 90.0
    places: tuple[Place, ...] = ()
    metrics: bool = True
    program: Path = SWARM_NODE
    """The command ``swarm-node``; by default that of the environment that we run in."""
    environment: Mapping[str, str] = field(default_factory=dict)
    environments: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """More for single members, by their names: ``seed``, ``node-1`` and so on."""


def equal_spans(blocks: int, nodes: int) -> tuple[Span, ...]:
    """``nodes`` spans that cover ``blocks``, their sizes differing by at most one."""
    if not 1 <= nodes <= blocks:
        raise ValueError(f"{blocks} blocks cannot be shared by {nodes} nodes")
    edges = [blocks * index // nodes for index in range(nodes + 1)]
    return tuple(Span(first, end) for first, end in itertools.pairwise(edges))


class Member:
    """One ``swarm-node`` process and what it said of itself when it was ready."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        plan: SwarmPlan,
        logs: Path,
        key: Path,
        place: Place,
    ) -> None:
        self.name = name
        self.arguments = tuple(arguments)
        self.key = key
        self.place = place
        self.log = logs / f"{name}.log"
        self.ready: dict[str, Any] = {}
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        with self.log.open("wb") as log:
            self.process = KeptProcess(
                self._command(plan),
                environment=_environment(plan) | dict(plan.environments.get(name, {})),
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._reader = threading.Thread(target=self._read, name=f"stdout of {name}", daemon=True)
        self._reader.start()

    @property
    def peer_id(self) -> str:
        return str(self.ready["peer_id"])

    @property
    def addresses(self) -> list[str]:
        """Full multiaddresses, with the peer id."""
        return [str(address) for address in self.ready["addresses"]]

    @property
    def metrics_url(self) -> str | None:
        url = self.ready.get("metrics_url")
        return None if url is None else str(url)

    @property
    def span(self) -> Span:
        return Span(int(self.ready["first_block"]), int(self.ready["end_block"]))

    def wait_until_ready(self, deadline_monotonic_s: float) -> None:
        """Read its events until it serves. Raises SwarmStartError."""
        while not self.ready:
            try:
                line = self._lines.get(timeout=max(0.0, deadline_monotonic_s - time.monotonic()))
            except queue.Empty:
                raise self._failed("was not ready in time") from None
            if line is None:
                raise self._failed(f"ended with exit code {self.process.wait()}")
            event = _event(line)
            if event.get("event") == "error":
                raise self._failed(str(event.get("message")))
            if event.get("event") == "ready":
                self.ready = event

    def stop(self) -> int:
        """End it cleanly; its exit code. A second call only gives the code again."""
        code = self.process.stop()
        self._reader.join()
        return code

    def _command(self, plan: SwarmPlan) -> list[str]:
        return [
            *(*self.place.command_prefix, str(plan.program), *self.arguments),
            *("--identity", str(self.key), "--name", self.name, "--json"),
            *("--listen", f"/ip4/{self.place.listen_ip}/tcp/0"),
        ]

    def _read(self) -> None:
        stdout = self.process.stdout
        if stdout is not None:
            with stdout, self.log.open("ab") as log:
                for line in stdout:
                    log.write(line)
                    log.flush()
                    self._lines.put(line)
        self._lines.put(None)

    def _failed(self, why: str) -> SwarmStartError:
        last_words = self.log.read_text(errors="replace").splitlines()[-15:]
        return SwarmStartError("\n  ".join([f"{self.name} {why}", *last_words, f"log: {self.log}"]))


class LocalSwarm:
    """A seed and nodes. Entering the ``with`` block waits until all serve; leaving it ends them."""

    def __init__(self, plan: SwarmPlan) -> None:
        self.plan = plan
        self.nodes: list[Member] = []
        self._members: list[Member] = []
        self._folder: Path | None = None
        self._restarts = 0

    @property
    def seed(self) -> Member:
        return self._members[0]

    @property
    def peers(self) -> list[str]:
        """Addresses of the seed: what ``--peers`` takes."""
        return self.seed.addresses

    @property
    def logs(self) -> Path:
        return self.seed.log.parent

    def __enter__(self) -> LocalSwarm:
        logs = self.plan.logs
        if logs is None:
            logs = self._folder = Path(tempfile.mkdtemp(prefix="sovereign-swarm-"))
        logs.mkdir(parents=True, exist_ok=True)
        try:
            deadline_s = time.monotonic() + self.plan.start_deadline_s
            self._start("seed", ["seed"], logs)
            self.seed.wait_until_ready(deadline_s)
            self.nodes = [
                self._start(f"node-{number}", self._join_arguments(number, span), logs)
                for number, span in enumerate(self.plan.spans, start=1)
            ]
            for node in self.nodes:
                node.wait_until_ready(deadline_s)
        except BaseException as error:
            # The log that the error names must outlive us.
            self.stop(keep_logs=isinstance(error, SwarmStartError))
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def add_node(self, span: Span, *, place: Place = LOOPBACK) -> Member:
        """Start one more node and wait until it serves. Raises SwarmStartError."""
        number = len(self._members)
        arguments = self._join_arguments(number, span)
        node = self._start(f"node-{number}", arguments, self.logs, place)
        node.wait_until_ready(time.monotonic() + self.plan.start_deadline_s)
        self.nodes.append(node)
        return node

    def restart(self, node: Member) -> Member:
        """Start a node again that has ended: same key, blocks and place; wait until it serves.

        The old member leaves :attr:`nodes`. Raises SwarmStartError.
        """
        node.stop()
        self._restarts += 1
        name = f"{node.name.partition('.')[0]}.{self._restarts}"
        again = self._start(name, node.arguments, self.logs, node.place, node.key)
        again.wait_until_ready(time.monotonic() + self.plan.start_deadline_s)
        self.nodes[self.nodes.index(node)] = again
        return again

    def stop(self, *, keep_logs: bool = False) -> dict[str, int]:
        """End nodes and then the seed; the exit code of each. A second call does nothing."""
        codes: dict[str, int] = {}
        for group in (self._members[1:], self._members[:1]):
            for member in group:
                member.process.ask_to_stop()
            for member in group:
                codes[member.name] = member.stop()
        if self._folder is not None and not keep_logs:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None
        return codes

    def _start(
        self,
        name: str,
        arguments: Sequence[str],
        logs: Path,
        place: Place | None = None,
        key: Path | None = None,
    ) -> Member:
        number = len(self._members)
        if place is None:
            place = self.plan.places[number] if number < len(self.plan.places) else LOOPBACK
        member = Member(name, arguments, self.plan, logs, key or logs / f"{name}.key", place)
        self._members.append(member)
        return member

    def _join_arguments(self, number: int, span: Span) -> list[str]:
        arguments = ["join", str(self.plan.model), "--dtype", self.plan.dtype, "--device", "cpu"]
        arguments += [
            "--blocks",
            f"{span.first_block}:{span.end_block}",
            "--peers",
            *self.peers[:1],
        ]
        if self.plan.metrics:
            arguments += ["--metrics-port", "0"]
        return arguments


def compute_environment(threads: int) -> dict[str, str]:
    """Variables for a process that shares this machine's cores with other computing processes.

    0 threads: as many as ``OMP_NUM_THREADS`` says, else the cores.
    """
    count = str(threads) if threads else os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
    return {"OMP_NUM_THREADS": count, "OMP_WAIT_POLICY": "passive"}


def _environment(plan: SwarmPlan) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    # A setting of the person at this machine must not reach a swarm that is not theirs.
    own = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}
    return own | compute_environment(plan.threads) | offline | dict(plan.environment)


def _event(line: bytes) -> dict[str, Any]:
    """The JSON object on ``line``; empty when it is something else, which is in the log."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def end_on_sigterm() -> None:
    """Make SIGTERM end us as Ctrl-C does: through the ``finally`` blocks."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def main() -> None:
    """Run a local swarm until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m scripts.local_swarm")
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument("--nodes", type=int, default=3, help="nodes with an equal share of blocks")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=0, help="per node; 0: the cores")
    parser.add_argument("--logs", type=Path, help="folder for the logs")
    options = parser.parse_args()
    console = Console()
    end_on_sigterm()
    spans = equal_spans(Checkpoint.open(options.model).number_of_blocks, options.nodes)
    plan = SwarmPlan(options.model, spans, options.dtype, options.threads, options.logs)
    try:
        with contextlib.ExitStack() as running:
            with console.status("starting the swarm"):
                swarm = running.enter_context(LocalSwarm(plan))
            for node in swarm.nodes:
                span = node.span
                console.print(f"  {node.name}  blocks {span.first_block}-{span.end_block - 1}")
            console.print(f"  --peers {swarm.peers[0]}", soft_wrap=True)
            console.print("  Ctrl-C stops the swarm", style="dim")
            signal.pause()
    except KeyboardInterrupt:
        console.print("  stopped")
    except SwarmStartError as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
