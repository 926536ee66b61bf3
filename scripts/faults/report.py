"""What the chaos commands print and write."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from scripts.faults.cases import Outcome

LEVEL_TOLERANCE = 0.03
WEIGHINGS = 10
"""Of a node that are looked at together."""


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that ``percent`` % of ``values`` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def levels_off_after_s(points: Sequence[tuple[float, int]]) -> float | None:
    """The age from which on a node's memory stays near the mean of its last quarter.

    ``points`` are ages in seconds and bytes. None when the last quarter itself does not.
    """
    # Single weighings find memory that is given back a moment later.
    parts = [points[first : first + WEIGHINGS] for first in range(0, len(points), WEIGHINGS)]
    smooth = [(part[0][0], statistics.median(size for _, size in part)) for part in parts]
    last = smooth[len(smooth) * 3 // 4 :]
    if not last:
        return None
    level = statistics.fmean(size for _, size in last)
    after_s = None
    for age_s, size in reversed(smooth):
        if abs(size - level) > LEVEL_TOLERANCE * level:
            break
        after_s = age_s
    return after_s if after_s is not None and after_s <= last[0][0] else None


def print_outcome(console: Console, outcome: Outcome) -> None:
    """One line for one case."""
    stall = "no token after it" if outcome.stall_s is None else f"{outcome.stall_s:.2f} s"
    verdict = "[red]FAILED[/]" if outcome.problems else "[green]ok[/]"
    console.print(
        f"  {verdict}  {outcome.case.label}: {stall}, "
        f"{outcome.heals} heals, {outcome.hand_overs} hand-overs"
    )
    for problem in outcome.problems:
        console.print(f"      {escape(problem)}", style="red", soft_wrap=True)


def print_matrix(
    console: Console, outcomes: Sequence[Outcome], limits: Sequence[str], problems: Sequence[str]
) -> None:
    """A row for each kind of fault and phase, then what went wrong beside the cases."""
    table = Table("fault", "phase", "cases", "failed", "stall p50", "p95", "max", "replayed")
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        pair = "two hops, " if len(outcome.case.stages) > 1 else ""
        groups.setdefault((pair + outcome.case.kind, outcome.case.moment.phase), []).append(outcome)
    for outcome in outcomes:
        groups.setdefault((outcome.case.kind, "all"), []).append(outcome)
    for (kind, phase), members in groups.items():
        stalls = [outcome.stall_s for outcome in members if outcome.stall_s is not None]
        failed = sum(bool(outcome.problems) for outcome in members)
        tokens = sum(outcome.replayed_tokens for outcome in members)
        size_mb = sum(outcome.replayed_bytes for outcome in members) / 1e6
        table.add_row(
            kind,
            phase,
            str(len(members)),
            f"[red]{failed}[/]" if failed else "0",
            *seconds_of(stalls),
            f"{tokens} tokens, {size_mb:.1f} MB",
        )
    console.print(table)
    for line in limits:
        console.print(f"  {line}")
    for problem in problems:
        console.print(f"  {escape(problem)}", style="red", soft_wrap=True)


def seconds_of(values: Sequence[float]) -> tuple[str, str, str]:
    """Median, 95th percentile and maximum, as people read them."""
    if not values:
        return ("-", "-", "-")
    numbers = (statistics.median(values), percentile(values, 95), max(values))
    return (f"{numbers[0]:.2f} s", f"{numbers[1]:.2f} s", f"{numbers[2]:.2f} s")


def matrix_document(
    outcomes: Sequence[Outcome], limits: Sequence[str], problems: Sequence[str]
) -> dict[str, Any]:
    """The same for programs."""
    return {
        "cases": [
            {
                "kind": outcome.case.kind,
                "phase": outcome.case.moment.phase,
                "moment": outcome.case.moment.name,
                "stages": outcome.case.stages,
                "stall_s": outcome.stall_s,
                "longest_step_s": outcome.longest_step_s,
                "median_step_s": outcome.median_step_s,
                "duration_s": outcome.duration_s,
                "load_average": outcome.load_average,
                "heals": outcome.heals,
                "hand_overs": outcome.hand_overs,
                "replayed_tokens": outcome.replayed_tokens,
                "replayed_bytes": outcome.replayed_bytes,
                "problems": outcome.problems,
            }
            for outcome in outcomes
        ],
        "limits": list(limits),
        "problems": list(problems),
    }
