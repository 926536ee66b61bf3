"""When was a node there? Intervals of observation, and the share of them that it was; pure."""

from __future__ import annotations

from collections.abc import Sequence

Interval = tuple[float, float]
"""From and until, Unix seconds."""

MOST_INTERVALS = 1000
"""Kept of one node, the latest: whoever flaps for weeks fills no disk."""


def extended(
    intervals: Sequence[Interval], previous_unix_s: float | None, now_unix_s: float
) -> tuple[Interval, ...]:
    """``intervals`` with the time up to now: the last one goes on if it lasted until the look
    before, otherwise a new one begins."""
    if intervals and previous_unix_s is not None and intervals[-1][1] >= previous_unix_s:
        return (*intervals[:-1], (intervals[-1][0], now_unix_s))
    return (*intervals, (now_unix_s, now_unix_s))[-MOST_INTERVALS:]


def since(intervals: Sequence[Interval], earliest_unix_s: float) -> tuple[Interval, ...]:
    """Those that reach into the time after ``earliest_unix_s``."""
    if not intervals or intervals[0][1] >= earliest_unix_s:
        return tuple(intervals)
    return tuple(item for item in intervals if item[1] >= earliest_unix_s)


def overlap_s(intervals: Sequence[Interval], from_unix_s: float, until_unix_s: float) -> float:
    """Seconds of the intervals within a window."""
    return sum(
        max(0.0, min(until, until_unix_s) - max(begin, from_unix_s)) for begin, until in intervals
    )


def uptime(
    present: Sequence[Interval],
    watched: Sequence[Interval],
    *,
    window_s: float,
    registered_unix_s: float,
    now_unix_s: float,
) -> float | None:
    """Share of the watched time in the window, since the node was registered, that it was there.

    None when nobody watched. Time in which the page itself was down counts for nobody.
    """
    begin = max(now_unix_s - window_s, registered_unix_s)
    watched_s = overlap_s(watched, begin, now_unix_s)
    if watched_s <= 0:
        return None
    return min(1.0, overlap_s(present, begin, now_unix_s) / watched_s)
