"""Nodes die, answers go on? Real processes are killed, frozen, slowed and drained to find out.

    python -m scripts.chaos run --minutes 30          # random faults under concurrent sessions
    python -m scripts.chaos matrix                    # every fault on every hop at every moment

Every token is compared with transformers' own. The exit code is 0 only if no token was wrong, no
session failed and nothing was left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from scripts.faults.moments import MOMENTS
from scripts.faults.network import OFFLINE, Hosts, Partition, enter_namespace
from scripts.faults.processes import PROCESS_FAULTS
from scripts.local_swarm import SwarmStartError, compute_environment, end_on_sigterm
from scripts.netlab import Lab, LabUnavailable
from scripts.prepare_demo_model import prepare_with_progress

LAB_FAULTS = (Partition.kind, OFFLINE)
SPANS = 3
"""Hops of a chain."""


def run_matrix(options: argparse.Namespace, console: Console, hosts: Hosts | None) -> bool:
    """``chaos matrix``; whether all went well."""
    # Here and not above: torch takes seconds to import, which --help need not wait for.
    from scripts.faults.matrix import MatrixPlan, run_matrix

    moments = tuple(
        moment
        for moment in MOMENTS
        if not options.moments or {moment.name, moment.phase} & set(options.moments)
    )
    plan = MatrixPlan(
        model=options.model,
        kinds=tuple(options.kinds),
        moments=moments,
        stages=tuple(options.stages),
        replicas=options.replicas,
        pairs=options.pairs,
        singles=options.singles,
        timing_rounds=options.timing_rounds,
        last_replica=options.last_replica,
        logs=options.logs,
        json=options.json,
        hosts=hosts,
    )
    return run_matrix(plan, console)


def run_soak(options: argparse.Namespace, console: Console, hosts: Hosts | None) -> bool:
    """``chaos run``; whether all went well."""
    from scripts.faults.soak import SoakPlan, run_soak

    plan = SoakPlan(
        model=options.model,
        kinds=tuple(options.kinds),
        minutes=options.minutes,
        sessions=options.sessions,
        seed=options.seed,
        fault_every_s=options.fault_every,
        stages=SPANS,
        replicas=options.replicas,
        logs=options.logs,
        json=options.json,
        hosts=hosts,
    )
    return run_soak(plan, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.chaos")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="random faults under concurrent sessions")
    run.set_defaults(run=run_soak)
    run.add_argument("--minutes", type=float, default=5.0)
    run.add_argument("--sessions", type=int, default=4, help="concurrent users")
    run.add_argument("--seed", type=int, default=0, help="of the faults and of what is asked")
    run.add_argument(
        "--fault-every", type=float, default=20.0, metavar="SECONDS", help="on average"
    )
    run.add_argument("--replicas", type=int, default=2, help="nodes for each span")
    matrix = commands.add_parser("matrix", help="every fault on every hop at every moment")
    matrix.set_defaults(run=run_matrix)
    matrix.add_argument(
        "--moments", type=_words, default=[], help="phases or names; all if not given"
    )
    matrix.add_argument("--stages", type=_numbers, default=[0, 1, 2], help="hops, from 0")
    matrix.add_argument("--no-pairs", dest="pairs", action="store_false", help="never two at once")
    matrix.add_argument(
        "--no-singles", dest="singles", action="store_false", help="always two at once"
    )
    matrix.add_argument(
        "--timing-rounds", type=int, default=3, help="kills and freezes at 512 tokens of context"
    )
    matrix.add_argument(
        "--no-last-replica",
        dest="last_replica",
        action="store_false",
        help="never kill all nodes of a span",
    )
    matrix.add_argument("--replicas", type=int, default=3, help="nodes for each span")
    for command in (run, matrix):
        command.add_argument(
            "--kinds",
            type=_words,
            default=[],
            help=f"of {', '.join((*PROCESS_FAULTS, *LAB_FAULTS))}; all that are possible",
        )
        command.add_argument(
            "--lab", action="store_true", help="each process on a host of the network lab (root)"
        )
        command.add_argument("--model", type=Path, help="checkpoint directory; the demo model")
        command.add_argument("--logs", type=Path, help="folder for all logs")
        command.add_argument("--json", type=Path, help="file for the numbers")
    return parser


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def main() -> None:
    """Parse the arguments and run a command."""
    parser = _parser()
    options = parser.parse_args()
    possible = (*PROCESS_FAULTS, *(LAB_FAULTS if options.lab else ()))
    unknown = set(options.kinds) - set(possible)
    if unknown:
        parser.error(
            f"faults that are unknown or need --lab: {', '.join(sorted(unknown))}; "
            f"possible are {', '.join(possible)}"
        )
    options.kinds = options.kinds or list(possible)
    console = Console()
    end_on_sigterm()
    # Before torch is imported: our own computing shares the cores with the nodes'.
    os.environ.update(compute_environment(1) | {"HF_HUB_OFFLINE": "1"})
    if options.logs is not None:
        options.logs.mkdir(parents=True, exist_ok=True)
        logging.basicConfig(
            filename=options.logs / "client.log", format="%(asctime)s %(name)s: %(message)s"
        )
        logging.getLogger("swarm").setLevel(logging.DEBUG)
    try:
        if options.model is None:
            options.model = prepare_with_progress(console)
        with contextlib.ExitStack() as running:
            hosts = None
            if options.lab:
                hosts = Hosts(running.enter_context(Lab()), SPANS * options.replicas)
                # Before there is any other thread or process of ours.
                enter_namespace(hosts.client.namespace)
            run: Callable[[argparse.Namespace, Console, Hosts | None], bool] = options.run
            good = run(options, console, hosts)
        sys.exit(0 if good else 1)
    except KeyboardInterrupt:
        console.print("  stopped")
        sys.exit(130)
    except (SwarmStartError, LabUnavailable) as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
