"""A picture of losses over steps, as SVG: small, without a library, and readable in any browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import floor, log10

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 40, 48
COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94")
MOST_POINTS = 1000


def loss_curve(title: str, series: Mapping[str, Sequence[float]]) -> str:
    """An SVG document; each series has one value for each step from 1 on, and a name.

    Later series are dashed, so that equal ones can be seen to be equal.
    """
    longest = max((len(values) for values in series.values()), default=1)
    everything = [value for values in series.values() for value in values] or [0.0]
    low, high = min(everything), max(everything)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    margin = 0.05 * (high - low)
    low, high = low - margin, high + margin

    def across(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - 1) / max(1, longest - 1)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="16">{escape(title)}</text>',
    ]
    for tick in _ticks(low, high):
        y = up(tick)
        parts.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    parts.extend(
        f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 20}" '
        f'text-anchor="middle">{int(tick)}</text>'
        for tick in _ticks(1, longest)
        if tick == int(tick)
    )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">step</text>'
    )
    for index, (name, values) in enumerate(series.items()):
        stride = max(1, len(values) // MOST_POINTS)
        points = " ".join(
            f"{across(at + 1):.1f},{up(values[at]):.1f}" for at in range(0, len(values), stride)
        )
        colour = COLOURS[index % len(COLOURS)]
        dash = f' stroke-dasharray="{2 + 2 * index} {3 + 2 * index}"' if index else ""
        width = 2.5 if index else 1.8
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" '
            f'stroke-width="{width}"{dash}/>'
        )
        x, y = WIDTH - RIGHT - 220, TOP + 8 + 20 * index
        parts.append(
            f'<line x1="{x}" y1="{y}" x2="{x + 28}" y2="{y}" stroke="{colour}" '
            f'stroke-width="{width}"{dash}/><text x="{x + 36}" y="{y + 4}">{escape(name)}</text>'
        )
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between the two."""
    if high <= low:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** floor(log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = -(-low // step) * step
    count = floor((high - first) / step + 1e-9) + 1
    return [round(first + index * step, 10) for index in range(max(0, count))]
