"""``swarm-node ledger``: the node's own books."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.command_results import print_result
from swarm.protocol.errors import ConfigError

if TYPE_CHECKING:
    from swarm.ledger.node_books import LedgerReader

app = typer.Typer(no_args_is_help=True, help="Show, check and export the books of this node.")

Identity = Annotated[
    Path | None, typer.Option("--identity", metavar="FILE", help="Key file of the node.")
]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file with its settings.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command(epilog="[bold]Example[/bold]\n\nswarm-node ledger show --json")
def show(identity: Identity = None, config: Config = None, as_json: AsJson = False) -> None:
    """What this node did, for how many, and what of it is settled."""
    from swarm.protocol.prices import UNITS_PER_CREDIT

    with _reading(identity, config, as_json) as reader:
        totals, given = reader.totals(), reader.given_to()
        latest = list(reader.channels())[-10:]
    if as_json:
        content = {
            "channels": totals.channels,
            "units": totals.units,
            "settled_units": totals.settled_units,
            "evidence": totals.evidence,
            "events": totals.feed_length,
            "payers": len(given),
        }
        print_result(content, as_json=True)
        return
    print(f"{totals.channels} sessions for {len(given)} payers: {totals.units:,} units of work")
    print(f"that is {totals.units / UNITS_PER_CREDIT:.6f} credits; a unit is one MFLOP-equivalent")
    print(f"settled with an operator: {totals.settled_units:,} units")
    if totals.evidence:
        print(f"clients who signed contradicting vouchers: {totals.evidence} (see export)")
    for entry in reversed(latest):
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.unix_s))
        state = "ended" if entry.closed else "open"
        print(f"  {when}  session {entry.session[:8]}  {entry.units:>12,} units  {state}")


@app.command(epilog="[bold]Example[/bold]\n\nswarm-node ledger verify")
def verify(identity: Identity = None, config: Config = None, as_json: AsJson = False) -> None:
    """Check every signature and the chain of events. Exit code 1 if something does not hold."""
    from swarm.ledger.feed import BrokenFeed
    from swarm.node.cli import report_error
    from swarm.protocol.errors import ProtocolError

    with _reading(identity, config, as_json) as reader:
        try:
            length, head = reader.verify()
        except (BrokenFeed, ProtocolError) as error:
            report_error(f"the books do not hold: {error}", as_json)
            raise typer.Exit(1) from None
    print_result(
        {"events": length, "head": head.hex()},
        f"{length} events, all signatures hold; head {head.hex()}",
        as_json=as_json,
    )


@app.command(epilog="[bold]Example[/bold]\n\nswarm-node ledger export > books.jsonl")
def export(identity: Identity = None, config: Config = None) -> None:
    """Print all events, then all vouchers with their receipts, as JSON lines."""
    from swarm.ledger.proof_file import voucher_items

    with _reading(identity, config) as reader:
        for event in reader.events():
            line = {
                "position": event.position,
                "kind": event.kind,
                "body": json.loads(event.body),
                "hash": event.hash.hex(),
            }
            print(json.dumps(line))
        for item in voucher_items(reader):
            print(item)


@contextmanager
def _reading(
    identity: Path | None, config: Path | None, as_json: bool = False
) -> Iterator[LedgerReader]:
    from swarm.ledger.node_books import LedgerReader
    from swarm.node.cli import outcome
    from swarm.node.config import load_identity_file

    with outcome(as_json):
        path = load_identity_file(config, os.environ, identity).with_suffix(".ledger")
        try:
            reader = LedgerReader.open(path)
            try:
                yield reader
            finally:
                reader.close()
        except sqlite3.Error as error:
            raise ConfigError(f"the books in {path} cannot be read: {error}") from error
