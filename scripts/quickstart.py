"""The part of the quickstart after the installation: a swarm of three nodes answers a prompt.

Run it by ``scripts/quickstart``, which makes the environment that this needs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from scripts.local_swarm import (
    LocalSwarm,
    SwarmPlan,
    SwarmStartError,
    compute_environment,
    end_on_sigterm,
    equal_spans,
)
from scripts.prepare_demo_model import PreparationError, prepare_with_progress
from swarm.catalogue.checkpoint import Checkpoint

NODES = 3
NEW_TOKENS = 96
PROMPT = "What can people achieve when they share what they have? Answer in two sentences."
SWARM = Path(sys.executable).with_name("swarm")


def start(console: Console, model: Path, running: contextlib.ExitStack) -> LocalSwarm:
    """Start a seed and nodes, with a line for each. Raises SwarmStartError."""
    blocks = Checkpoint.open(model).number_of_blocks
    started_s = time.monotonic()
    with console.status(f"starting a seed and {NODES} nodes"):
        swarm = running.enter_context(LocalSwarm(SwarmPlan(model, equal_spans(blocks, NODES))))
    took_s = time.monotonic() - started_s
    done(console, f"a seed and {NODES} nodes are up on this machine  [dim]({took_s:.0f} s)[/]")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    for node in swarm.nodes:
        span = node.span
        before, held = "·" * span.first_block, "█" * (span.end_block - span.first_block)
        bar = f"[dim]{before}[/][green]{held}[/][dim]{'·' * (blocks - span.end_block)}[/]"
        name = f"blocks {span.first_block}-{span.end_block - 1}"
        table.add_row(node.name, bar, name, f"[dim]{node.peer_id[:8]}…{node.peer_id[-4:]}[/]")
    console.print(Padding(table, (0, 0, 0, 4)))
    return swarm


def ask(console: Console, model: Path, swarm: LocalSwarm, prompt: str) -> int:
    """Run the command that a user would; it streams the text and prints the chain and the speed."""
    console.print()
    console.rule(style="dim")
    console.print(f"[bold]{prompt}[/]\n", highlight=False)
    command = [str(SWARM), "generate", str(model), prompt, "--peers", swarm.peers[0]]
    command += ["--max-new-tokens", str(NEW_TOKENS)]
    environment = os.environ | compute_environment(0) | {"HF_HUB_OFFLINE": "1"}
    code = subprocess.run(command, env=environment, check=False).returncode
    console.rule(style="dim")
    return code


def print_next_commands(console: Console, model: Path, swarm: LocalSwarm) -> None:
    """What to try while the swarm stays up."""
    where, peers = model.name, shlex.quote(swarm.peers[0])
    console.print("\n  The swarm stays up. In another terminal:\n")
    activate = f"source {shlex.quote(str(Path(sys.executable).with_name('activate')))}"
    lines = [activate, f"export SWARM_PEERS={peers}", f"swarm chat {where}"]
    lines += [f'swarm generate {where} "The capital of Kenya is"', "swarm models"]
    lines += [f"swarm-node join {where} --peers $SWARM_PEERS --blocks 0:10"]
    for line in lines:
        console.print(f"    {line}", style="cyan", soft_wrap=True, highlight=False, markup=False)
    console.print(f"\n  Logs: {swarm.logs}", style="dim", soft_wrap=True)
    console.print("  Ctrl-C stops everything.", style="dim")


def done(console: Console, text: str) -> None:
    console.print(f"  ✓ {text}", highlight=False)


def run(console: Console, prompt: str, *, keep: bool) -> int:
    """The whole part; the exit code."""
    model = prepare_with_progress(console)
    done(console, f"the demo model is ready  [dim]{model.name}[/]")
    with contextlib.ExitStack() as running:
        swarm = start(console, model, running)
        code = ask(console, model, swarm, prompt)
        if keep and code == 0:
            print_next_commands(console, model, swarm)
            # The prompt ends here: whatever comes next is a signal.
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
        with console.status("stopping the swarm"):
            swarm.stop()
    done(console, "everything has stopped")
    return code


def main() -> None:
    """Parse the flags and turn expected failures into plain words."""
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart", description="See a language model answer from a swarm."
    )
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--keep", action="store_true", help="leave the swarm up afterwards")
    options = parser.parse_args()
    console = Console(highlight=False)
    end_on_sigterm()
    try:
        sys.exit(run(console, options.prompt, keep=options.keep))
    except (PreparationError, SwarmStartError) as error:
        console.print(f"  error: {error}", style="red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("\n  stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
