"""A local swarm with replicas whose nodes get hurt and are started again."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import urllib.request
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Self

from scripts.faults.network import Hosts, Partition, run_in_namespace
from scripts.faults.processes import PROCESS_FAULTS, Drain, Fault, Processes
from scripts.local_swarm import LocalSwarm, Member, Span, SwarmPlan, equal_spans
from scripts.netlab import Host
from swarm.catalogue.checkpoint import Checkpoint
from swarm.protocol.identity import PeerId

POLL_S = 0.02
METRICS_TIMEOUT_S = 2.0
START_DEADLINE_S = 240.0
REST_METRICS = (
    "sessions_open",
    "cache_tokens_used",
    "session_streams",
    "queued_steps",
    "journal_bytes",
)
"""Of a node; 0 while no session is open."""
TASKS = "swarm_node_tasks"
REST_LOOKS = 30
OWN_TASKS = 28
"""So many more than before it met others does a node have for those that it watches, and that watch
it: three each at rest, more when some of them are gone."""


class Fighter:
    """One node of the arena: its member, its processes, and what is wrong with it now."""

    def __init__(self, member: Member, stage: int, host: Host | None = None) -> None:
        self.member = member
        self.host = host
        self.stage = stage
        """Which of the equal spans it hosts, from 0."""
        self.processes = Processes(member)
        self.started_s = time.monotonic()
        self.fault: Fault | None = None

    @property
    def peer_id(self) -> PeerId:
        return PeerId(self.member.peer_id)

    @property
    def name(self) -> str:
        return self.member.name

    def metrics(self) -> str:
        """All metrics as text; blocks, and raises OSError."""
        url = self.member.metrics_url
        if url is None:
            raise ValueError(f"{self.name} has no metrics")
        if self.host is None:
            return _fetch(url)
        return run_in_namespace(self.host.namespace, lambda: _fetch(url))

    async def metric_soon(self, pattern: str) -> float:
        """The sum of all metrics whose name and labels match. Raises OSError."""
        return metric_sum(await asyncio.to_thread(self.metrics), pattern)


class Arena:
    """``stages`` equal spans with ``replicas`` nodes each. Entering waits until all serve."""

    def __init__(
        self,
        model: Path,
        *,
        stages: int = 3,
        replicas: int = 2,
        logs: Path | None = None,
        hosts: Hosts | None = None,
    ) -> None:
        """With ``hosts`` (as many as nodes) each node has its own; otherwise all is on loopback."""
        spans = equal_spans(Checkpoint.open(model).number_of_blocks, stages)
        self.stages = stages
        self.swarm = LocalSwarm(
            SwarmPlan(
                model,
                tuple(span for _ in range(replicas) for span in spans),
                threads=1,
                logs=logs,
                start_deadline_s=START_DEADLINE_S,
                places=() if hosts is None else hosts.places,
            )
        )
        self.fighters: dict[PeerId, Fighter] = {}
        self.problems: list[str] = []
        """What is wrong with nodes beside their sessions."""
        self._spans = spans
        self._hosts = hosts
        self._mending: set[asyncio.Task[None]] = set()
        self._hurrying = asyncio.Event()
        self._recomputed: dict[Fighter, int] = {}
        self._least_tasks: dict[Fighter, float] = {}

    def __enter__(self) -> Self:
        self.swarm.__enter__()
        for member in self.swarm.nodes:
            self._add(member)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for fighter in self.fighters.values():
            if fighter.fault is not None:
                fighter.fault.undo()
        self.swarm.__exit__(kind, error, traceback)

    @property
    def client_ip(self) -> str:
        """Where a client listens."""
        return "127.0.0.1" if self._hosts is None else self._hosts.client.address

    def span(self, stage: int) -> Span:
        """The blocks of one stage."""
        return self._spans[stage]

    def live(self, stage: int) -> list[Fighter]:
        """Nodes of a stage with which nothing is wrong."""
        return [one for one in self.fighters.values() if one.stage == stage and one.fault is None]

    def may_hurt(self, fighter: Fighter) -> bool:
        """Whether its blocks keep another live replica."""
        return fighter.fault is None and len(self.live(fighter.stage)) > 1

    def hurt(self, fighter: Fighter, kind: str) -> float:
        """Let a fault happen at once; the monotonic time at which it did."""
        fault: Fault
        if kind == Partition.kind:
            if self._hosts is None or fighter.host is None:
                raise ValueError("partitions need the network lab")
            fault = Partition(self._hosts, fighter.host)
        else:
            fault = PROCESS_FAULTS[kind](fighter.processes)
        fighter.fault = fault
        hurt_s = time.monotonic()
        fault.apply()
        return hurt_s

    async def client_offline(self, duration_s: float) -> float:
        """Take the client's network away for a while; the monotonic time at which it was back.

        Only with hosts.
        """
        if self._hosts is None:
            raise ValueError("only a client in the network lab can lose its network")
        cut = Partition(self._hosts, self._hosts.client)
        cut.apply()
        try:
            await asyncio.sleep(duration_s)
        finally:
            cut.undo()
        return time.monotonic()

    async def mend(self, fighter: Fighter) -> None:
        """Undo its fault; a node that ended is started again, and this waits until it serves."""
        fault = fighter.fault
        if fault is None:
            return
        await asyncio.to_thread(fault.undo)
        if fault.ends_node:
            code = await asyncio.to_thread(fighter.member.process.wait, 120.0)
            if fault.kind == Drain.kind and code != 0:
                self.problems.append(f"{fighter.name} was to leave, and ended with code {code}")
            del self.fighters[fighter.peer_id]
            self._add(await asyncio.to_thread(self.swarm.restart, fighter.member))
        else:
            fighter.fault = None

    def mend_soon(self, fighter: Fighter, after_s: float = 0.0) -> None:
        """``mend`` in the background; :meth:`mended` waits and raises what went wrong."""

        async def mend() -> None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurrying.wait(), after_s)
            await self.mend(fighter)

        self._mending.add(asyncio.get_running_loop().create_task(mend()))

    async def mended(self) -> None:
        """Wait until all that is being mended serves again, and mend it now. Raises as it may."""
        self._hurrying.set()
        while self._mending:
            task = next(iter(self._mending))
            await task
            self._mending.discard(task)
        self._hurrying.clear()

    async def wait_for_live(
        self, stage: int, count: int, timeout_s: float = START_DEADLINE_S
    ) -> None:
        """Wait until a stage has ``count`` live nodes. Raises what kept a node from starting."""
        await until(lambda: self._has_live(stage, count), timeout_s, f"{count} nodes of {stage}")

    def _has_live(self, stage: int, count: int) -> bool:
        for task in tuple(self._mending):
            if task.done():
                self._mending.discard(task)
                task.result()
        return len(self.live(stage)) >= count

    async def recomputed_tokens(self) -> int:
        """Tokens that nodes have computed again for healing sessions, as far as they can tell."""
        for fighter in tuple(self.fighters.values()):
            if fighter.fault is None:
                with contextlib.suppress(OSError):
                    count = await fighter.metric_soon("swarm_node_replayed_tokens_total")
                    self._recomputed[fighter] = int(count)
        return sum(self._recomputed.values())

    async def note_rest(self) -> None:
        """Take the tasks of nodes for what a node has at rest; while no session is open."""
        fighters = self.live_ones()
        for _ in range(REST_LOOKS):
            counts = await asyncio.gather(*(one.metric_soon(TASKS) for one in fighters))
            for fighter, count in zip(fighters, counts, strict=True):
                self._least_tasks[fighter] = min(count, self._least_tasks.get(fighter, count))
            await asyncio.sleep(POLL_S * 5)

    async def leaks(self, timeout_s: float, ignored: Collection[Fighter] = ()) -> list[str]:
        """What is left of sessions on live nodes, once it is nothing or ``timeout_s`` have passed.

        Only while no session should be open.
        """
        deadline_s = time.monotonic() + timeout_s
        suspects = [one for one in self.live_ones() if one not in ignored]
        while True:
            found = {one: left for one in suspects if (left := await self._left_on(one))}
            if not found or time.monotonic() > deadline_s:
                return [f"{one.name}: {left}" for one, left in found.items()]
            suspects = list(found)
            await asyncio.sleep(POLL_S * 5)

    def live_ones(self) -> list[Fighter]:
        """All nodes with which nothing is wrong."""
        return [one for one in self.fighters.values() if one.fault is None]

    async def _left_on(self, fighter: Fighter) -> str:
        try:
            text = await asyncio.to_thread(fighter.metrics)
        except OSError as error:
            return str(error)
        left = [
            f"{metric} {value:.0f}"
            for metric in REST_METRICS
            if (value := metric_sum(text, f"swarm_node_{metric}"))
        ]
        tasks = metric_sum(text, TASKS)
        at_rest = max(self._least_tasks.values(), default=tasks)
        if tasks > at_rest + OWN_TASKS:
            left.append(f"{tasks:.0f} tasks, {at_rest:.0f} at rest")
        return ", ".join(left)

    def _add(self, member: Member) -> None:
        host = None if self._hosts is None else self._hosts.of(member.place)
        fighter = Fighter(member, self._spans.index(member.span), host)
        self.fighters[fighter.peer_id] = fighter


def metric_sum(text: str, pattern: str) -> float:
    """Of all metrics in Prometheus' text format whose name and labels match."""
    return sum(map(float, re.findall(rf"^{pattern} (\S+)$", text, re.MULTILINE)))


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=METRICS_TIMEOUT_S) as response:  # noqa: S310  (loopback)
        return str(response.read().decode())


async def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait for a condition that something else brings about. Raises TimeoutError."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        await asyncio.sleep(POLL_S)
