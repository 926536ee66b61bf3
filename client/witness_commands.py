"""``swarm witness``: cosign the checkpoints of operators' logs, so that they have one face only."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from swarm.client.joining import AsJson, outcome, own_files
from swarm.client.operator_commands import say_where
from swarm.client.output import note
from swarm.command_results import print_result

witness_app = typer.Typer(
    name="witness",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Watch over an operator's log.\n\nA witness checks that each checkpoint continues the one "
    "before, and cosigns it. It needs a key, a port and hardly any computer.",
)

Folder = Annotated[Path, typer.Argument(help="The witness's folder.")]


@witness_app.command(
    epilog="[bold]Example[/bold]\n\nswarm witness init ./witness --name university.example/w1"
)
def init(
    folder: Folder,
    name: Annotated[
        str, typer.Option("--name", help="Name of the witness, such as university.example/w1.")
    ],
    log: Annotated[
        list[str], typer.Option("--log", metavar="KEY", help="Key of a log to watch; repeatable.")
    ],
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where to answer.")
    ] = "127.0.0.1:8441",
    as_json: AsJson = False,
) -> None:
    """Make a key and settings, and print the public key that the operator needs."""
    with outcome(as_json), own_files():
        from swarm.operator.witness import create_witness

        key = str(create_witness(folder, name, log, listen).verifier)
        print_result({"key": key, "folder": str(folder)}, key, as_json=as_json)
        if not as_json:
            note(
                f"give this key and your address to the operator; then: swarm witness run {folder}"
            )


@witness_app.command(epilog="[bold]Example[/bold]\n\nswarm witness run ./witness")
def run(folder: Folder, as_json: AsJson = False) -> None:
    """Cosign until Ctrl-C."""
    with outcome(as_json), own_files():
        import logging

        from swarm.operator.app import leave_on_signals
        from swarm.operator.witness import load_witness, run_witness

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        settings = load_witness(folder)

        async def serve() -> None:
            leaving = asyncio.Event()
            with leave_on_signals(leaving):
                await run_witness(settings, lambda url: say_where(url, as_json), leaving)

        asyncio.run(serve())
