"""``swarm audit``: limits for a model's audits, and what audits have found."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from swarm.client.config import LEDGER_FILE, LEDGER_FILE_VARIABLE
from swarm.client.joining import AsJson, outcome, own_files
from swarm.command_results import print_result
from swarm.protocol.errors import UsageError
from swarm.threads import configure_threads_environment

app = typer.Typer(no_args_is_help=True, help="Limits of audits, and what audits have found.")


@app.command(epilog="[bold]Example[/bold]\n\nswarm audit calibrate ./checkpoint --text story.txt")
def calibrate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or a model's name.")],
    text: Annotated[
        list[Path], typer.Option("--text", metavar="FILE", help="Texts to run; repeatable.")
    ],
    windows: Annotated[
        int, typer.Option("--windows", help="Pieces of text, 128 tokens each.")
    ] = 12,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Where to write; by default into the checkpoint."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how far honest nodes are from float32, and write the limits beside the checkpoint.

    Takes minutes, and the memory of the model in float32 twice. `swarm models publish` then signs
    the limits with the model. Those of a model that was fetched are its publisher's, and stay.
    """
    with outcome(as_json), own_files():
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in text]
        configure_threads_environment()
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from swarm.catalogue.checkpoint import read_manifest, resolve_checkpoint
        from swarm.client.calibration import SpanRunner, calibrate
        from swarm.ledger.calibrated import FILE_NAME, to_json

        folder = resolve_checkpoint(model)
        if output is None and read_manifest(folder) is not None:
            raise UsageError("this model came with a signed manifest: give --output")
        limits = calibrate(
            SpanRunner(folder),
            texts,
            most_windows=windows,
            progress=lambda line: print(line, file=sys.stderr),
        )
        target = output or folder / FILE_NAME
        content = to_json(limits)
        target.write_text(content, encoding="ascii")
        print_result(
            {"file": str(target), "limits": json.loads(content)},
            f"wrote {target}",
            as_json=as_json,
        )


@app.command(epilog="[bold]Example[/bold]\n\nswarm audit show")
def show(
    ledger: Annotated[
        Path | None, typer.Option("--ledger", metavar="FILE", help="Books of your client.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What your client's audits found of each node."""
    from swarm.client.ledger_store import known_reputations

    path = ledger or Path(os.environ.get(LEDGER_FILE_VARIABLE) or LEDGER_FILE).expanduser()
    with outcome(as_json), own_files():
        reputations = known_reputations(path)
    now_s = time.time()
    rows = [(peer, reputations.of(peer)) for peer in reputations.peers]
    nodes = [
        {
            "node": peer,
            "audits": found.audits,
            "right_in_a_row": found.clean,
            "standing": found.standing(now_s).value,
        }
        for peer, found in rows
    ]
    lines = [
        f"{peer}  {found.audits} audits, {found.clean} right in a row:"
        f" {found.standing(now_s).value}"
        for peer, found in rows
    ]
    print_result({"nodes": nodes}, *(lines or ["no audits yet"]), as_json=as_json)
