"""``swarm ledger``: what you received and gave, and proofs of it for others."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.client.config import LEDGER_FILE, LEDGER_FILE_VARIABLE
from swarm.client.joining import AsJson, outcome, own_files
from swarm.client.output import note
from swarm.command_results import print_result
from swarm.protocol.errors import UsageError

if TYPE_CHECKING:
    from swarm.client.ledger_store import ClientLedgerReader
    from swarm.ledger.node_books import ChannelEntry, LedgerReader

app = typer.Typer(no_args_is_help=True, help="What you received and gave, and proofs of it.")

NODE_LEDGER = Path("~/.local/share/sovereign-swarm/identity.ledger")

Ledger = Annotated[
    Path | None, typer.Option("--ledger", metavar="FILE", help="Books of your client.")
]
NodeLedger = Annotated[
    Path | None, typer.Option("--node-ledger", metavar="FILE", help="Books of your node.")
]
Operator = Annotated[
    str | None, typer.Option("--operator", metavar="URL", help="An operator's address.")
]
Account = Annotated[
    str | None,
    typer.Option("--account", help="At the operator: user:12D3KooW... or escrow:12D3KooW..."),
]


@app.command(epilog="[bold]Example[/bold]\n\nswarm ledger balance")
def balance(
    ledger: Ledger = None,
    node_ledger: NodeLedger = None,
    operator: Operator = None,
    account: Account = None,
    as_json: AsJson = False,
) -> None:
    """Units received and given, and what an operator's account holds."""
    with outcome(as_json), own_files():
        content: dict[str, Any] = {"received_units": 0, "given_units": 0}
        with _client_books(ledger) as books:
            if books is not None:
                content["received_units"] = sum(books.received_from().values())
        with _node_books(node_ledger) as node:
            if node is not None:
                content["given_units"] = node.totals().units
        if operator is not None:
            if account is None:
                raise UsageError("name the account with --account")
            content["account"] = _at_operator(operator, account)["balance"]
        lines = [
            f"received {content['received_units']:,} units from others' nodes",
            f"given    {content['given_units']:,} units by your own node",
        ]
        if "account" in content:
            lines.append(f"account  {content['account']:,} units at {operator}")
        print_result(content, *lines, as_json=as_json)


@app.command(epilog="[bold]Example[/bold]\n\nswarm ledger history --limit 50")
def history(
    ledger: Ledger = None,
    operator: Operator = None,
    account: Account = None,
    limit: Annotated[int, typer.Option("--limit", help="Most entries.")] = 20,
    as_json: AsJson = False,
) -> None:
    """The latest sessions, or the latest entries of an operator's account."""
    with outcome(as_json), own_files():
        entries: list[dict[str, Any]] = []
        if operator is not None:
            if account is None:
                raise UsageError("name the account with --account")
            entries = _at_operator(operator, account)["entries"][:limit]
        else:
            with _client_books(ledger) as books:
                for entry in books.received() if books is not None else ():
                    if len(entries) >= limit:
                        break
                    entries.append(
                        {
                            "time": entry.unix_s,
                            "node": entry.node,
                            "tokens": entry.tokens,
                            "units": entry.units,
                            "receipt": bool(entry.receipt),
                        }
                    )
        if as_json:
            print_result({"entries": entries}, as_json=True)
            return
        for each in entries:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.pop("time")))
            print(when, " ".join(f"{name}={value}" for name, value in each.items()))
        if not entries:
            print("nothing yet")


@app.command(epilog="[bold]Example[/bold]\n\nswarm ledger prove work.proof")
def prove(
    output: Annotated[Path, typer.Argument(help="The file to write.")],
    node_ledger: NodeLedger = None,
    operator: Operator = None,
    account: Account = None,
    received: Annotated[
        bool,
        typer.Option("--received", help="What you received, and under which policies."),
    ] = False,
    ledger: Ledger = None,
    as_json: AsJson = False,
) -> None:
    """Write a file that proves work to anybody: by vouchers, or by an operator's public log.

    The file names sessions, keys and the policies that were kept, no person and no text.
    scripts/verify_proof.py checks it offline.
    """
    from swarm.ledger.proof_file import RECEIVED, proof_file, voucher_items

    with outcome(as_json), own_files():
        if received and operator is not None:
            raise UsageError("what you received is in your own books, not in an operator's log")
        kept: list[dict[str, Any]] = []
        if operator is not None:
            if account is None:
                raise UsageError("name the account with --account")
            content = proof_file(account, asyncio.run(_leaf_items(operator, account)))
        elif received:
            with _client_books(ledger) as books:
                items = list(_received_items(books)) if books is not None else []
                if books is None or not items:
                    raise UsageError("your client has no receipts yet; name its books by --ledger")
                content = proof_file(RECEIVED, items)
                kept = _kept_policies(
                    (entry.terms.policy for entry in books.received() if entry.receipt),
                    books.policies(),
                )
        else:
            with _node_books(node_ledger) as node:
                if node is None:
                    raise UsageError("your node has no books yet; name them with --node-ledger")
                entry = next(iter(node.channels()), None)
                if entry is None:
                    raise UsageError("nobody has vouched for any work yet")
                content = proof_file(_node_of(entry), voucher_items(node))
                kept = _kept_policies((entry.policy for entry in node.channels()), node.policies())
        output.write_text(content, encoding="ascii")
        if as_json:
            print_result({"file": str(output), "policies": kept}, as_json=True)
        else:
            for each in kept:
                note(f"{each['sessions']} sessions under {each['policy']}")
            note(f"wrote {output}; check it with scripts/verify_proof.py")


@app.command(epilog="[bold]Example[/bold]\n\nswarm ledger verify")
def verify(ledger: Ledger = None, node_ledger: NodeLedger = None, as_json: AsJson = False) -> None:
    """Check signatures and chains of your own books. Exit code 1 if something does not hold."""
    from swarm.ledger.feed import BrokenFeed
    from swarm.protocol.errors import ProtocolError

    with outcome(as_json), own_files():
        events: dict[str, int] = {}
        try:
            with _client_books(ledger) as books:
                if books is not None:
                    events["client"] = books.verify()[0]
            with _node_books(node_ledger) as node:
                if node is not None:
                    events["node"] = node.verify()[0]
        except (BrokenFeed, ProtocolError) as error:
            text = f"the books do not hold: {error}"
            if as_json:
                print_result({"error": text, "kind": type(error).__name__}, as_json=True)
            else:
                note(f"swarm: {text}")
            raise typer.Exit(1) from None
        lines = (f"your {whose}'s books hold: {count} events" for whose, count in events.items())
        print_result({"events": events}, *lines, as_json=as_json)


# --- where things are ----------------------------------------------------------------------------
@contextmanager
def _client_books(path: Path | None) -> Iterator[ClientLedgerReader | None]:
    from swarm.client.ledger_store import ClientLedgerReader

    found = path or Path(os.environ.get(LEDGER_FILE_VARIABLE) or LEDGER_FILE)
    found = found.expanduser()
    if path is None and not found.exists():
        yield None
        return
    reader = ClientLedgerReader.open(found)
    try:
        yield reader
    finally:
        reader.close()


@contextmanager
def _node_books(path: Path | None) -> Iterator[LedgerReader | None]:
    from swarm.ledger.node_books import LedgerReader

    found = (path or NODE_LEDGER).expanduser()
    if path is None and not found.exists():
        yield None
        return
    reader = LedgerReader.open(found)
    try:
        yield reader
    finally:
        reader.close()


def _node_of(entry: ChannelEntry) -> str:
    from swarm.protocol import strict_json
    from swarm.protocol.ledger_objects import Receipt

    return strict_json.parse(Receipt, entry.receipt.payload).node


def _received_items(books: ClientLedgerReader) -> Iterator[str]:
    """One for each session at a node that gave a receipt."""
    from swarm.ledger.proof_file import voucher_item
    from swarm.protocol.ledger_objects import Allowance

    allowances, policies = books.allowances(), books.policies()
    for entry in books.received():
        terms = entry.terms
        if not entry.receipt or terms.serial not in allowances:
            continue
        allowance = allowances[terms.serial].envelope(Allowance).to_json()
        policy = policies.get(terms.policy, "")
        yield voucher_item(allowance, entry.voucher, entry.receipt, policy)


def _kept_policies(kept: Iterator[str], texts: dict[str, str]) -> list[dict[str, Any]]:
    """How many sessions kept which policy, in words."""
    from swarm.ledger.kept_policies import described

    return [
        {"sessions": count, "policy": described(digest, texts)}
        for digest, count in Counter(kept).most_common()
    ]


def _at_operator(url: str, account: str) -> dict[str, Any]:
    from swarm.ledger.operator_client import OperatorClient

    async def ask() -> dict[str, Any]:
        async with OperatorClient(url) as operator:
            return await operator.account(account)

    return asyncio.run(ask())


async def _leaf_items(url: str, account: str) -> list[str]:
    """Every entry of an account with its leaf and its proof."""
    from swarm.ledger.operator_client import OperatorClient
    from swarm.ledger.proof_file import leaf_item

    items = []
    async with OperatorClient(url) as operator:
        before: int | None = None
        while True:
            entries = (await operator.account(account, before))["entries"]
            for entry in entries:
                index = int(entry["index"])
                leaf, proof = await operator.leaf(index), await operator.proof(index)
                items.append(leaf_item(leaf, proof))
            if not entries:
                return items
            before = min(int(entry["index"]) for entry in entries)
