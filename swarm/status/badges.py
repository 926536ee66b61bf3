"""Badges for donors' own pages: one SVG that stands alone; pure."""

from __future__ import annotations

import unicodedata

from markupsafe import Markup, escape

from swarm.status.languages import Language
from swarm.status.snapshot import NodeStatus, Standing, Work

HEIGHT = 28
PADDING = 11
COLOURS = {True: "#0b6e4f", False: "#6b6f76"}


def donor_badge(nodes: tuple[NodeStatus, ...], language: Language, swarm_name: str) -> Markup:
    """What a donor has given, and whether it is online."""
    work = sum((node.work for node in nodes), Work())
    online = any(node.standing is not Standing.LOST for node in nodes)
    parts = [language.text("badge.tokens", tokens=language.amount(work.tokens))]
    if nodes and nodes[0].uptime_30d is not None:
        parts.append(language.text("badge.uptime", share=language.percent(nodes[0].uptime_30d)))
    return badge(swarm_name, " · ".join(parts), COLOURS[online])


def badge(left: str, right: str, colour: str) -> Markup:
    """Two fields, the right one coloured."""
    left_width = text_width(left) + 2 * PADDING
    right_width = text_width(right) + 2 * PADDING
    width = left_width + right_width
    return Markup(  # noqa: S704 (numbers, and texts that are escaped)
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}"'
        f' viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(left)}: {escape(right)}">'
        f"<title>{escape(left)}: {escape(right)}</title>"
        f'<rect width="{width}" height="{HEIGHT}" rx="6" fill="#24292f"/>'
        f'<path d="M{left_width} 0h{right_width - 6}a6 6 0 0 1 6 6v{HEIGHT - 12}a6 6 0 0 1-6 6'
        f'h-{right_width - 6}z" fill="{colour}"/>'
        '<g fill="#fff" font-family="system-ui,Noto Sans,Noto Sans Devanagari,Arial,sans-serif"'
        ' font-size="12.5" text-anchor="middle">'
        f'<text x="{left_width / 2:.1f}" y="18.5" textLength="{left_width - 2 * PADDING}"'
        f' lengthAdjust="spacingAndGlyphs">{escape(left)}</text>'
        f'<text x="{left_width + right_width / 2:.1f}" y="18.5"'
        f' textLength="{right_width - 2 * PADDING}" lengthAdjust="spacingAndGlyphs">'
        f"{escape(right)}</text></g></svg>"
    )


def text_width(text: str) -> int:
    """About how many pixels the text takes at the badge's size; the text is fitted to it."""
    width = 0.0
    for character in text:
        if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Cf"):
            continue
        if unicodedata.east_asian_width(character) in "WF":
            width += 13.0
        elif character in "iljt.,:;'|!· ":
            width += 3.9
        else:
            width += 7.2
    return max(8, round(width))
