"""Orders to an operator's books: money, prices, members, certificates; each a signed line.

The commands stand under ``swarm operator`` (``client.operator_commands``).
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from swarm.client.joining import AsJson, outcome, own_files
from swarm.command_results import print_result
from swarm.protocol.identity import Identity
from swarm.protocol.prices import UNITS_PER_CREDIT

if TYPE_CHECKING:
    from swarm.ledger.operator_client import OperatorClient
    from swarm.protocol.envelope import Envelope
    from swarm.protocol.ledger_objects import SignedObject
    from swarm.protocol.operator_objects import MintOrder

Result = TypeVar("Result")

orders = typer.Typer(rich_markup_mode="rich")

Folder = Annotated[Path, typer.Argument(help="The operator's folder.")]
Url = Annotated[
    str,
    typer.Option("--operator", metavar="URL", envvar="SWARM_OPERATOR", help="Where it listens."),
]
Keys = Annotated[
    list[Path],
    typer.Option("--key", metavar="FILE", help="Key file that signs; repeat it for several."),
]


@orders.command(
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
    as_json: AsJson = False,
) -> None:
    """Make money for a budget. Two of the three mint keys have to sign."""
    with outcome(as_json), own_files():
        origin = _asked(operator, lambda client: client.terms()).origin
        _send_order(operator, _signed(_mint_order(origin, budget, credits_, reason), key), as_json)


@orders.command(
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
    as_json: AsJson = False,
) -> None:
    """Write an order to mint to a file, for the next person to sign."""
    with outcome(as_json), own_files():
        _write(file, _signed(_mint_order(origin, budget, credits_, reason), key), as_json)


@orders.command(
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
    as_json: AsJson = False,
) -> None:
    """Write an order that makes a mistake good, for the next mint key to sign."""
    with outcome(as_json), own_files():
        from swarm.protocol.operator_objects import Compensation

        order = Compensation(
            secrets.token_hex(16), origin, event, source, target, units, reason, _now()
        )
        _write(file, _signed(order, key), as_json)


@orders.command(epilog="[bold]Example[/bold]\n\nswarm operator sign order.json --key mint-2.key")
def sign(
    file: Annotated[Path, typer.Argument(help="An order that somebody has drafted.")],
    key: Keys,
    as_json: AsJson = False,
) -> None:
    """Show an order and add signatures to it."""
    with outcome(as_json), own_files():
        from swarm.protocol.envelope import Envelope, parse_envelope, seal

        sealed = parse_envelope(file.read_bytes())
        if not as_json:
            print(sealed.payload.decode("ascii"))
        added = seal(
            sealed.payload_type, sealed.payload, [Identity.load(each).private_key for each in key]
        )
        signatures = sealed.signatures + added.signatures
        _write(file, Envelope(sealed.payload_type, sealed.payload, signatures), as_json)


@orders.command(
    epilog="[bold]Example[/bold]\n\n"
    "swarm operator send order.json --operator https://operator.example"
)
def send(
    file: Annotated[Path, typer.Argument(help="A signed order.")],
    operator: Url,
    as_json: AsJson = False,
) -> None:
    """Send an order that enough people have signed."""
    with outcome(as_json), own_files():
        from swarm.protocol.envelope import parse_envelope

        _send_order(operator, parse_envelope(file.read_bytes()), as_json)


@orders.command(
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
    as_json: AsJson = False,
) -> None:
    """Say what a block of a model costs; from then on work on it is paid."""
    with outcome(as_json), own_files():
        from swarm.protocol.operator_objects import ModelPrice

        if blocks is None or mflop is None:
            from swarm.catalogue.checkpoint import Checkpoint
            from swarm.catalogue.resolve import resolve_checkpoint
            from swarm.ledger.model_price import block_price

            checkpoint = Checkpoint.open(resolve_checkpoint(model))
            model, blocks = checkpoint.revision.hex(), checkpoint.number_of_blocks
            mflop = block_price(checkpoint)
            if not as_json:
                print(f"revision {model}, {blocks} blocks of {mflop} MFLOP per token")
        entry = ModelPrice(model, blocks, mflop, _now())
        _send_order(operator, _signed(entry, [_operator_key(folder)]), as_json)


@orders.command(
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
    as_json: AsJson = False,
) -> None:
    """Let an organisation certify its nodes."""
    with outcome(as_json), own_files():
        from swarm.protocol.operator_objects import OrganisationEntry

        entry = OrganisationEntry(name, public_key, int(validator), _now())
        _send_order(operator, _signed(entry, [_operator_key(folder)]), as_json)


@orders.command(
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
    as_json: AsJson = False,
) -> None:
    """Let an account draw allowances from a budget."""
    with outcome(as_json), own_files():
        from swarm.protocol.operator_objects import MemberEntry

        entry = MemberEntry(account, budget, daily_credits * UNITS_PER_CREDIT, organisation, _now())
        _send_order(operator, _signed(entry, [_operator_key(folder)]), as_json)


@orders.command(
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
    as_json: AsJson = False,
) -> None:
    """Vouch for a node: half of its earnings are free at once, and it needs no probation.

    The node's owner puts the file into the node's settings, as certificate.
    """
    with outcome(as_json), own_files():
        from swarm.protocol.operator_objects import NodeCertificate

        stated = NodeCertificate(node, organisation, _now(), _now() + days * 24 * 3600)
        _write(file, _signed(stated, [key]), as_json)


@orders.command(
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
    as_json: AsJson = False,
) -> None:
    """Let a node's key be worth nothing from now on."""
    with outcome(as_json), own_files():
        from swarm.protocol.identity import public_key_from_peer_id
        from swarm.protocol.ledger_objects import Revocation

        size = _asked(operator, lambda client: client.totals())["log_size"]
        revoked = Revocation(public_key_from_peer_id(node).hex(), reason, size, _now())
        index = _asked(operator, lambda client: client.revoke(_signed(revoked, [key])))
        _say_done(index, as_json)


def _mint_order(origin: str, budget: str, credits_: int, reason: str) -> MintOrder:
    from swarm.protocol.operator_objects import MintOrder

    units = credits_ * UNITS_PER_CREDIT
    return MintOrder(secrets.token_hex(16), origin, budget, units, reason, _now())


def _signed(order: SignedObject, files: list[Path]) -> Envelope:
    from swarm.protocol import ledger_objects

    return ledger_objects.sign(order, *(Identity.load(file).private_key for file in files))


def _operator_key(folder: Path) -> Path:
    from swarm.operator.settings import OPERATOR_KEY_FILE

    return folder / OPERATOR_KEY_FILE


def _write(file: Path, order: Envelope, as_json: bool) -> None:
    """People see nothing, as with ``cp``."""
    file.write_text(order.to_json() + "\n", encoding="ascii")
    print_result(
        {
            "file": str(file),
            "order": json.loads(order.payload),
            "signatures": len(order.signatures),
        },
        as_json=as_json,
    )


def _send_order(url: str, order: Envelope, as_json: bool) -> None:
    index = _asked(url, lambda client: client.order(order))
    _say_done(index, as_json, order=json.loads(order.payload))


def _say_done(index: int, as_json: bool, **fields: Any) -> None:
    print_result({"leaf": index} | fields, f"done; leaf {index} of the log", as_json=as_json)


def _asked(url: str, question: Callable[[OperatorClient], Awaitable[Result]]) -> Result:
    async def ask() -> Result:
        from swarm.ledger.operator_client import OperatorClient

        async with OperatorClient(url) as client:
            return await question(client)

    return asyncio.run(ask())


def _now() -> int:
    return int(time.time())
