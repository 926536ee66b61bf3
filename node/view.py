"""What a volunteer sees: a live terminal view, plain lines, or JSON lines for programs.

All three are fed by a callable that returns a :class:`NodeStatus`; none of them knows where its
numbers come from. :func:`render` is pure and draws one snapshot.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import IO, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from swarm.catalogue.download import Progress

LIVE_PERIOD_S = 1.0
STATUS_PERIOD_S = 10.0
MAXIMUM_BAR_CELLS = 64
STATE_STYLES = {
    "online": "bold green",
    "draining": "bold yellow",
    "moving": "bold yellow",
    "resting": "dim",
    "stopped": "dim",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """A snapshot of a node or a seed. A seed has no blocks: ``model`` is empty."""

    state: str = "starting"
    """starting, looking, loading, joining, online, moving, draining, resting or stopped."""
    peer_id: str = ""
    display_name: str = ""
    addresses: tuple[str, ...] = ()
    """Multiaddresses with ``/p2p/PEER_ID``, as others write them after ``--peers``."""
    metrics_url: str = ""
    uptime_s: float = 0.0
    model: str = ""
    model_blocks: int = 0
    first_block: int = 0
    end_block: int = 0
    coverage: tuple[int, ...] = ()
    """Nodes that serve each block of the model, this one included while it is online.

    Empty when not known yet.
    """
    advice: str = ""
    """What the model lacks in this swarm and what would help; empty while it is healthy."""
    engine: str = ""
    """Device, dtype and threads, for people."""
    loading_fraction: float | None = None
    """Share of the span's weights that is loaded, while they are being loaded."""
    fetching: Progress | None = None
    """How far weights have come that are being fetched from others."""
    held: tuple[str, ...] = ()
    """Models whose weights a seed sends to others."""
    sessions: int = 0
    tokens: int = 0
    tokens_per_s: float = 0.0
    """Over the last 10 s."""
    queued_steps: int = 0
    cache_tokens_used: int = 0
    cache_tokens_total: int = 0
    refused: int = 0
    drain_left_s: float | None = None
    """How long a draining node will still wait for its sessions."""
    clock: str = ""
    """How far this computer's clock is off, in words; empty when it is right."""
    reachability: str = ""
    """How others reach this node, in words; empty when not known yet."""
    rests_until: str = ""
    """When a resting node goes on, local time; empty when that depends."""
    rests_because: tuple[str, ...] = ()
    """Why it rests, or leaves to rest, in words."""


StatusSource = Callable[[], NodeStatus]


class RecentRate:
    """Growth per second of a sum over the last ``window_s`` seconds."""

    def __init__(self, window_s: float = 10.0) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, int]] = deque()

    def update(self, now_s: float, total: int) -> float:
        """Note the sum at ``now_s`` (never decreasing) and return the rate."""
        samples = self._samples
        samples.append((now_s, total))
        while len(samples) > 2 and samples[1][0] <= now_s - self._window_s:
            samples.popleft()
        first_s, first_total = samples[0]
        return (total - first_total) / (now_s - first_s) if now_s > first_s else 0.0


class View(Protocol):
    """Shows a node to its owner."""

    async def watch(self, status: StatusSource) -> None:
        """Show the status again and again until cancelled."""

    def ready(self, status: NodeStatus) -> None:
        """The node now answers peers and has been announced."""

    def stopped(self) -> None:
        """The node has left the swarm."""

    def error(self, message: str) -> None:
        """The node cannot go on."""


class JsonView:
    """One JSON object per line on ``stream``; the ``event`` key tells what it is."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stdout

    async def watch(self, status: StatusSource) -> None:
        seconds, last = 0.0, status().state
        while True:
            await asyncio.sleep(LIVE_PERIOD_S)
            seconds += LIVE_PERIOD_S
            current = status()
            if seconds >= STATUS_PERIOD_S or current.state != last:
                seconds, last = 0.0, current.state
                self._write("status", asdict(current))

    def ready(self, status: NodeStatus) -> None:
        self._write(
            "ready",
            {
                "peer_id": status.peer_id,
                "addresses": status.addresses,
                "model": status.model,
                "first_block": status.first_block,
                "end_block": status.end_block,
                "metrics_url": status.metrics_url,
            },
        )

    def stopped(self) -> None:
        self._write("stopped", {})

    def error(self, message: str) -> None:
        self._write("error", {"message": message})

    def _write(self, event: str, content: dict[str, object]) -> None:
        self._stream.write(json.dumps({"event": event, **content}) + "\n")
        self._stream.flush()


class PlainView:
    """Calm lines for logs and pipes: each change of state, and the load when there is any."""

    def __init__(self, stream: IO[str] | None = None, *, period_s: float = LIVE_PERIOD_S) -> None:
        self._stream = stream or sys.stdout
        self._period_s = period_s
        self._last = ""

    async def watch(self, status: StatusSource) -> None:
        seconds = 0.0
        while True:
            current = status()
            if current.state != self._last:
                self._last = current.state
                self._line(f"{current.state} {describe_span(current)}".rstrip())
                seconds = 0.0
                self._explain(current)
            elif seconds >= STATUS_PERIOD_S:
                seconds = 0.0
                if current.fetching is not None:
                    self._line(f"fetching {describe_fetching(current.fetching)}")
                if current.sessions or current.tokens_per_s:
                    self._line(describe_load(current))
                if current.state == "draining":
                    self._explain(current)
            await asyncio.sleep(self._period_s)
            seconds += self._period_s

    def ready(self, status: NodeStatus) -> None:
        self._last = status.state
        self._line(f"{status.state} as {status.peer_id}, {describe_span(status)}".rstrip(", "))
        for address in status.addresses:
            self._line(f"address {address}")
        if status.metrics_url:
            self._line(f"metrics {status.metrics_url}")

    def stopped(self) -> None:
        self._line("stopped")

    def error(self, message: str) -> None:
        print(f"error: {message}", file=sys.stderr)

    def _explain(self, status: NodeStatus) -> None:
        for line in describe_absence(status):
            self._line(line)

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class LiveView:
    """The panel of :func:`render`, redrawn each second."""

    def __init__(self, console: Console, *, period_s: float = LIVE_PERIOD_S) -> None:
        self._console = console
        self._period_s = period_s

    async def watch(self, status: StatusSource) -> None:
        first = render(status())
        live = Live(
            first,
            console=self._console,
            auto_refresh=False,
            redirect_stderr=sys.stderr.isatty(),  # a log file stays a log file
        )
        with live:
            try:
                while True:
                    # Drawing takes some milliseconds: not on the loop that answers peers.
                    await asyncio.to_thread(live.update, render(status()), refresh=True)
                    await asyncio.sleep(self._period_s)
            finally:
                live.update(render(replace(status(), state="stopped")), refresh=True)

    def ready(self, status: NodeStatus) -> None:
        pass  # the panel shows it within a second

    def stopped(self) -> None:
        self._console.print("The node has left the swarm. Thank you.", style="dim")

    def error(self, message: str) -> None:
        self._console.print(Text.assemble(("error: ", "bold red"), message))


def make_view(*, as_json: bool, plain: bool) -> View:
    """The view for this process' standard output."""
    if as_json:
        return JsonView()
    if plain or not sys.stdout.isatty():
        return PlainView()
    return LiveView(Console())


def print_status(status: NodeStatus) -> None:
    """One snapshot on standard output."""
    Console().print(render(status))


# --- drawing -------------------------------------------------------------------------------------
def render(status: NodeStatus) -> RenderableType:
    """One snapshot as a panel of at most 100 columns."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    if status.fetching is not None:
        rows.add_row("fetching", _fetching_bar(status.fetching))
    for number, name in enumerate(status.held):
        rows.add_row("" if number else "holds", Text(name))
    if status.model:
        rows.add_row("model", Text(status.model))
        _add_blocks(rows, status)
        rows.add_row("engine", status.engine or "loading")
        if status.loading_fraction is not None:
            rows.add_row("weights", ProgressBar(1.0, status.loading_fraction, width=40))
        load = f"{status.sessions}   queue {status.queued_steps}   refused {status.refused}"
        rows.add_row("sessions", load)
        rows.add_row("tokens", f"{status.tokens_per_s:,.1f}/s   {status.tokens:,} in total")
        rows.add_row("cache", _cache(status))
    for number, line in enumerate(describe_absence(status)):
        rows.add_row("" if number else status.state, Text(line, "yellow"))
    if status.clock:
        rows.add_row("clock", Text(f"{status.clock}; the node makes up for it", "yellow"))
    if status.reachability:
        rows.add_row("reached", Text(status.reachability))
    rows.add_row("uptime", format_duration(status.uptime_s))
    rows.add_row("peer id", status.peer_id or "connecting")
    for number, address in enumerate(status.addresses):
        rows.add_row("" if number else "addresses", Text(address))
    if status.metrics_url:
        rows.add_row("metrics", status.metrics_url)
    title = Text.assemble(
        (status.display_name or ("node" if status.model else "seed"), "bold"),
        "  ",
        (status.state, STATE_STYLES.get(status.state, "bold cyan")),
    )
    leaving = status.state == "draining"
    hint = Text(
        "Ctrl-C again leaves at once" if leaving else "Ctrl-C leaves the swarm cleanly", "dim"
    )
    return Panel(Group(rows), title=title, subtitle=hint, width=100, padding=(1, 2))


def _fetching_bar(progress: Progress) -> RenderableType:
    line = Table.grid(padding=(0, 2))
    bar = ProgressBar(max(1, progress.bytes_total), progress.bytes_done, width=24)
    line.add_row(bar, Text(describe_fetching(progress)))
    return line


def describe_fetching(progress: Progress) -> str:
    """``45 % of 269 MB from 3 peers, 8.1 MB/s, 18 s left``."""
    share = progress.bytes_done / max(1, progress.bytes_total)
    peers = f"{progress.peers} peer{'' if progress.peers == 1 else 's'}"
    text = f"{share:.0%} of {progress.bytes_total / 1e6:,.0f} MB from {peers}"
    if progress.seconds_left is None:
        return f"{text}, waiting for somebody who has it"
    left = (
        format_duration(progress.seconds_left)
        if progress.seconds_left >= 60
        else (f"{progress.seconds_left:.0f} s")
    )
    return f"{text}, {progress.bytes_per_s / 1e6:.1f} MB/s, {left} left"


def _add_blocks(rows: Table, status: NodeStatus) -> None:
    if not status.model_blocks:
        return
    serving = status.end_block > status.first_block
    label = f"  {status.first_block}:{status.end_block} of {status.model_blocks}"
    rows.add_row("blocks", Text.assemble(span_bar(status), label if serving else ""))
    if status.coverage:
        missing = sum(1 for count in status.coverage if count == 0)
        weakest = f"  {missing} blocks without a node" if missing else "  every block is served"
        rows.add_row("swarm", Text.assemble(coverage_bar(status.coverage), weakest))
    if status.advice:
        rows.add_row("", Text(status.advice, "yellow"))


def span_bar(status: NodeStatus) -> Text:
    """The model from left to right, the own blocks filled."""
    bar = Text()
    for first, end in _cells(status.model_blocks):
        own = first < status.end_block and end > status.first_block
        bar.append("█" if own else "░", "green" if own else "dim")
    return bar


def coverage_bar(coverage: tuple[int, ...]) -> Text:
    """Per cell, the replicas of its least covered block, 1 to 9 or ``+``; ``·`` for none."""
    bar = Text()
    for first, end in _cells(len(coverage)):
        count = min(coverage[first:end])
        style = "red" if count == 0 else "yellow" if count == 1 else "green"
        bar.append("·" if count == 0 else str(count) if count < 10 else "+", style)
    return bar


def _cells(blocks: int) -> list[tuple[int, int]]:
    """Cut ``blocks`` into at most MAXIMUM_BAR_CELLS ranges of nearly equal length."""
    count = min(blocks, MAXIMUM_BAR_CELLS)
    return [(i * blocks // count, (i + 1) * blocks // count) for i in range(count)]


def _cache(status: NodeStatus) -> RenderableType:
    total = status.cache_tokens_total
    if not total:
        return "none yet"
    line = Table.grid(padding=(0, 2))
    used = status.cache_tokens_used
    line.add_row(ProgressBar(total, used, width=24), f"{used:,} of {total:,} tokens reserved")
    return line


def describe_span(status: NodeStatus) -> str:
    """``blocks 0:10 of 30 of MODEL (ENGINE)``; empty for a seed or while nothing is chosen."""
    if not status.model or status.end_block <= status.first_block:
        return ""
    engine = f" ({status.engine})" if status.engine else ""
    return (
        f"blocks {status.first_block}:{status.end_block} of {status.model_blocks} "
        f"of {status.model}{engine}"
    )


def describe_absence(status: NodeStatus) -> list[str]:
    """What a node that leaves or rests still does for whom; empty for all others."""
    if status.state == "resting":
        why = f"{', '.join(status.rests_because)}; " if status.rests_because else ""
        when = f"at {status.rests_until}" if status.rests_until else "when that has passed"
        if status.rests_because == ("paused",) and not status.rests_until:
            when = "after swarm-node resume"
        return [f"{why}works again {when}; Ctrl-C ends it for good"]
    if status.state != "draining":
        return []
    sessions = f"{status.sessions} session{'' if status.sessions == 1 else 's'}"
    left_s = status.drain_left_s or 0.0
    if not status.sessions:
        return ["no sessions are left here"]
    lines = [f"{sessions} still here; waits {left_s:.0f} s at most until all are handed over"]
    alone = [
        block
        for block in range(status.first_block, min(status.end_block, len(status.coverage)))
        if not status.coverage[block]
    ]
    if alone:
        blocks = f"block {alone[0]}" if len(alone) == 1 else f"blocks {alone[0]}-{alone[-1]}"
        lines.append(f"nobody else has {blocks}: what runs here then ends with this node")
    return lines


def describe_load(status: NodeStatus) -> str:
    """One line of numbers for logs."""
    return (
        f"sessions {status.sessions}, {status.tokens_per_s:.1f} tokens/s, "
        f"{status.tokens} tokens in total, cache {status.cache_tokens_used} of "
        f"{status.cache_tokens_total} tokens, queue {status.queued_steps}"
    )


def format_duration(duration_s: float) -> str:
    """``2 d 03:04:05``."""
    seconds = int(duration_s)
    days, seconds = divmod(seconds, 86400)
    clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{days} d {clock}" if days else clock
