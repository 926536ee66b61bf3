"""``swarm-node service`` and ``swarm-node identity``: what runs a node without its owner."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from swarm.command_results import print_result

app = typer.Typer(
    name="service",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Let systemd start this computer's node, and start it again when it ends.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm-node service install --config node.toml\n\n"
    "sudo swarm-node service install --config /etc/sovereign-swarm/node.toml\n\n"
    "swarm-node service install --config node.toml --print"
)
def install(
    config: Annotated[
        Path, typer.Option("--config", metavar="FILE", help="Settings of the node, as for join.")
    ],
    start: Annotated[bool, typer.Option("--start/--no-start", help="Start it now as well.")] = True,
    show: Annotated[
        bool, typer.Option("--print", help="Only print the unit; nothing is changed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make the node a service: of the computer as root, otherwise of you.

    The node starts with the computer; a service of yours does so only after
    [bold]loginctl enable-linger[/bold]. Stopping it hands its sessions over first.
    """
    from swarm.node.cli import outcome
    from swarm.node.config import NodeSettings, load_settings
    from swarm.node.systemd import Systemd, unit_text

    with outcome(as_json):
        as_system = os.geteuid() == 0
        config = config.expanduser().absolute()
        # The service sees no environment of ours: the file alone has to be enough.
        settings = load_settings(NodeSettings, config, {}, {})
        text = unit_text(_program(), config, settings, as_system=as_system)
        if show:
            print_result({"unit": text}, text.removesuffix("\n"), as_json=as_json)
            return
        systemd = Systemd(as_system=as_system)
        settings.data_dir.expanduser().mkdir(mode=0o700, parents=True, exist_ok=True)
        systemd.install(text, start=start)
        lines = [
            f"installed {systemd.unit_file}",
            "see what it does by swarm-node service status, or swarm-node status --config",
        ]
        if not as_system:
            lines.append("loginctl enable-linger lets it run while you are not logged in")
        fields = {"unit_file": str(systemd.unit_file), "started": start}
        print_result(fields, *lines, as_json=as_json)


@app.command(epilog="[bold]Example[/bold]\n\nswarm-node service remove")
def remove(as_json: AsJson = False) -> None:
    """Stop the service, which hands its sessions over first, and take it away."""
    from swarm.node.cli import outcome
    from swarm.node.systemd import Systemd

    with outcome(as_json):
        systemd = Systemd(as_system=os.geteuid() == 0)
        systemd.remove()
        print_result(
            {"removed": str(systemd.unit_file)},
            f"removed {systemd.unit_file}; settings and key are still there",
            as_json=as_json,
        )


@app.command(epilog="[bold]Example[/bold]\n\nswarm-node service status --json")
def status(as_json: AsJson = False) -> None:
    """Is the service installed, and does it run? Exit code 1 if it does not."""
    from swarm.node.cli import outcome
    from swarm.node.systemd import Systemd

    with outcome(as_json):
        state = Systemd(as_system=os.geteuid() == 0).state()
        if as_json:
            typer.echo(json.dumps(asdict(state)))
        elif not state.installed:
            typer.echo("not installed; swarm-node service install --config FILE does that")
        else:
            enabled = "starts with the computer" if state.enabled else "does not start by itself"
            typer.echo(f"{state.unit}: {'running' if state.active else 'not running'}, {enabled}")
        if not state.active:
            raise typer.Exit(1)


def identity(
    file: Annotated[
        Path | None,
        typer.Option("--identity", metavar="FILE", help="Key file; made when missing, mode 0600."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Settings that name the key.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the peer id of a key, which is made when it is missing.

    So an address is known before its node runs: [bold]/dns4/HOST/tcp/PORT/p2p/PEER_ID[/bold].
    """
    from swarm.node.cli import outcome
    from swarm.node.config import load_identity_file
    from swarm.protocol.identity import Identity

    with outcome(as_json):
        path = load_identity_file(config, os.environ, file)
        peer = Identity.load_or_create(path).peer_id
        print_result({"peer_id": peer, "file": str(path)}, peer, as_json=as_json)


def _program() -> Path:
    """This very command: a service has no PATH of its owner's."""
    beside = Path(sys.executable).with_name("swarm-node")
    return beside if beside.exists() else Path(sys.argv[0]).absolute()
