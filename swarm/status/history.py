"""What has been, bin by bin, for charts and programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean

from swarm.status.charts import Point
from swarm.status.database import BIN_S, Database
from swarm.status.rows import DAY_S


@dataclass(frozen=True, slots=True)
class Range:
    """How far back, and in which steps."""

    name: str
    span_s: int
    bin_s: int


DAY = Range("day", DAY_S, BIN_S)
MONTH = Range("month", 30 * DAY_S, 24 * BIN_S)
RANGES = {item.name: item for item in (DAY, MONTH)}


@dataclass(frozen=True, slots=True)
class History:
    """Curves of one model, or of the whole swarm."""

    range: Range
    end_unix_s: float
    curves: dict[str, tuple[Point, ...]] = field(default_factory=dict)
    """nodes, tokens (per hour), energy (W); of one model also least (replicas of the weakest
    block), first_token (s) and probed_speed (tokens/s). Empty ones are left out."""


def read_history(database: Database, revision: str, now_unix_s: float, of: Range) -> History:
    """``revision`` empty: of all models."""
    begin = now_unix_s - of.span_s
    samples = database.samples(revision, begin, of.bin_s)
    per_hour = 3600 / of.bin_s
    curves: dict[str, list[Point]] = {
        "nodes": [(start, nodes) for start, nodes, *_ in samples],
        "tokens": [(start, tokens * per_hour) for start, _, _, tokens, _ in samples],
    }
    if any(energy for *_, energy in samples):
        curves["energy"] = [(start, energy / of.bin_s) for start, *_, energy in samples]
    if revision:
        curves["least"] = [(start, float(least)) for start, _, least, *_ in samples]
        probes = [probe for probe in database.probes(revision, begin) if probe.succeeded]
        curves["first_token"] = _binned(
            ((probe.at_unix_s, probe.time_to_first_token_s) for probe in probes), of.bin_s
        )
        curves["probed_speed"] = _binned(
            ((probe.at_unix_s, probe.tokens_per_s) for probe in probes), of.bin_s
        )
    middle = of.bin_s / 2
    return History(
        of,
        now_unix_s,
        {
            name: tuple((min(at + middle, now_unix_s), value) for at, value in points)
            for name, points in curves.items()
            if points
        },
    )


def _binned(points: Iterable[Point], bin_s: int) -> list[Point]:
    """The mean of each bin."""
    bins: defaultdict[int, list[float]] = defaultdict(list)
    for at, value in points:
        bins[int(at) // bin_s * bin_s].append(value)
    return [(float(start), fmean(values)) for start, values in sorted(bins.items())]
