"""How fast does a swarm answer, next to transformers on the same machine?

    python -m scripts.bench.inference                        # all models, some 20 minutes
    python -m scripts.bench.inference --quick                # SmolLM2, three nodes, under a minute
    python -m scripts.bench.inference --link 100mbit,50ms    # over emulated links; needs root

Method: the local baseline, the clients and all nodes are processes of their own that stay up
together; one of them works at a time. Each repetition runs every variant once, in an order that
rotates, so that a slow phase of the machine hits all alike, and ratios are taken repetition by
repetition. Local and swarm use the same checkpoint, precision and number of threads, greedy choice
and the same random prompts; local threads wait as OpenMP does by default, which is their best.
Decode speed is counted from the first token to the last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from scripts.bench.models import BenchModel, random_llama
from scripts.bench.report import (
    LOCAL,
    Metric,
    ModelReport,
    NodeMemory,
    as_json,
    memory_table,
    speed_table,
)
from scripts.bench.worker import Worker, WorkerError
from scripts.local_swarm import (
    LOOPBACK,
    LocalSwarm,
    Place,
    SwarmPlan,
    SwarmStartError,
    end_on_sigterm,
    equal_spans,
)
from scripts.netlab import Host, Lab, LabUnavailable, Link
from scripts.prepare_demo_model import PreparationError, prepare_with_progress

MODELS = ("smollm2", "smollm2-bf16", "llama")
SHORT_PROMPT_TOKENS, LONG_PROMPT_TOKENS = 16, 512
RECEIVED = re.compile(r'^swarm_node_bytes_total\{direction="in"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run does."""

    models: tuple[str, ...]
    node_counts: tuple[int, ...]
    session_counts: tuple[int, ...]
    """Concurrent sessions over the asynchronous API."""
    repetitions: int
    new_tokens: int
    threads: int
    link: Link | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to generate, with its processes up."""

    name: str
    worker: Worker
    swarm: LocalSwarm | None = None


class Bench:
    """Runs one model in all variants. ``tell`` gets a line for each piece of work."""

    def __init__(self, model: BenchModel, settings: Settings, tell: Callable[[str], None]) -> None:
        self._model = model
        self._settings = settings
        self._tell = tell
        self._report = ModelReport(f"{model.label}, {model.dtype}, {settings.threads} threads")

    def run(self) -> ModelReport:
        """Start everything, measure, stop everything."""
        settings, report = self._settings, self._report
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-bench-")))
            if settings.link is None:
                variants = self._compare_with_local(stack, folder)
            else:
                variants = self._compare_with_loopback(stack, folder, settings.link)
            before = {name: dict(self._node_memory(swarm)) for name, swarm in _swarms(variants)}
            for variant in variants:
                self._tell(f"{variant.name}: loading")
                variant.worker.wait_until_ready()
            for variant in variants:
                self._tell(f"{variant.name}: warming up")
                variant.worker.generate(LONG_PROMPT_TOKENS, 4)
            for repetition in range(settings.repetitions):
                shift = repetition % len(variants)
                for variant in variants[shift:] + variants[:shift]:
                    self._tell(f"repetition {repetition + 1}: {variant.name}")
                    self._measure(variant)
            self._count_bytes(variants[-1])
            self._weigh(variants[-1], before)
            self._compare_sessions(variants[-1].name)
            if settings.link is not None:
                self._judge_link(settings.link, max(settings.node_counts))
        return report

    def _compare_with_local(self, stack: contextlib.ExitStack, folder: Path) -> list[Variant]:
        variants = [Variant(LOCAL, stack.enter_context(self._worker(LOCAL, folder)))]
        variants += [
            self._swarm_variant(stack, folder, _nodes(count), count)
            for count in self._settings.node_counts
        ]
        return variants

    def _compare_with_loopback(
        self, stack: contextlib.ExitStack, folder: Path, link: Link
    ) -> list[Variant]:
        count = max(self._settings.node_counts)
        near = self._swarm_variant(stack, folder, f"{_nodes(count)}, loopback", count)
        lab = stack.enter_context(Lab())
        names = ["client", "seed", *(f"node-{number}" for number in range(1, count + 1))]
        hosts = [lab.host(name) for name in names]
        lab.star(hosts, link)
        far = self._swarm_variant(stack, folder, f"{_nodes(count)}, links", count, hosts)
        return [near, far]

    def _swarm_variant(
        self,
        stack: contextlib.ExitStack,
        folder: Path,
        name: str,
        count: int,
        hosts: list[Host] | None = None,
    ) -> Variant:
        self._tell(f"{name}: starting")
        places = tuple(
            Place(listen_ip=host.address, command_prefix=host.command_prefix)
            for host in hosts or []
        )
        plan = SwarmPlan(
            self._model.path,
            equal_spans(self._model.blocks, count),
            self._model.dtype,
            self._settings.threads,
            logs=folder / name.replace(" ", "-"),
            places=places[1:],
        )
        swarm = stack.enter_context(LocalSwarm(plan))
        place = places[0] if places else LOOPBACK
        worker = self._worker("swarm", folder, name, swarm.peers[0], place)
        return Variant(name, stack.enter_context(worker), swarm)

    def _worker(
        self,
        kind: str,
        folder: Path,
        name: str = LOCAL,
        peer: str | None = None,
        place: Place = LOOPBACK,
    ) -> Worker:
        return Worker(
            kind,
            self._model.path,
            self._model.dtype,
            threads=self._settings.threads,
            log=folder / f"worker-{name}.log",
            peer=peer,
            place=place,
        )

    def _measure(self, variant: Variant) -> None:
        new, samples = self._settings.new_tokens, self._report.samples
        for prompt in (SHORT_PROMPT_TOKENS, LONG_PROMPT_TOKENS):
            one = variant.worker.generate(prompt, new)
            decode = Metric(f"decode after {prompt} tokens", "tokens/s")
            samples.add(variant.name, decode, one.decode_rate)
            first = Metric(f"first token after {prompt} tokens", "s", higher_is_better=False)
            samples.add(variant.name, first, one.first_s[0])
        if variant.swarm is None:
            return
        for sessions in self._settings.session_counts:
            several = variant.worker.generate(SHORT_PROMPT_TOKENS, new, sessions)
            samples.add(variant.name, together(sessions), several.aggregate_rate)
            each = Metric(f"{_sessions(sessions)}, each", "tokens/s")
            samples.add(variant.name, each, several.decode_rate)

    def _count_bytes(self, variant: Variant) -> None:
        """Bytes that a node receives per decoded token: a long answer less a short one."""
        if variant.swarm is None or self._settings.link is not None:
            return  # a node's metrics are on the loopback of its own host
        few, many = 4, 4 + self._settings.new_tokens
        readings = [_received(variant.swarm)]
        for new_tokens in (few, many):
            variant.worker.generate(SHORT_PROMPT_TOKENS, new_tokens)
            readings.append(_received(variant.swarm))
        start, short, long = readings
        for node in start:
            extra = (long[node] - short[node]) - (short[node] - start[node])
            self._report.bytes_per_token[node] = extra / (many - few)

    def _node_memory(self, swarm: LocalSwarm) -> Iterator[tuple[str, tuple[int, int]]]:
        """Resident bytes of each node's own process and of its daemon."""
        for node in swarm.nodes:
            process, *others = psutil.Process(node.process.keeper_pid).children(recursive=True)
            daemons = sum(other.memory_info().rss for other in others)
            yield node.name, (process.memory_info().rss, daemons)

    def _weigh(self, variant: Variant, before: dict[str, dict[str, tuple[int, int]]]) -> None:
        if variant.swarm is None:
            return
        after = dict(self._node_memory(variant.swarm))
        for node in variant.swarm.nodes:
            span = node.span
            process_bytes, daemon_bytes = before[variant.name][node.name]
            self._report.memory.append(
                NodeMemory(
                    node.name,
                    self._model.span_bytes(span.first_block, span.end_block),
                    process_bytes,
                    after[node.name][0],
                    daemon_bytes,
                )
            )

    def _compare_sessions(self, variant: str) -> None:
        """What concurrency brings: all sessions together against one alone."""
        values = self._report.samples.values[variant]
        alone = values.get(together(1))
        for sessions in self._settings.session_counts:
            if alone is not None and sessions > 1:
                pairs = zip(values[together(sessions)], alone, strict=True)
                gain = statistics.median(several / one for several, one in pairs)
                self._report.notes.append(f"{variant}: {sessions} sessions give {gain:.2f}x of one")

    def _judge_link(self, link: Link, hops: int) -> None:
        """Time per token against the one-way latencies and the time that loopback takes."""
        values = self._report.samples.values
        metric = Metric(f"decode after {SHORT_PROMPT_TOKENS} tokens", "tokens/s")
        near_ms, far_ms = (
            [1e3 / rate for rate in values[f"{_nodes(hops)}, {where}"][metric]]
            for where in ("loopback", "links")
        )
        ways_ms = (hops + 1) * link.latency_ms
        ratios = [far / (ways_ms + near) for near, far in zip(near_ms, far_ms, strict=True)]
        self._report.notes.append(
            f"time per token over links: {statistics.median(far_ms):.1f} ms; {hops + 1} one-way "
            f"latencies {ways_ms:.0f} ms + loopback {statistics.median(near_ms):.1f} ms; "
            f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f})"
        )


def together(sessions: int) -> Metric:
    """Throughput of all concurrent sessions."""
    return Metric(f"{_sessions(sessions)}, together", "tokens/s")


def _sessions(count: int) -> str:
    return "1 session" if count == 1 else f"{count} sessions"


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _swarms(variants: list[Variant]) -> Iterator[tuple[str, LocalSwarm]]:
    for variant in variants:
        if variant.swarm is not None:
            yield variant.name, variant.swarm


def _received(swarm: LocalSwarm) -> dict[str, float]:
    """Bytes of frames that each node has received on session streams so far."""
    received: dict[str, float] = {}
    for node in swarm.nodes:
        if node.metrics_url is not None:
            with urllib.request.urlopen(node.metrics_url, timeout=10) as answer:  # noqa: S310
                found = RECEIVED.search(answer.read().decode())
                received[node.name] = float(found[1]) if found else 0.0
    return received


def hardware() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    packages = ("torch", "transformers", "hivemind")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_1_min": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def bench_models(names: tuple[str, ...], console: Console) -> Iterator[BenchModel]:
    """The models, made when they are missing."""
    for name in names:
        if name == "llama":
            with console.status("making a random Llama of 0.8 billion weights"):
                path = random_llama()
            yield BenchModel("random Llama 0.8 B", path, "bfloat16")
        else:
            dtype = "bfloat16" if name.endswith("bf16") else "float32"
            yield BenchModel("SmolLM2-135M", prepare_with_progress(console), dtype)


def run(settings: Settings, console: Console) -> list[ModelReport]:
    """All models, one after the other, with a line of progress."""
    reports = []
    for model in bench_models(settings.models, console):
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, BarColumn(), console=console, transient=True) as progress:
            title = f"{model.label} {model.dtype}"
            task = progress.add_task(title, total=None)

            def tell(text: str, title: str = title, task: Any = task, on: Any = progress) -> None:
                on.update(task, description=f"{title}  [dim]{text}[/]")

            reports.append(Bench(model, settings, tell).run())
    return reports


def print_reports(reports: list[ModelReport], console: Console) -> None:
    """Tables for a person."""
    machine = hardware()
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB; "
        f"torch {machine['torch']}, transformers {machine['transformers']}, "
        f"hivemind {machine['hivemind']}; load {machine['load_1_min']:.1f}",
        style="dim",
    )
    for report in reports:
        console.print()
        console.print(speed_table(report))
        if report.memory:
            console.print(memory_table(report))
        for node, size in report.bytes_per_token.items():
            console.print(f"  {node} receives {size:.0f} bytes per decoded token")
        for note in report.notes:
            console.print(f"  {note}")
    console.print(
        "\nratios: swarm / local transformers.generate, repetition by repetition; decode from the "
        "first token to the last; all processes up, one working at a time",
        style="dim",
    )


def parse_link(text: str) -> Link:
    """``100mbit,50ms``: rate of each host's access, round trip between any two hosts."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)mbit,(\d+(?:\.\d+)?)ms", text.replace(" ", "").lower())
    if match is None:
        raise argparse.ArgumentTypeError("write for example 100mbit,50ms (the round trip)")
    return Link(rate_mbit_s=float(match[1]), latency_ms=float(match[2]) / 2)


def parse_counts(text: str) -> tuple[int, ...]:
    """``1,2,3``"""
    return tuple(int(part) for part in text.split(",") if part)


def parse_settings() -> tuple[Settings, bool]:
    """The settings, and whether JSON is wanted."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.inference")
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--nodes", type=parse_counts, default=(1, 2, 3))
    parser.add_argument("--sessions", type=parse_counts, default=(1, 2, 4, 8))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--link", type=parse_link, help="as 100mbit,50ms; needs root")
    parser.add_argument("--quick", action="store_true", help="SmolLM2 fp32, 3 nodes, < 60 s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    models = tuple(options.models.split(","))
    if unknown := set(models) - set(MODELS):
        parser.error(f"unknown model: {', '.join(sorted(unknown))}")
    if options.quick:
        sessions = () if options.link else (1, 8)
        settings = Settings(("smollm2",), (3,), sessions, 3, 16, options.threads, options.link)
    else:
        settings = Settings(
            models,
            options.nodes,
            () if options.link else options.sessions,
            options.repetitions,
            options.new_tokens,
            options.threads,
            options.link,
        )
    return settings, options.json


def main() -> None:
    """Parse the flags, run, print."""
    settings, wants_json = parse_settings()
    console = Console(stderr=wants_json)
    end_on_sigterm()
    started_s = time.monotonic()
    try:
        reports = run(settings, console)
    except (LabUnavailable, OSError, PreparationError, SwarmStartError, WorkerError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("stopped")
        sys.exit(130)
    if wants_json:
        method = " ".join((__doc__ or "").partition("Method: ")[2].split())
        models = [as_json(report) for report in reports]
        print(json.dumps({"method": method, "hardware": hardware(), "models": models}, indent=2))
    else:
        print_reports(reports, console)
        console.print(f"took {time.monotonic() - started_s:.0f} s", style="dim")


if __name__ == "__main__":
    main()
