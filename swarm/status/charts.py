"""Line charts as SVG, made here, so that history needs no script; pure.

Colours and fonts come from the style sheet by classes: the charts follow dark and light.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 180
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 10, 22
MOST_STEPS = 4
SMALLEST = 1e-9
"""Values below are drawn as zero."""
GAP_BINS = 2.5
"""Points further apart are not joined: nobody looked in between."""

Point = tuple[float, float]
"""Unix seconds, and a value that is not negative."""


@dataclass(frozen=True, slots=True)
class Axes:
    """What a chart spans, and how its labels are written."""

    begin_unix_s: float
    end_unix_s: float
    bin_s: float
    ticks: int
    """Labels below."""
    time: Callable[[float], str]
    number: Callable[[float], str]


def line_chart(points: Sequence[Point], axes: Axes, label: str, *, whole: bool = False) -> Markup:
    """A chart with its summary ``label`` for those who do not see it; ``whole``: of counts."""
    top, step = nice_scale(max((value for _, value in points), default=0.0))
    if whole and step < 1:
        top, step = max(1.0, float(math.ceil(top))), 1.0
    span_s = axes.end_unix_s - axes.begin_unix_s

    def x(at: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (at - axes.begin_unix_s) / span_s

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top

    parts = [_opening(label)]
    for number in range(round(top / step) + 1):
        level = number * step
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level):.1f}"'
            f' y2="{y(level):.1f}"/><text x="{LEFT - 6}" y="{y(level) + 4:.1f}"'
            f' text-anchor="end">{escape(axes.number(level))}</text>'
        )
    for number in range(axes.ticks + 1):
        at = axes.begin_unix_s + span_s * number / axes.ticks
        anchor = "start" if number == 0 else "end" if number == axes.ticks else "middle"
        parts.append(
            f'<text x="{x(at):.1f}" y="{HEIGHT - 5}" text-anchor="{anchor}">'
            f"{escape(axes.time(at))}</text>"
        )
    for run in _runs(points, GAP_BINS * max(axes.bin_s, _usual_gap_s(points))):
        line = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in run)
        base = y(0.0)
        area = f"{x(run[0][0]):.1f},{base:.1f} {line} {x(run[-1][0]):.1f},{base:.1f}"
        parts.append(f'<polygon class="area" points="{area}"/>')
        if len(run) == 1:
            parts.append(
                f'<circle class="dot" cx="{x(run[0][0]):.1f}" cy="{y(run[0][1]):.1f}" r="2"/>'
            )
        else:
            parts.append(f'<polyline class="line" points="{line}"/>')
    parts.append("</svg>")
    return Markup("".join(parts))  # noqa: S704 (numbers, and labels that were escaped)


def bar_chart(bars: Sequence[tuple[str, float]], axes: Axes, label: str) -> Markup:
    """A bar for each label; of ``axes`` only the format of numbers counts."""
    top, step = nice_scale(max((value for _, value in bars), default=0.0))
    room = (WIDTH - LEFT - RIGHT) / max(len(bars), 1)
    scale = (HEIGHT - TOP - BOTTOM) / top
    parts = [_opening(label)]
    for number in range(round(top / step) + 1):
        y = HEIGHT - BOTTOM - number * step * scale
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
            f"{escape(axes.number(number * step))}</text>"
        )
    for place, (name, value) in enumerate(bars):
        x, height = LEFT + place * room, value * scale
        parts.append(
            f'<rect class="bar" x="{x + room * 0.12:.1f}" y="{HEIGHT - BOTTOM - height:.1f}"'
            f' width="{room * 0.76:.1f}" height="{height:.1f}"/>'
        )
        if place % max(1, math.ceil(len(bars) / axes.ticks)) == 0:
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 5}">{escape(name)}</text>')
    parts.append("</svg>")
    return Markup("".join(parts))  # noqa: S704


def _opening(label: str) -> str:
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg class="chart" {size} role="img" aria-label="{escape(label)}">'


def nice_scale(highest: float) -> tuple[float, float]:
    """Top of an axis from 0 that holds ``highest``, and the step between its lines: 1, 2 or 5
    times a power of ten."""
    if not highest > SMALLEST:
        return 1.0, 1.0
    rough = highest / MOST_STEPS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999999)
    return math.ceil(highest / step * 0.999999) * step, step


def _usual_gap_s(points: Sequence[Point]) -> float:
    """Between neighbours: some things are looked at more rarely than once in a bin."""
    return median([after[0] - before[0] for before, after in pairwise(points)] or [0.0])


def _runs(points: Sequence[Point], longest_gap_s: float) -> list[list[Point]]:
    runs: list[list[Point]] = []
    for point in points:
        if runs and point[0] - runs[-1][-1][0] <= longest_gap_s:
            runs[-1].append(point)
        else:
            runs.append([point])
    return runs
