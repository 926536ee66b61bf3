"""The command ``swarm-node``: reads flags, sets the process up and hands over to ``app``.

Heavy packages are imported inside the commands, so that ``--help`` answers at once.

Exit codes: 0 left cleanly, 1 doctor found a failure or a bug ended the node, 2 wrong usage or
settings, 3 the blocks cannot be served (checkpoint, memory), 4 the network cannot be used, 130 left
at once by a second Ctrl-C.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Coroutine
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from swarm.command_results import print_result
from swarm.node.config import (
    NodeSettings,
    SeedSettings,
    load_identity_file,
    load_own_files,
    load_settings,
)
from swarm.node.donor.commands import app as donor_app
from swarm.node.ledger_commands import app as ledger_app
from swarm.node.service_commands import app as service_app
from swarm.node.service_commands import identity as identity_command
from swarm.protocol.errors import (
    CapacityError,
    CheckpointError,
    NetworkError,
    NoRouteError,
    ProtocolError,
    RemoteError,
    SwarmError,
    UsageError,
)
from swarm.threads import configure_threads_environment

if TYPE_CHECKING:
    from swarm.node.control import NodeControl
    from swarm.node.view import View

EXIT_USAGE = 2
EXIT_CANNOT_SERVE = 3
EXIT_NETWORK = 4
EXIT_INTERRUPTED = 130

T = TypeVar("T")

app = typer.Typer(
    name="swarm-node",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Give a part of your computer to a swarm that runs language models.\n\n"
    "A model is cut into blocks; each node hosts some of them, and text is made by a chain of "
    "nodes. [bold]doctor[/bold] tells whether this computer is ready, [bold]join[/bold] hosts "
    "blocks until Ctrl-C or [bold]drain[/bold], [bold]seed[/bold] runs the meeting point of a new "
    "swarm.\n\n"
    "Exit codes: 0 left cleanly, 1 doctor found a failure, 2 wrong usage or settings, 3 the blocks "
    "cannot be served, 4 network trouble, 130 left at once by a second Ctrl-C.",
)
app.add_typer(ledger_app, name="ledger")

# --- flags that several commands share -----------------------------------------------------------
Peers = Annotated[
    list[str] | None,
    typer.Option(
        "--peers",
        metavar="ADDRESS",
        help="A peer to join by, as printed by [bold]seed[/bold]; repeat it or separate by commas.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="TOML file with settings; flags win over it."),
]
Name = Annotated[
    str | None, typer.Option("--name", help='Name shown to others, as "University of Nairobi".')
]
Listen = Annotated[
    list[str] | None,
    typer.Option(
        "--listen",
        metavar="ADDRESS",
        help="Multiaddress to listen on, as /ip4/0.0.0.0/tcp/31330; repeatable.",
    ),
]
Announce = Annotated[
    list[str] | None,
    typer.Option(
        "--announce",
        metavar="ADDRESS",
        help="Multiaddress to tell others, when a router forwards a port; repeatable.",
    ),
]
Identity = Annotated[
    Path | None,
    typer.Option("--identity", metavar="FILE", help="Key file; made when missing, mode 0600."),
]
MetricsPort = Annotated[
    int | None,
    typer.Option("--metrics-port", help="Port of the metrics on 127.0.0.1; 0 picks a free one."),
]
Metrics = Annotated[
    bool | None, typer.Option("--metrics/--no-metrics", help="Serve Prometheus metrics.")
]
LogLevel = Annotated[str | None, typer.Option("--log-level", help="debug, info, warning or error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines, for programs.")]
Plain = Annotated[bool, typer.Option("--plain", help="Print plain lines, no live view.")]
Device = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda, mps or xpu; cuda:1 for the second.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]


Charter = Annotated[
    Path | None, typer.Option("--charter", metavar="FILE", help="The swarm's charter.")
]
Passport = Annotated[
    Path | None, typer.Option("--passport", metavar="FILE", help="This peer's passport in it.")
]
Disk = Annotated[
    str | None,
    typer.Option("--disk", metavar="SIZE", help="Most disk for fetched weights, as 200GB."),
]
Upload = Annotated[
    str | None,
    typer.Option("--upload", metavar="SIZE", help="Most sent to peers per second, as 2MB."),
]
Download = Annotated[
    str | None,
    typer.Option("--download", metavar="SIZE", help="Most taken from peers per second, as 10MB."),
]
Mirrors = Annotated[
    list[str] | None,
    typer.Option("--mirror", metavar="PLACE", help="Folder or web address with weights."),
]
Hub = Annotated[
    bool | None,
    typer.Option("--hub/--no-hub", help="Use the Hugging Face hub when all else fails."),
]


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm-node join SmolLM2-135M-Instruct --peers /ip4/192.0.2.1/tcp/31330/p2p/12D3KooW...\n\n"
    "swarm-node join ./checkpoint --blocks 0:10 --dtype float32 --peers ...\n\n"
    "swarm-node join --config node.toml --json"
)
def join(
    model: Annotated[
        str | None,
        typer.Argument(help="Checkpoint folder, or a name in the swarm's catalogue or on the hub."),
    ] = None,
    peers: Peers = None,
    blocks: Annotated[
        str | None,
        typer.Option("--blocks", metavar="FIRST:END", help="Blocks to host: 0:10 is 0 to 9."),
    ] = None,
    number_of_blocks: Annotated[
        int | None,
        typer.Option("--num-blocks", help="How many blocks to host, where they are missing most."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    name: Name = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads.")] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Most memory to use, as 8GiB."),
    ] = None,
    cache_tokens: Annotated[
        int | None, typer.Option("--cache-tokens", help="Tokens of all sessions together.")
    ] = None,
    organisation: Annotated[
        str | None, typer.Option("--organisation", help="Who runs the node.")
    ] = None,
    country: Annotated[
        str | None, typer.Option("--country", metavar="CC", help="Where it stands, as in KE.")
    ] = None,
    watts: Annotated[
        float | None,
        typer.Option("--watts", help="What this computer draws at work, for energy statistics."),
    ] = None,
    hours: Annotated[
        str | None,
        typer.Option(
            "--hours",
            metavar="HOURS",
            help="When to work: 20:00-08:00, or mon-fri 20:00-08:00, sat-sun 00:00-24:00.",
        ),
    ] = None,
    charter: Charter = None,
    passport: Passport = None,
    disk: Disk = None,
    upload: Upload = None,
    download: Download = None,
    mirror: Mirrors = None,
    hub: Hub = None,
    listen: Listen = None,
    announce: Announce = None,
    identity: Identity = None,
    metrics: Metrics = None,
    metrics_port: MetricsPort = None,
    config: Config = None,
    log_level: LogLevel = None,
    as_json: AsJson = False,
    plain: Plain = False,
) -> None:
    """Host blocks of a model until Ctrl-C.

    Without [bold]--blocks[/bold] the node takes as many blocks as fit into its memory, where the
    swarm has the fewest nodes. Ctrl-C hands running sessions over to other nodes and leaves; a
    second one leaves at once.
    """
    view = _view(as_json, plain)
    with _Outcome(view):
        settings = load_settings(
            NodeSettings,
            config,
            os.environ,
            {
                "model": model,
                "peers": peers,
                "blocks": blocks,
                "number_of_blocks": number_of_blocks,
                "device": device,
                "dtype": dtype,
                "display_name": name,
                "organisation": organisation,
                "country": country,
                "threads": threads,
                "memory_bytes": memory,
                "cache_tokens": cache_tokens,
                "declared_watts": watts,
                "hours": hours,
                "charter": charter,
                "passport": passport,
                "disk_bytes": disk,
                "upload_bytes_per_s": upload,
                "download_bytes_per_s": download,
                "mirrors": mirror,
                "hub": hub,
                "listen_addresses": listen,
                "announce_addresses": announce,
                "identity_path": identity,
                "metrics": metrics,
                "metrics_port": metrics_port,
                "log_level": log_level,
            },
        )
        _prepare_process(settings.log_level, settings.threads)
        from swarm.node.app import run_node

        run(run_node(settings, view))


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm-node seed --listen /ip4/0.0.0.0/tcp/31330\n\n"
    "swarm-node seed --peers /ip4/192.0.2.1/tcp/31330/p2p/12D3KooW... --name 'Ministry'"
)
def seed(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            metavar="MODEL",
            help="Hold the weights of a model or adapter for others; all: of the whole catalogue.",
        ),
    ] = None,
    peers: Peers = None,
    name: Name = None,
    charter: Charter = None,
    passport: Passport = None,
    disk: Disk = None,
    upload: Upload = None,
    download: Download = None,
    mirror: Mirrors = None,
    hub: Hub = None,
    listen: Listen = None,
    announce: Announce = None,
    identity: Identity = None,
    metrics: Metrics = None,
    metrics_port: MetricsPort = None,
    config: Config = None,
    log_level: LogLevel = None,
    as_json: AsJson = False,
    plain: Plain = False,
) -> None:
    """Run a peer without blocks, by which others find each other.

    Without [bold]--peers[/bold] it starts a new swarm. Anyone can run a seed, and a swarm should
    have several: nodes may name any of them.
    """
    view = _view(as_json, plain)
    with _Outcome(view):
        settings = load_settings(
            SeedSettings,
            config,
            os.environ,
            {
                "models": models,
                "peers": peers,
                "display_name": name,
                "charter": charter,
                "passport": passport,
                "disk_bytes": disk,
                "upload_bytes_per_s": upload,
                "download_bytes_per_s": download,
                "mirrors": mirror,
                "hub": hub,
                "listen_addresses": listen,
                "announce_addresses": announce,
                "identity_path": identity,
                "metrics": metrics,
                "metrics_port": metrics_port,
                "log_level": log_level,
            },
        )
        _prepare_process(settings.log_level)
        from swarm.node.app import run_seed

        run(run_seed(settings, view))


@app.command(
    epilog="[bold]Examples[/bold]\n\nswarm-node drain\n\nswarm-node drain --config node.toml --wait"
    "\n\nswarm-node drain --wait --json"
)
def drain(
    identity: Identity = None,
    config: Config = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the node has ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """Let the node on this computer hand its sessions over, leave the swarm and end.

    The same as Ctrl-C where it runs. Several nodes on one computer are told apart by their key,
    [bold]--identity[/bold] or [bold]--config[/bold].
    """
    from swarm.node.control import POLL_PERIOD_S
    from swarm.node.view import describe_absence

    with _Outcome(_view(as_json, True)), _running(identity, config) as node:
        now = node.ask("drain")
        said = -1
        while now is not None:
            if now.sessions != said:
                said = now.sessions
                if as_json:
                    typer.echo(json.dumps({"state": now.state, "sessions": said}))
                else:
                    typer.echo("\n".join(describe_absence(now) or [f"the node is {now.state}"]))
            if not wait:
                return
            time.sleep(POLL_PERIOD_S)
            now = node.ask("status")
        typer.echo(json.dumps({"state": "left"}) if as_json else "the node has left")


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm-node status\n\n"
    "swarm-node status --config node.toml --json"
)
def status(
    identity: Identity = None,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what the node on this computer does at the moment."""
    from dataclasses import asdict

    from swarm.node.view import print_status

    with _Outcome(_view(as_json, True)), _running(identity, config) as node:
        now = node.ask("status")
        if now is None:
            raise UsageError("the node has just ended")
        if as_json:
            typer.echo(json.dumps(asdict(now)))
        else:
            print_status(now)


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm-node accept charter.swarm\n\n"
    "swarm-node accept swarm-passport:lcQ...",
)
def accept(
    text: Annotated[
        str, typer.Argument(help="A charter, passport or invitation: the text, or a file with it.")
    ],
    identity: Identity = None,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Keep what the authority of a swarm gave you; an invitation is exchanged for a passport."""
    from swarm.membership_files import accept_text

    with _Outcome(_view(as_json, True)):
        own = load_own_files(config, os.environ, identity)
        said = accept_text(text, own.membership_files, own.identity_file)
        print_result({"accepted": said}, said, as_json=as_json)


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm-node doctor\n\n"
    "swarm-node doctor ./checkpoint --peers /ip4/192.0.2.1/tcp/31330/p2p/12D3KooW... --json"
)
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Model whose files to check as well, as for join.")
    ] = None,
    peers: Peers = None,
    device: Device = None,
    dtype: Dtype = None,
    listen: Listen = None,
    identity: Identity = None,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check whether this computer can host blocks, and say what to do.

    Contacts nobody but the peers given by [bold]--peers[/bold]. Exit code 1 if something fails.
    """
    view = _view(as_json, True)
    with _Outcome(view):
        settings = load_settings(
            NodeSettings,
            config,
            os.environ,
            {
                "model": model if model is not None or config is not None else "",
                "peers": peers,
                "device": device,
                "dtype": dtype,
                "listen_addresses": listen,
                "identity_path": identity,
            },
        )
        _prepare_process("error")
        from swarm.node.doctor import examine, print_report
        from swarm.node.probes import SystemProbes

        checks = run(examine(settings, SystemProbes()))
        print_report(checks, as_json=as_json)
        if any(check.level == "fail" for check in checks):
            raise typer.Exit(1)


app.add_typer(service_app)
app.command(epilog="[bold]Example[/bold]\n\nswarm-node identity --identity /srv/swarm/seed.key")(
    identity_command
)
app.add_typer(donor_app)


def main() -> None:
    """Entry point of the console script; wrong usage ends with exit code 2."""
    app()


# --- around every command ------------------------------------------------------------------------
class _Outcome:
    """Turns our errors into one line and an exit code; bugs keep their traceback."""

    def __init__(self, view: View) -> None:
        self._view = view

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SwarmError):
            self._view.error(str(error))
            raise typer.Exit(exit_code(error)) from None


def outcome(as_json: bool = False) -> _Outcome:
    """For commands of other modules, which print plain lines or JSON."""
    return _Outcome(_view(as_json, True))


def report_error(message: str, as_json: bool) -> None:
    """What went wrong, where our errors are not enough: the caller knows the exit code."""
    _view(as_json, True).error(message)


def exit_code(error: SwarmError) -> int:
    """Which of the documented exit codes an error ends the process with."""
    match error:
        case CheckpointError() | CapacityError():
            return EXIT_CANNOT_SERVE
        case NetworkError() | RemoteError() | ProtocolError() | NoRouteError():
            return EXIT_NETWORK
        case _:
            return EXIT_USAGE


def _view(as_json: bool, plain: bool) -> View:
    from swarm.node.view import make_view

    return make_view(as_json=as_json, plain=plain)


def _running(identity: Path | None, config: Path | None) -> AbstractContextManager[NodeControl]:
    """A connection to the running node that these flags mean."""
    from swarm.node.control import running_node

    return running_node(load_identity_file(config, os.environ, identity))


def _prepare_process(log_level: str, threads: int | None = None) -> None:
    """What must be set before heavy packages load, and where the log goes."""
    configure_threads_environment(threads, is_node=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(
        level=log_level.upper(),
        handlers=[_StderrHandler()],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


class _StderrHandler(logging.Handler):
    """Writes to what ``sys.stderr`` is at the time: the live view puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    import asyncio

    try:
        return asyncio.run(coroutine)
    except asyncio.CancelledError:  # the second Ctrl-C
        raise typer.Exit(EXIT_INTERRUPTED) from None


if __name__ == "__main__":
    main()
