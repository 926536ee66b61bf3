"""``swarm operator``: run a swarm's books, mint its budgets, check them from the first leaf on."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from swarm.client.joining import AsJson, outcome, own_files
from swarm.client.operator_orders import Folder, Url, orders
from swarm.client.output import note
from swarm.command_results import print_result
from swarm.protocol.errors import ConfigError
from swarm.protocol.identity import Identity

if TYPE_CHECKING:
    from swarm.ledger.notes import VerifierKey
    from swarm.ledger.replay import Replayed

operator_app = typer.Typer(
    name="operator",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Run the books of a swarm: budgets, allowances, settlement, a public log.\n\n"
    "A swarm works without an operator; with one, gifts of compute are counted, and anybody can "
    "check the count. docs/operators.md tells how to start one.",
)

operator_app.add_typer(orders)


@operator_app.command(epilog="[bold]Example[/bold]\n\nswarm operator key mint-1.key")
def key(
    file: Annotated[Path, typer.Argument(help="Where to make the key; must not exist.")],
    as_json: AsJson = False,
) -> None:
    """Make a key, for minting or an account, and print its public half and its peer id."""
    with outcome(as_json), own_files():
        identity = Identity.generate()
        try:
            identity.save(file)
        except FileExistsError:
            raise ConfigError(f"{file} is there already") from None
        public = identity.public_key_bytes.hex()
        print_result(
            {"public_key": public, "peer_id": identity.peer_id, "file": str(file)},
            f"{public} {identity.peer_id}",
            as_json=as_json,
        )


@operator_app.command(
    epilog="[bold]Example[/bold]\n\n"
    "swarm operator init ./books --origin operator.example/ledger"
    " --mint-key 3a… --mint-key 9c… --mint-key e1…"
)
def init(
    folder: Folder,
    origin: Annotated[
        str, typer.Option("--origin", help="Name of the log: host and path, without https://.")
    ],
    mint_key: Annotated[
        list[str],
        typer.Option("--mint-key", metavar="HEX", help="Public half of a mint key; three of them."),
    ],
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where to answer.")
    ] = "127.0.0.1:8440",
    as_json: AsJson = False,
) -> None:
    """Make a folder with keys and settings. The mint keys stay with three other people."""
    with outcome(as_json), own_files():
        from swarm.operator.settings import create_folder, load_settings

        create_folder(folder, origin, mint_key, listen)
        settings = load_settings(folder)
        log_key, operator_key = str(settings.log_verifier), settings.policy.operator_key.hex()
        print_result(
            {"log_key": log_key, "operator_key": operator_key, "folder": str(folder)},
            f"log key       {log_key}",
            f"operator key  {operator_key}",
            as_json=as_json,
        )
        if not as_json:
            note(f"publish both; then: swarm operator run {folder}")


@operator_app.command(epilog="[bold]Example[/bold]\n\nswarm operator run ./books")
def run(folder: Folder, as_json: AsJson = False) -> None:
    """Open the door: issue, settle, publish the log, until Ctrl-C."""
    with outcome(as_json), own_files():
        import logging

        from swarm.operator.app import leave_on_signals, run_operator
        from swarm.operator.settings import load_settings

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        settings = load_settings(folder)

        async def serve() -> None:
            leaving = asyncio.Event()
            with leave_on_signals(leaving):
                await run_operator(settings, lambda url: say_where(url, as_json), leaving)

        asyncio.run(serve())


@operator_app.command(
    epilog="[bold]Example[/bold]\n\n"
    "swarm operator verify --operator https://operator.example --save "
    "log.jsonl"
)
def verify(
    operator: Url,
    log_key: Annotated[
        str, typer.Option("--log-key", help="The log's key, from a source other than the operator.")
    ] = "",
    witness: Annotated[
        list[str] | None,
        typer.Option("--witness", metavar="KEY", help="A witness that must have cosigned."),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="FILE", help="Keep the export, one leaf a line."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read the whole log, add it up anew, and compare with what the log's key has signed."""
    with outcome(as_json), own_files():
        from swarm.ledger.notes import VerifierKey

        log = VerifierKey.parse(log_key) if log_key else None
        witnesses = [VerifierKey.parse(text) for text in witness or ()]
        with save.open("wb") if save else nullcontext() as file:
            log, replayed = asyncio.run(_verify(operator, log, witnesses, file))
        balances = {
            account: replayed.balances[account]
            for account in sorted(replayed.balances)
            if not account.startswith(("user:", "escrow:"))
        }
        fields: dict[str, Any] = {
            "events": replayed.events,
            "signed_by": log.name,
            "witnesses": len(witnesses),
            "balances": balances,
            "nodes_paid": len(replayed.paid_by_node),
            "block_tokens": replayed.block_tokens,
        }
        print_result(
            fields,
            f"{replayed.events} events add up, under the root that {log.name} signed"
            f" and {len(witnesses)} witnesses cosigned",
            *(f"{account:24} {units:>20,} units" for account, units in balances.items()),
            f"{len(replayed.paid_by_node)} nodes were paid for {replayed.block_tokens:,}"
            " block-tokens",
            as_json=as_json,
        )


async def _verify(
    url: str, log: VerifierKey | None, witnesses: list[VerifierKey], save: BinaryIO | None
) -> tuple[VerifierKey, Replayed]:
    """The log's key and what its leaves add up to. Raises SwarmErrors."""
    from swarm.ledger.notes import verified_checkpoint
    from swarm.ledger.operator_client import OperatorClient
    from swarm.ledger.replay import Replayed

    async with OperatorClient(url) as client:
        terms = await client.terms()
        if log is None:
            note("no --log-key: the operator's own word for its key is believed")
            log = terms.log_key
        signed = await client.checkpoint()
        checkpoint = verified_checkpoint(signed, log)
        cosigned = {each.key_id for each in signed.verified_by(witnesses)}
        for each in witnesses:
            if each.key_id not in cosigned:
                raise ConfigError(f"{each.name} has not cosigned this checkpoint")
        replayed = Replayed(terms.mint_keys)
        async for leaf in client.export(checkpoint.size):
            replayed.add(leaf)
            if save is not None:
                save.write(leaf + b"\n")
        replayed.check(checkpoint)
    return log, replayed


def say_where(url: str, as_json: bool) -> None:
    """That a server has begun."""
    print_result({"event": "ready", "url": url}, f"listening on {url}", as_json=as_json)
