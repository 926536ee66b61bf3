"""``swarm authority``: found a swarm, give passports, take them back."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.client.joining import AsJson, Config, Peers, outcome, prepare_process, settings_from
from swarm.client.output import note
from swarm.protocol.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from swarm.authority import Authority
    from swarm.protocol.passport import AdmissionMode, Tier

authority = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Be the authority of a swarm: its charter, passports, invitations and revocations.\n\n"
    "The folder holds the key: keep it, and a copy of it, where nobody else reads it.",
)

Folder = Annotated[
    Path, typer.Option("--folder", metavar="DIR", help="Where the authority keeps key and books.")
]
HERE = Path("authority")
TierName = Annotated[
    str, typer.Option("--tier", help="anonymous, registered, certified or trusted.")
]
Organisation = Annotated[str, typer.Option("--organisation", help="Who runs the peer.")]
Country = Annotated[str, typer.Option("--country", metavar="CC", help="Where it stands, as KE.")]


@authority.command(
    epilog="[bold]Example[/bold]\n\n"
    "swarm authority init 'Kenya National Swarm' --admission members --no-hub"
)
def init(
    name: Annotated[str, typer.Argument(help="Of the swarm.")],
    folder: Folder = HERE,
    admission: Annotated[
        str, typer.Option("--admission", help="open, invited or members (only).")
    ] = "members",
    publisher: Annotated[
        list[str] | None,
        typer.Option("--publisher", metavar="PEER", help="Whose manifests are believed."),
    ] = None,
    operator: Annotated[
        list[str] | None,
        typer.Option("--operator", metavar="PEER", help="Whose allowances count."),
    ] = None,
    other_authority: Annotated[
        list[str] | None,
        typer.Option("--authority", metavar="PEER", help="A further authority key."),
    ] = None,
    minimum_software: Annotated[
        str, typer.Option("--minimum-software", help="Older versions refuse to join.")
    ] = "",
    minimum_protocol: Annotated[
        int, typer.Option("--minimum-protocol", help="Oldest protocol version that is admitted.")
    ] = 0,
    hub: Annotated[
        bool, typer.Option("--hub/--no-hub", help="Whether weights may come from outside.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Found a swarm: make its key and its charter."""
    with outcome(as_json):
        from swarm.authority import Authority
        from swarm.protocol.passport import Charter

        charter = Charter(
            swarm_id=bytes(32),
            version=1,
            name=name,
            admission=_admission(admission),
            authorities=tuple(other_authority or ()),
            publishers=tuple(publisher or ()),
            operators=tuple(operator or ()),
            minimum_protocol_version=minimum_protocol,
            minimum_software=minimum_software,
            hub=hub,
        )
        founded = Authority.found(folder, charter)
        if as_json:
            print(json.dumps(_about(founded)))
        else:
            note(f"{name} is founded; its authority is {founded.identity.peer_id}")
            print(folder / "charter.swarm")


@authority.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm authority issue 12D3KooW... --organisation 'University of Nairobi' --country KE\n\n"
    "swarm authority issue 12D3KooW... --organisation KENET --may-issue"
)
def issue(
    peer: Annotated[str, typer.Argument(metavar="PEER", help="As swarm-node identity prints it.")],
    folder: Folder = HERE,
    organisation: Organisation = "",
    country: Country = "",
    tier: TierName = "registered",
    days: Annotated[float, typer.Option("--days", help="How long it is valid.")] = 365.0,
    may_issue: Annotated[
        bool, typer.Option("--may-issue", help="The peer may itself give passports.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print a passport for a peer, which its owner gives to swarm-node accept."""
    with outcome(as_json):
        from swarm.membership_files import PASSPORT, to_text
        from swarm.protocol.identity import PeerId

        passport = _open(folder).issue(
            PeerId(peer),
            organisation=organisation,
            country=country,
            tier=_tier(tier),
            days=days,
            may_issue=may_issue,
        )
        text = to_text(PASSPORT, passport)
        print(json.dumps({"passport": text}) if as_json else text)


@authority.command(
    epilog="[bold]Example[/bold]\n\n"
    "swarm authority invite --count 30 --days 14 --at /ip4/192.0.2.7/tcp/31331"
)
def invite(
    folder: Folder = HERE,
    count: Annotated[int, typer.Option("--count", help="How many peers may use it.")] = 1,
    days: Annotated[float, typer.Option("--days", help="How long it is valid.")] = 7.0,
    passport_days: Annotated[
        int, typer.Option("--passport-days", help="How long the passports are valid.")
    ] = 365,
    at: Annotated[
        list[str] | None,
        typer.Option("--at", metavar="ADDRESS", help="Where swarm authority desk listens."),
    ] = None,
    organisation: Organisation = "",
    country: Country = "",
    tier: TierName = "registered",
    as_json: AsJson = False,
) -> None:
    """Print an invitation, which is exchanged for a passport at the desk while it is open."""
    with outcome(as_json):
        if not at:
            raise UsageError("say where the desk listens, by --at ADDRESS")
        invitation = _open(folder).invite(
            at,
            count=count,
            days=days,
            passport_days=passport_days,
            tier=_tier(tier),
            organisation=organisation,
            country=country,
        )
        print(json.dumps({"invitation": str(invitation)}) if as_json else str(invitation))


@authority.command(
    epilog="[bold]Example[/bold]\n\nswarm authority desk --listen /ip4/0.0.0.0/tcp/31331"
)
def desk(
    folder: Folder = HERE,
    listen: Annotated[
        list[str] | None, typer.Option("--listen", metavar="ADDRESS", help="Where to listen.")
    ] = None,
    peers: Peers = None,
    as_json: AsJson = False,
) -> None:
    """Exchange invitations for passports until Ctrl-C; with --peers also bring revocations."""
    with outcome(as_json):
        prepare_process()
        from swarm.client.authority_desk import run_desk

        def ready(addresses: list[str]) -> None:
            if as_json:
                print(json.dumps({"event": "ready", "addresses": addresses}), flush=True)
            else:
                for address in addresses:
                    note(f"the desk is open at {address}")

        asyncio.run(run_desk(_open(folder), folder, tuple(listen or ()), tuple(peers or ()), ready))


@authority.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm authority revoke 12D3KooW... --peers ...\n\n"
    "swarm authority revoke 0f4c2a9e11d3b758"
)
def revoke(
    what: Annotated[str, typer.Argument(help="A serial, a peer id or an organisation.")],
    folder: Folder = HERE,
    peers: Peers = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Take certificates back; with --peers the swarm learns of it at once."""
    with outcome(as_json):
        from swarm.client.authority_desk import bring_revocations

        opened = _open(folder)
        serials = opened.revoke(what)
        told = False
        if peers:
            prepare_process()
            asyncio.run(bring_revocations(opened, folder, settings_from(peers, None, config)))
            told = True
        if as_json:
            print(json.dumps({"serials": serials, "told": told}))
        else:
            note(
                f"revoked {', '.join(serials)}; "
                + ("the swarm knows" if told else "run it with --peers to tell the swarm")
            )


@authority.command(name="list", epilog="[bold]Example[/bold]\n\nswarm authority list --json")
def list_issued(folder: Folder = HERE, as_json: AsJson = False) -> None:
    """Show the charter and everything that was issued."""
    with outcome(as_json):
        opened = _open(folder)
        if as_json:
            print(json.dumps(_about(opened) | {"issued": opened.issued()}))
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0))
        for title in ("serial", "what", "for", "organisation", "tier", "until", ""):
            table.add_column(title, overflow="fold")
        for line in opened.issued():
            until = datetime.fromtimestamp(line["expires_unix_s"], UTC).date().isoformat()
            place = line.get("organisation", "")
            if line.get("country"):
                place += f" ({line['country']})"
            whom = line.get("peer") or f"{line.get('count')} peers"
            revoked = "revoked" if line["revoked"] else ""
            table.add_row(line["serial"], line["kind"], whom, place, line["tier"], until, revoked)
        charter = opened.charter
        note(f"{charter.name}: {charter.admission.name.lower()}, charter {charter.version}")
        Console().print(table)


# --- parts ---------------------------------------------------------------------------------------
def _open(folder: Path) -> Authority:
    from swarm.authority import Authority

    return Authority.open(folder)


def _about(opened: Authority) -> dict[str, object]:
    charter = opened.charter
    return {
        "name": charter.name,
        "swarm_id": charter.swarm_id.hex(),
        "version": charter.version,
        "admission": charter.admission.name.lower(),
        "authorities": charter.authorities,
        "publishers": charter.publishers,
        "operators": charter.operators,
    }


def _admission(text: str) -> AdmissionMode:
    from swarm.protocol.passport import AdmissionMode

    try:
        return AdmissionMode[text.upper()]
    except KeyError:
        raise ConfigError(f"admission {text!r}: one of open, invited, members") from None


def _tier(text: str) -> Tier:
    from swarm.protocol.passport import Tier

    try:
        return Tier[text.upper()]
    except KeyError:
        names = ", ".join(tier.name.lower() for tier in Tier)
        raise ConfigError(f"tier {text!r}: one of {names}") from None
