"""What the inference benchmark found: samples, their summaries and the tables. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Metric:
    """Something that is measured in every repetition."""

    name: str
    unit: str
    higher_is_better: bool = True


@dataclass(slots=True)
class Samples:
    """One value per repetition of each metric of each variant (``local``, ``3 nodes``, ...)."""

    values: dict[str, dict[Metric, list[float]]] = field(default_factory=dict)

    def add(self, variant: str, metric: Metric, value: float) -> None:
        """Values of one repetition must be added before those of the next."""
        self.values.setdefault(variant, {}).setdefault(metric, []).append(value)

    def metrics(self) -> list[Metric]:
        """All metrics in the order in which they first came."""
        return list(dict.fromkeys(m for by_metric in self.values.values() for m in by_metric))

    def ratios(self, variant: str, base: str, metric: Metric) -> list[float]:
        """``variant / base``, repetition by repetition; empty when one of them lacks the metric."""
        ours = self.values.get(variant, {}).get(metric, [])
        theirs = self.values.get(base, {}).get(metric, [])
        return [one / other for one, other in zip(ours, theirs, strict=False)]


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """Resident memory of one node, without cache (no session open) and its daemon apart."""

    node: str
    span_bytes: int
    process_bytes: int
    after_sessions_bytes: int
    """The same after all sessions have closed: what the allocator did not give back included."""
    daemon_bytes: int

    @property
    def limit_bytes(self) -> int:
        """What we promise: 1.3 times the span and 450 MB."""
        return int(1.3 * self.span_bytes) + 450_000_000


@dataclass(slots=True)
class ModelReport:
    """Everything that was found out about one model."""

    label: str
    samples: Samples = field(default_factory=Samples)
    memory: list[NodeMemory] = field(default_factory=list)
    bytes_per_token: dict[str, float] = field(default_factory=dict)
    """Bytes that a node received for one decoded token, by node."""
    notes: list[str] = field(default_factory=list)


def spread(values: Sequence[float]) -> str:
    """``median (lowest..highest)``."""
    middle = statistics.median(values)
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} [dim]({min(values):.{digits}f}..{max(values):.{digits}f})[/]"


def speed_table(report: ModelReport) -> Table:
    """Metrics down, variants across; below each swarm's value its ratio to local."""
    samples = report.samples
    variants = list(samples.values)
    table = Table(title=report.label, title_justify="left", title_style="bold")
    table.add_column("median (lowest..highest)")
    for variant in variants:
        table.add_column(variant, justify="right")
    for metric in samples.metrics():
        cells = []
        for variant in variants:
            values = samples.values[variant].get(metric)
            cell = spread(values) if values else "[dim]-[/]"
            ratios = samples.ratios(variant, LOCAL, metric) if variant != LOCAL else []
            if ratios:
                middle = statistics.median(ratios)
                good = middle >= 1 if metric.higher_is_better else middle <= 1
                colour = "green" if good else "yellow"
                cell += (
                    f"\n[{colour}]{middle:.2f}x[/] [dim]({min(ratios):.2f}..{max(ratios):.2f})[/]"
                )
            cells.append(cell)
        table.add_row(f"{metric.name}, {metric.unit}", *cells)
    return table


def memory_table(report: ModelReport) -> Table:
    """Resident memory of each node against what it may be, in MB."""
    table = Table(title="memory of the nodes, MB", title_justify="left", title_style="bold")
    for column in ("node", "span", "process", "after sessions", "1.3 span + 450", "p2pd"):
        table.add_column(column, justify="left" if column == "node" else "right")
    for node in report.memory:
        colour = "green" if node.process_bytes <= node.limit_bytes else "red"
        table.add_row(
            node.node,
            f"{node.span_bytes / 1e6:.0f}",
            f"[{colour}]{node.process_bytes / 1e6:.0f}[/]",
            f"{node.after_sessions_bytes / 1e6:.0f}",
            f"{node.limit_bytes / 1e6:.0f}",
            f"{node.daemon_bytes / 1e6:.0f}",
        )
    return table


def as_json(report: ModelReport) -> dict[str, Any]:
    """All samples and what the tables show, for programs."""
    samples = report.samples
    speeds: list[dict[str, Any]] = []
    for variant, by_metric in samples.values.items():
        for metric, values in by_metric.items():
            ratios = samples.ratios(variant, LOCAL, metric) if variant != LOCAL else []
            speeds.append(
                {
                    "variant": variant,
                    "metric": metric.name,
                    "unit": metric.unit,
                    "median": statistics.median(values),
                    "samples": values,
                    "ratio_to_local": statistics.median(ratios) if ratios else None,
                }
            )
    memory = [
        {
            "node": node.node,
            "span_bytes": node.span_bytes,
            "process_bytes": node.process_bytes,
            "after_sessions_bytes": node.after_sessions_bytes,
            "limit_bytes": node.limit_bytes,
            "daemon_bytes": node.daemon_bytes,
        }
        for node in report.memory
    ]
    return {
        "model": report.label,
        "speeds": speeds,
        "memory": memory,
        "bytes_per_token": report.bytes_per_token,
        "notes": report.notes,
    }
