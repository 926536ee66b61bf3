"""``swarm operator``: run a swarm's books, mint its budgets, check them from the first leaf on."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, TypeVar

import typer

from swarm.client.output import explain, note
from swarm.protocol.errors import ConfigError, RemoteError, SwarmError, UsageError
from swarm.protocol.identity import Identity
from swarm.protocol.prices import UNITS_PER_CREDIT

if TYPE_CHECKING:
    from swarm.ledger.notes import VerifierKey
    from swarm.ledger.operator_client import OperatorClient
    from swarm.protocol.envelope import Envelope
    from swarm.protocol.ledger_objects import SignedObject

Result = TypeVar("Result")

EXIT_USAGE, EXIT_REFUSED, EXIT_NETWORK, EXIT_INTERRUPTED = 2, 3, 4, 130

operator_app = typer.Typer(
    name="operator",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Run the books of a swarm: budgets, allowances, settlement, a public log.\n\n"
    "A swarm works without an operator; with one, gifts of compute are counted, and anybody can "
    "check the count. docs/operators.md tells how to start one.",
)

Folder = Annotated[Path, typer.Argument(help="The operator's folder.")]
Url = Annotated[
    str,
    typer.Option("--operator", metavar="URL", envvar="SWARM_OPERATOR", help="Where it listens."),
]
Keys = Annotated[
    list[Path],
    typer.Option("--key", metavar="FILE", help="Key file that signs; repeat it for several."),
]


@operator_app.command(epilog="[bold]Example[/bold]\n\nswarm operator key mint-1.key")
def key(
    file: Annotated[Path, typer.Argument(help="Where to make the key; must not exist.")],
) -> None:
    """Make a key, for minting or an account, and print its public half and its peer id."""
    with outcome():
        identity = Identity.generate()
        try:
            identity.save(file)
        except FileExistsError:
            raise ConfigError(f"{file} is there already") from None
        except OSError as error:
            raise ConfigError(f"cannot write {file}: {error.strerror}") from error
        print(f"{identity.public_key_bytes.hex()} {identity.peer_id}")


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
) -> None:
    """Make a folder with keys and settings. The mint keys stay with three other people."""
    with outcome():
        from swarm.operator.settings import create_folder, load_settings

        create_folder(folder, origin, mint_key, listen)
        settings = load_settings(folder)
        print(f"log key       {settings.log_verifier}")
        print(f"operator key  {settings.policy.operator_key.hex()}")
        note(f"publish both; then: swarm operator run {folder}")


@operator_app.command(epilog="[bold]Example[/bold]\n\nswarm operator run ./books")
def run(folder: Folder) -> None:
    """Open the door: issue, settle, publish the log, until Ctrl-C."""
    with outcome():
        import logging

        from swarm.operator.app import leave_on_signals, run_operator
        from swarm.operator.settings import load_settings

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        settings = load_settings(folder)

        async def serve() -> None:
            leaving = asyncio.Event()
            with leave_on_signals(leaving):
                await run_operator(settings, _say_where, leaving)

        asyncio.run(serve())


@operator_app.command(
    epilog="[bold]Example[/bold]\n\n"
    "swarm operator mint public 1000 --key mint-1.key --key mint-2.key "
    "--operator https://operator.example --reason 'budget of 2027'"
)
def mint(
    budget: Annotated[str, typer.Argument(help="Name of the budget, such as public.")],
    credits_: Annotated[int, typer.Argument(metavar="CREDITS", help="1 credit is 1 PFLOP-eq.")],
    key: Keys,
    operator: Url,
    reason: Annotated[str, typer.Option("--reason", help="Stands in the public log.")],
) -> None:
    """Make money for a budget. Two of the three mint keys have to sign."""
    with outcome():
        from swarm.protocol.operator_objects import MintOrder

        origin = _asked(operator, lambda client: client.terms()).origin
        order = MintOrder(
            secrets.token_hex(16), origin, budget, credits_ * UNITS_PER_CREDIT, reason, _now()
        )
        _send_order(operator, _signed(order, key))


@operator_app.command(
    epilog="[bold]Example[/bold]\n\n"
    "swarm operator draft-mint public 1000 order.json --key mint-1.key "
    "--origin operator.example/ledger --reason 'budget of 2027'"
)
def draft_mint(
    budget: Annotated[str, typer.Argument(help="Name of the budget, such as public.")],
    credits_: Annotated[int, typer.Argument(metavar="CREDITS", help="1 credit is 1 PFLOP-eq.")],
    file: Annotated[Path, typer.Argument(help="Where to write the order.")],
    key: Keys,
    origin: Annotated[str, typer.Option("--origin", help="Name of the operator's log.")],
    reason: Annotated[str, typer.Option("--reason", help="Stands in the public log.")],
) -> None:
    """Write an order to mint to a file, for the next person to sign."""
    with outcome():
        from swarm.protocol.operator_objects import MintOrder

        order = MintOrder(
            secrets.token_hex(16), origin, budget, credits_ * UNITS_PER_CREDIT, reason, _now()
        )
        file.write_text(_signed(order, key).to_json() + "\n", encoding="ascii")


@operator_app.command(
    epilog="[bold]Example[/bold]\n\n"
    "swarm operator draft-repair EVENT user:12D3KooW… budget:public 500 "
    "order.json --key mint-1.key --origin operator.example/ledger --reason "
    "'paid twice'"
)
def draft_repair(
    event: Annotated[str, typer.Argument(help="Id of the event that went wrong.")],
    source: Annotated[str, typer.Argument(help="Account that pays, such as budget:public.")],
    target: Annotated[str, typer.Argument(help="Account that gets it, such as user:12D3KooW…")],
    units: Annotated[int, typer.Argument(help="How much, in units: a credit has 10^9.")],
    file: Annotated[Path, typer.Argument(help="Where to write the order.")],
    key: Keys,
    origin: Annotated[str, typer.Option("--origin", help="Name of the operator's log.")],
    reason: Annotated[str, typer.Option("--reason", help="Stands in the public log.")],
) -> None:
    """Write an order that makes a mistake good, for the next mint key to sign."""
    with outcome():
        from swarm.protocol.operator_objects import Compensation

        order = Compensation(
            secrets.token_hex(16), origin, event, source, target, units, reason, _now()
        )
        file.write_text(_signed(order, key).to_json() + "\n", encoding="ascii")


@operator_app.command(
    epilog="[bold]Example[/bold]\n\nswarm operator sign order.json --key mint-2.key"
)
def sign(
    file: Annotated[Path, typer.Argument(help="An order that somebody has drafted.")],
    key: Keys,
) -> None:
    """Show an order and add signatures to it."""
    with outcome():
        from swarm.protocol.envelope import Envelope, parse_envelope, seal

        sealed = parse_envelope(file.read_bytes())
        print(sealed.payload.decode("ascii"))
        added = seal(
            sealed.payload_type, sealed.payload, [Identity.load(each).private_key for each in key]
        )
        signatures = sealed.signatures + added.signatures
        file.write_text(
            Envelope(sealed.payload_type, sealed.payload, signatures).to_json() + "\n",
            encoding="ascii",
        )


@operator_app.command(
    epilog="[bold]Example[/bold]\n\n"
    "swarm operator send order.json --operator https://operator.example"
)
def send(
    file: Annotated[Path, typer.Argument(help="A signed order.")],
    operator: Url,
) -> None:
    """Send an order that enough people have signed."""
    with outcome():
        from swarm.protocol.envelope import parse_envelope

        _send_order(operator, parse_envelope(file.read_bytes()))


@operator_app.command(
    epilog="[bold]Example[/bold]\n\n"
    "swarm operator price ./books ./checkpoint --operator "
    "https://operator.example"
)
def price(
    folder: Folder,
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint on this computer; or a revision, 64 hexadecimal digits."),
    ],
    operator: Url,
    blocks: Annotated[int | None, typer.Option("--blocks", help="Blocks of a revision.")] = None,
    mflop: Annotated[
        int | None, typer.Option("--mflop", help="MFLOP of one token through one of its blocks.")
    ] = None,
) -> None:
    """Say what a block of a model costs; from then on work on it is paid."""
    with outcome():
        from swarm.protocol.operator_objects import ModelPrice

        if blocks is None or mflop is None:
            from swarm.catalogue.checkpoint import Checkpoint
            from swarm.catalogue.resolve import resolve_checkpoint
            from swarm.ledger.model_price import block_price

            checkpoint = Checkpoint.open(resolve_checkpoint(model))
            model, blocks = checkpoint.revision.hex(), checkpoint.number_of_blocks
            mflop = block_price(checkpoint)
            print(f"revision {model}, {blocks} blocks of {mflop} MFLOP per token")
        entry = ModelPrice(model, blocks, mflop, _now())
        _send_order(operator, _signed(entry, [_operator_key(folder)]))


@operator_app.command(
    epilog="[bold]Example[/bold]\n\n"
    "swarm operator organisation ./books 'University of Nairobi' 3a9c… "
    "--operator https://operator.example"
)
def organisation(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="Name of the organisation.")],
    public_key: Annotated[str, typer.Argument(help="64 hexadecimal digits.")],
    operator: Url,
    validator: Annotated[
        bool, typer.Option("--validator", help="Its verdicts about nodes count.")
    ] = False,
) -> None:
    """Let an organisation certify its nodes."""
    with outcome():
        from swarm.protocol.operator_objects import OrganisationEntry

        entry = OrganisationEntry(name, public_key, int(validator), _now())
        _send_order(operator, _signed(entry, [_operator_key(folder)]))


@operator_app.command(
    epilog="[bold]Example[/bold]\n\n"
    "swarm operator member ./books 12D3KooW… public --daily-credits 100 "
    "--operator https://operator.example"
)
def member(
    folder: Folder,
    account: Annotated[str, typer.Argument(help="Peer id of the member's key.")],
    budget: Annotated[str, typer.Argument(help="Budget that it may draw on.")],
    daily_credits: Annotated[int, typer.Option("--daily-credits", help="Most per day.")],
    operator: Url,
    organisation: Annotated[
        str, typer.Option("--organisation", help="Whose member the account is.")
    ] = "",
) -> None:
    """Let an account draw allowances from a budget."""
    with outcome():
        from swarm.protocol.operator_objects import MemberEntry

        entry = MemberEntry(account, budget, daily_credits * UNITS_PER_CREDIT, organisation, _now())
        _send_order(operator, _signed(entry, [_operator_key(folder)]))


@operator_app.command(
    epilog="[bold]Example[/bold]\n\n"
    "swarm operator certify 12D3KooW… 'University of Nairobi' "
    "node.certificate --key university.key"
)
def certify(
    node: Annotated[str, typer.Argument(help="Peer id of the node.")],
    organisation: Annotated[str, typer.Argument(help="Name of the organisation that vouches.")],
    file: Annotated[Path, typer.Argument(help="Where to write the certificate.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="The organisation's key.")],
    days: Annotated[int, typer.Option("--days", help="How long it is valid.")] = 90,
) -> None:
    """Vouch for a node: half of its earnings are free at once, and it needs no probation.

    The node's owner puts the file into the node's settings, as certificate.
    """
    with outcome():
        from swarm.protocol.operator_objects import NodeCertificate

        stated = NodeCertificate(node, organisation, _now(), _now() + days * 24 * 3600)
        file.write_text(_signed(stated, [key]).to_json() + "\n", encoding="ascii")


@operator_app.command(
    epilog="[bold]Example[/bold]\n\n"
    "swarm operator revoke 12D3KooW… --key university.key --operator "
    "https://operator.example"
)
def revoke(
    node: Annotated[str, typer.Argument(help="Peer id of the node.")],
    operator: Url,
    key: Annotated[
        Path,
        typer.Option("--key", metavar="FILE", help="Its own key, its organisation's or yours."),
    ],
    reason: Annotated[
        str, typer.Option("--reason", help="compromised, superseded, retired or misbehaved.")
    ] = "compromised",
) -> None:
    """Let a node's key be worth nothing from now on."""
    with outcome():
        from swarm.protocol.identity import public_key_from_peer_id
        from swarm.protocol.ledger_objects import Revocation

        size = _asked(operator, lambda client: client.totals())["log_size"]
        revoked = Revocation(public_key_from_peer_id(node).hex(), reason, size, _now())
        index = _asked(operator, lambda client: client.revoke(_signed(revoked, [key])))
        print(f"done; leaf {index} of the log")


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
) -> None:
    """Read the whole log, add it up anew, and compare with what the log's key has signed."""
    with outcome():
        from swarm.ledger.notes import VerifierKey

        log = VerifierKey.parse(log_key) if log_key else None
        witnesses = [VerifierKey.parse(text) for text in witness or ()]
        with save.open("wb") if save else nullcontext() as file:
            asyncio.run(_verify(operator, log, witnesses, file))


async def _verify(
    url: str, log: VerifierKey | None, witnesses: list[VerifierKey], save: BinaryIO | None
) -> None:
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
    print(
        f"{replayed.events} events add up, under the root that {log.name} signed"
        f" and {len(cosigned)} witnesses cosigned"
    )
    for account in sorted(replayed.balances):
        if not account.startswith(("user:", "escrow:")):
            print(f"{account:24} {replayed.balances[account]:>20,} units")
    print(
        f"{len(replayed.paid_by_node)} nodes were paid for {replayed.block_tokens:,} block-tokens"
    )


def _signed(order: SignedObject, files: list[Path]) -> Envelope:
    from swarm.protocol import ledger_objects

    return ledger_objects.sign(order, *(Identity.load(file).private_key for file in files))


def _operator_key(folder: Path) -> Path:
    from swarm.operator.settings import OPERATOR_KEY_FILE

    return folder / OPERATOR_KEY_FILE


def _send_order(url: str, order: Envelope) -> None:
    index = _asked(url, lambda client: client.order(order))
    print(f"done; leaf {index} of the log")


def _asked(url: str, question: Callable[[OperatorClient], Awaitable[Result]]) -> Result:
    async def ask() -> Result:
        from swarm.ledger.operator_client import OperatorClient

        async with OperatorClient(url) as client:
            return await question(client)

    return asyncio.run(ask())


def _say_where(url: str) -> None:
    print(f"listening on {url}", flush=True)


def _now() -> int:
    return int(time.time())


@contextmanager
def outcome() -> Iterator[None]:
    """Our errors become one line and an exit code, as for every command of ``swarm``."""
    try:
        yield
    except SwarmError as error:
        note(f"swarm: {explain(error)}")
        refused = EXIT_REFUSED if isinstance(error, RemoteError) else EXIT_NETWORK
        raise typer.Exit(EXIT_USAGE if isinstance(error, UsageError) else refused) from None
    except OSError as error:
        note(f"swarm: {error}")
        raise typer.Exit(EXIT_USAGE) from None
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
