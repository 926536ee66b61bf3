"""Simulated swarms of 20 to 10,000 nodes: placement, outages, routing, control and sessions.

Outages are of a third of the nodes (``outages``) or of an organisation (``organisations``).

    python -m scripts.bench.simulate                    # everything; hours on one core
    python -m scripts.bench.simulate --quick            # a small part of it, a minute
    python -m scripts.bench.simulate --part placement --json results.jsonl
    python -m scripts.bench.simulate --table results.jsonl

What is real and what is modelled in each part stands in ``swarm/simulation/__init__.py``; results
are in docs/simulation.md. Each line of the JSON file is one run with one seed, so that runs can be
made in pieces; ``--table`` prints the means. The same seed gives the same numbers on any machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from swarm.simulation.churn import CHURNS
from swarm.simulation.control import simulate_control
from swarm.simulation.outages import simulate_outage
from swarm.simulation.placement import PETALS, POTENTIAL, PlacementRun, simulate_placement
from swarm.simulation.population import ORGANISATIONS
from swarm.simulation.routing import RoutingRun, Strategy, simulate_routing
from swarm.simulation.sessions import SessionRun, simulate_sessions

Result = dict[str, Any]
SEEDS = 5


@dataclass(frozen=True, slots=True)
class PlacementRow:
    """One size of swarm and model under one kind of churn."""

    nodes: int
    blocks: int
    churn: str
    hours: float = 2.0
    warm_up_hours: float = 0.5
    seeds: int = SEEDS


WITHOUT_LARGEST = "without largest"
"""The potential in a swarm that the largest organisation never joined: what the others can do."""
LARGEST_ORGANISATION = ORGANISATIONS[0][0]
PLACEMENT_ROWS = (
    PlacementRow(20, 32, "normal"),
    PlacementRow(20, 80, "normal"),
    PlacementRow(20, 80, "heavy"),
    PlacementRow(50, 126, "normal"),
    PlacementRow(50, 126, "heavy"),
    PlacementRow(75, 126, "normal"),
    PlacementRow(75, 126, "heavy"),
    PlacementRow(100, 126, "normal"),
    PlacementRow(100, 126, "heavy"),
    PlacementRow(100, 80, "normal"),
    PlacementRow(1000, 80, "normal", hours=2.0, warm_up_hours=1.0, seeds=1),
    PlacementRow(1000, 126, "normal", hours=2.0, warm_up_hours=1.0, seeds=1),
    PlacementRow(10_000, 80, "normal", hours=1.0, warm_up_hours=0.5, seeds=1),
)
OUTAGES = ((20, 80), (75, 126), (100, 126), (100, 80))
"""A third of the nodes vanishes."""
LOST_ORGANISATIONS = ((20, 80), (50, 126), (75, 126), (100, 126), (100, 80), (200, 80), (1000, 126))
"""The largest organisation vanishes from a settled swarm."""
ROUTING_ROWS = (
    (100, 80, 0.2),
    (100, 80, 0.5),
    (100, 80, 0.75),
    (1000, 80, 0.2),
    (10_000, 80, 0.05),
)


# --- running -------------------------------------------------------------------------------------
def placement_runs(quick: bool) -> Iterator[tuple[Result, Callable[[], Any]]]:
    rows = PLACEMENT_ROWS if not quick else (PlacementRow(20, 80, "heavy", 2.0, 1.0, 1),)
    for seed in range(SEEDS):
        for row in (row for row in rows if seed < row.seeds):
            for rule in (POTENTIAL, PETALS, WITHOUT_LARGEST)[: 3 if row.blocks == 126 else 2]:
                alone = rule == WITHOUT_LARGEST
                run = PlacementRun(
                    row.nodes,
                    row.blocks,
                    CHURNS[row.churn],
                    rule=POTENTIAL if alone else rule,
                    seed=seed,
                    hours=row.hours,
                    warm_up_hours=row.warm_up_hours,
                    without_organisation=LARGEST_ORGANISATION if alone else "",
                )
                what = {"nodes": row.nodes, "blocks": row.blocks, "churn": row.churn, "rule": rule}
                yield {**what, "seed": seed}, partial(simulate_placement, run)


def outage_runs(quick: bool) -> Iterator[tuple[Result, Callable[[], Any]]]:
    for nodes, blocks in OUTAGES[:2] if quick else OUTAGES:
        for seed in range(1 if quick else SEEDS):
            what = {"nodes": nodes, "blocks": blocks, "seed": seed}
            yield what, partial(simulate_outage, nodes, blocks, seed=seed)


def organisation_runs(quick: bool) -> Iterator[tuple[Result, Callable[[], Any]]]:
    for nodes, blocks in LOST_ORGANISATIONS[:1] if quick else LOST_ORGANISATIONS:
        for seed in range(1 if quick else SEEDS if nodes >= 1000 else 4 * SEEDS):
            for rule in (POTENTIAL, PETALS):
                what = {"nodes": nodes, "blocks": blocks, "rule": rule, "seed": seed}
                lose = partial(simulate_outage, organisation=LARGEST_ORGANISATION, rule=rule)
                yield what, partial(lose, nodes, blocks, seed=seed)


def routing_runs(quick: bool) -> Iterator[tuple[Result, Callable[[], Any]]]:
    for nodes, blocks, load in ROUTING_ROWS[:1] if quick else ROUTING_ROWS:
        seconds = 60 if nodes >= 1000 or quick else 120
        for seed in range(SEEDS if nodes <= 1000 and not quick else 1):
            for strategy in Strategy:
                if strategy is Strategy.ANNOUNCED and nodes > 100:
                    continue  # a choice among all nodes takes seconds there
                run = RoutingRun(nodes, blocks, load, strategy, seed, seconds=seconds)
                what = {"nodes": nodes, "blocks": blocks, "load": load, "rule": strategy.value}
                yield {**what, "seed": seed}, partial(simulate_routing, run)


def control_runs(quick: bool) -> Iterator[tuple[Result, Callable[[], Any]]]:
    for nodes in (100,) if quick else (20, 100, 1000, 10_000):
        what = {"nodes": nodes, "seed": 0}
        yield what, partial(simulate_control, nodes, seconds=300.0)


def session_runs(quick: bool) -> Iterator[tuple[Result, Callable[[], Any]]]:
    for seed in range(1 if quick else SEEDS):
        run = SessionRun(nodes=12, clients=2, minutes=1.0 if quick else 5.0, seed=seed)
        yield {"nodes": run.nodes, "seed": seed}, partial(simulate_sessions, run)


PARTS: dict[str, Callable[[bool], Iterator[tuple[Result, Callable[[], Any]]]]] = {
    "placement": placement_runs,
    "outages": outage_runs,
    "organisations": organisation_runs,
    "routing": routing_runs,
    "control": control_runs,
    "sessions": session_runs,
}


def simulate(
    parts: Iterable[str],
    *,
    quick: bool,
    nodes: Collection[int],
    rules: Collection[str],
    json_file: Path | None,
) -> list[Result]:
    """Run, print each result, and append it to the file. No ``nodes`` or no ``rules``: all."""
    console = Console()
    results = []
    for part in parts:
        for what, run in PARTS[part](quick):
            if nodes and what["nodes"] not in nodes:
                continue
            if rules and what.get("rule") not in rules:
                continue
            started_s = time.monotonic()
            result = asdict(run())
            line = {"part": part, **what, "result": result, "real_s": time.monotonic() - started_s}
            results.append(line)
            console.print(f"[dim]{json.dumps(line)}[/dim]", soft_wrap=True, highlight=False)
            if json_file is not None:
                with json_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    return results


# --- tables --------------------------------------------------------------------------------------
def mean(runs: Sequence[Result], name: str) -> float:
    return fmean(float(run["result"][name]) for run in runs)


def grouped(results: Sequence[Result], *names: str) -> dict[tuple[Any, ...], list[Result]]:
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for line in results:
        groups.setdefault(tuple(line[name] for name in names), []).append(line)
    return groups


def placement_table(results: Sequence[Result]) -> list[str]:
    lines = [
        "| nodes, blocks, churn (seeds) | copies | rule | weakest stretch | weakest block | >= 1 "
        "| >= 2 | moves | blocks loaded | hops | countries alone |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    compared = [line for line in results if line["rule"] != WITHOUT_LARGEST]
    for (nodes, blocks, churn), of_row in grouped(compared, "nodes", "blocks", "churn").items():
        for (rule,), runs in grouped(of_row, "rule").items():
            shares = [f"{100 * mean(runs, name):.1f} %" for name in ("covered", "covered_twice")]
            lines.append(
                f"| {nodes:,}, {blocks}, {churn} ({len(runs)}) | {mean(runs, 'redundancy'):.1f} "
                f"| {rule} | {mean(runs, 'weakest_stretch'):.3f} "
                f"| {mean(runs, 'weakest_block'):.3f} | {shares[0]} | {shares[1]} "
                f"| {mean(runs, 'moves_per_node_day'):.1f} "
                f"| {mean(runs, 'blocks_loaded_per_node_day'):.1f} | {mean(runs, 'hops'):.1f} "
                f"| {100 * mean(runs, 'countries_alone'):.1f} % |"
            )
    return [*lines, "", *survival_table(results)]


def survival_table(results: Sequence[Result]) -> list[str]:
    """Survival of the largest organisation's loss, beside what is possible."""
    lines = [
        "| nodes, blocks, churn (seeds) | possible | potential | petals | the others alone |",
        "|---|---|---|---|---|",
    ]
    for (nodes, blocks, churn), of_row in grouped(results, "nodes", "blocks", "churn").items():
        by_rule = {rule: runs for (rule,), runs in grouped(of_row, "rule").items()}
        potential = by_rule.get(POTENTIAL, [])
        shares = [
            f"{100 * mean(runs, name):.1f} %" if runs else ""
            for runs, name in (
                (potential, "could_outlive"),
                (potential, "outlives_organisation"),
                (by_rule.get(PETALS), "outlives_organisation"),
                (by_rule.get(WITHOUT_LARGEST), "covered"),
            )
        ]
        lines.append(f"| {nodes:,}, {blocks}, {churn} ({len(potential)}) | {' | '.join(shares)} |")
    return lines


def outage_table(results: Sequence[Result]) -> list[str]:
    lines = [
        "| nodes, blocks | seed | copies left | blocks lost | claimed after | served after |",
        "|---|---|---|---|---|---|",
    ]
    for line in results:
        result = line["result"]
        lines.append(
            f"| {line['nodes']}, {line['blocks']} | {line['seed']} | {result['redundancy']:.1f} "
            f"| {result['uncovered_blocks']} | {result['claimed_s']:.0f} s "
            f"| {result['recovered_s']:.0f} s |"
        )
    return lines


def organisation_table(results: Sequence[Result]) -> list[str]:
    lines = [
        "| nodes, blocks (seeds) | rule | copies left | no block lost | blocks lost, at most "
        "| countries alone |",
        "|---|---|---|---|---|---|",
    ]
    for (nodes, blocks, rule), runs in grouped(results, "nodes", "blocks", "rule").items():
        lost = [run["result"]["uncovered_blocks"] for run in runs]
        countries = sum(run["result"]["countries"] for run in runs)
        alone = sum(run["result"]["countries_alone"] for run in runs)
        lines.append(
            f"| {nodes:,}, {blocks} ({len(runs)}) | {rule} | {mean(runs, 'redundancy'):.1f} "
            f"| {lost.count(0)} of {len(lost)} | {max(lost)} | {alone} of {countries} |"
        )
    return lines


def routing_table(results: Sequence[Result]) -> list[str]:
    lines = [
        "| nodes, blocks, load (seeds) | sessions | choice | ms per token (p95) | to the oracle "
        "| hops | asked | misses |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (nodes, blocks, load), of_row in grouped(results, "nodes", "blocks", "load").items():
        by_rule = grouped(of_row, "rule")
        oracle_s = mean(by_rule[("oracle",)], "token_s")
        for (rule,), runs in by_rule.items():
            token_s = mean(runs, "token_s")
            lines.append(
                f"| {nodes:,}, {blocks}, {load:.0%} ({len(runs)}) | {mean(runs, 'sessions'):.0f} "
                f"| {rule} | {1000 * token_s:.0f} ({1000 * mean(runs, 'token_s_p95'):.0f}) "
                f"| {token_s / oracle_s:.2f} | {mean(runs, 'hops'):.1f} "
                f"| {mean(runs, 'asked'):.0f} | {mean(runs, 'misses'):.2%} |"
            )
    return lines


def control_table(results: Sequence[Result]) -> list[str]:
    lines = [
        "| nodes | shards | nodes known | directory, bytes/s | pings, bytes/s | together |",
        "|---|---|---|---|---|---|",
    ]
    for line in results:
        result = line["result"]
        lines.append(
            f"| {line['nodes']:,} | {result['shards']} | {result['known_nodes']:.0f} "
            f"| {result['directory_bytes_per_s']:.0f} | {result['stream_bytes_per_s']:.0f} "
            f"| {result['bytes_per_s']:.0f} |"
        )
    return lines


def session_table(results: Sequence[Result]) -> list[str]:
    lines = [
        "| nodes | seed | crashes | partitions | answers | wrong tokens | failed answers |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in results:
        result = line["result"]
        lines.append(
            f"| {line['nodes']} | {line['seed']} | {result['crashes']} | {result['partitions']} "
            f"| {result['answers']} | {result['wrong_tokens']} | {result['failed']} |"
        )
    return lines


TABLES: dict[str, Callable[[Sequence[Result]], list[str]]] = {
    "placement": placement_table,
    "outages": outage_table,
    "organisations": organisation_table,
    "routing": routing_table,
    "control": control_table,
    "sessions": session_table,
}


def print_tables(results: Sequence[Result]) -> None:
    for (part,), of_part in grouped(results, "part").items():
        print(f"\n{part}\n")
        print("\n".join(TABLES[part](of_part)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=sorted(PARTS), help="default: all")
    parser.add_argument("--nodes", type=int, action="append", default=[], help="only these sizes")
    parser.add_argument("--rule", action="append", default=[], help="only these rules or choices")
    parser.add_argument("--quick", action="store_true", help="one small run of each part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a line for each run")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print its tables")
    arguments = parser.parse_args()
    if arguments.table is not None:
        lines = arguments.table.read_text(encoding="utf-8").splitlines()
        print_tables([json.loads(line) for line in lines])
        return
    parts = arguments.part or list(PARTS)
    results = simulate(
        parts,
        quick=arguments.quick,
        nodes=arguments.nodes,
        rules=arguments.rule,
        json_file=arguments.json,
    )
    print_tables(results)


if __name__ == "__main__":
    main()
