"""``swarm-node pause | resume | limits | page``: the owner's commands to a running node."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from swarm.node.config import load_identity_file, parse_size
from swarm.protocol.errors import ConfigError, UsageError

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

app = typer.Typer(rich_markup_mode="rich")

Identity = Annotated[
    Path | None, typer.Option("--identity", metavar="FILE", help="Key file of the node.")
]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="The node's TOML file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command(
    epilog="[bold]Examples[/bold]\n\nswarm-node pause\n\nswarm-node pause 2h\n\n"
    "swarm-node pause 30m --json"
)
def pause(
    duration: Annotated[
        str | None,
        typer.Argument(metavar="[DURATION]", help="2h, 30m, 1d; left out: until resume."),
    ] = None,
    identity: Identity = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Let the node rest: it hands its sessions over, leaves, and frees its memory."""
    _command(identity, config, as_json, lambda: ("pause", {"for_s": parse_duration(duration)}))


@app.command(epilog="[bold]Example[/bold]\n\nswarm-node resume")
def resume(identity: Identity = None, config: Config = None, as_json: AsJson = False) -> None:
    """End a pause: the node joins again, unless another limit holds it back."""
    _command(identity, config, as_json, lambda: ("resume", {}))


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm-node limits\n\n"
    "swarm-node limits --upload 2MB --monthly 200GB --temperature 80\n\n"
    "swarm-node limits --hours 'mon-fri 20:00-08:00, sat-sun 00:00-24:00' --when-idle\n\n"
    "swarm-node limits --upload none"
)
def limits(
    hours: Annotated[
        str | None, typer.Option("--hours", help="As mon-fri 20:00-08:00; several by commas.")
    ] = None,
    when_idle: Annotated[
        bool | None, typer.Option("--when-idle/--in-use-too", help="Only while nobody uses it.")
    ] = None,
    on_battery: Annotated[
        bool | None, typer.Option("--on-battery/--not-on-battery", help="Without the charger.")
    ] = None,
    upload: Annotated[
        str | None, typer.Option("--upload", metavar="SIZE", help="Sent per second, as 2MB.")
    ] = None,
    download: Annotated[
        str | None, typer.Option("--download", metavar="SIZE", help="Received per second.")
    ] = None,
    monthly: Annotated[
        str | None, typer.Option("--monthly", metavar="SIZE", help="Both ways in a month.")
    ] = None,
    free_memory: Annotated[
        str | None, typer.Option("--free-memory", metavar="SIZE", help="Left for other programs.")
    ] = None,
    free_disk: Annotated[
        str | None, typer.Option("--free-disk", metavar="SIZE", help="Left on the disk.")
    ] = None,
    temperature: Annotated[
        str | None, typer.Option("--temperature", metavar="CELSIUS", help="Hottest allowed.")
    ] = None,
    power: Annotated[
        str | None, typer.Option("--power", metavar="WATTS", help="Of processor and GPU.")
    ] = None,
    identity: Identity = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Show the running node's limits, or change them; [bold]none[/bold] takes one away.

    Changes hold at once and after restarts; they win over the settings file.
    """

    def request() -> tuple[str, dict[str, Any]]:
        sizes = {
            "upload_bytes_per_s": upload,
            "download_bytes_per_s": download,
            "monthly_bytes": monthly,
            "keep_memory_free_bytes": free_memory,
            "keep_disk_free_bytes": free_disk,
        }
        numbers = {"maximum_temperature_c": temperature, "maximum_power_w": power}
        changes: dict[str, Any] = {
            name: None if text == "none" else convert(text)
            for texts, convert in ((sizes, parse_size), (numbers, _number), ({"hours": hours}, str))
            for name, text in texts.items()
            if text is not None
        }
        flags = {"only_when_idle": when_idle, "works_on_battery": on_battery}
        changes |= {name: value for name, value in flags.items() if value is not None}
        return ("limits", {"changes": changes}) if changes else ("owner", {})

    _command(identity, config, as_json, request, show_limits=True)


@app.command(
    epilog="[bold]Examples[/bold]\n\nswarm-node page\n\nswarm-node page --port 8100 --no-open"
)
def page(
    port: Annotated[int, typer.Option("--port", help="TCP port; 0 picks a free one.")] = 0,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open it in the browser.")
    ] = True,
    identity: Identity = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Show the node's page in the browser, for its owner alone, until Ctrl-C.

    It has the same controls as the commands, and tells what the computer did on each day. It is a
    process of its own: the node goes on when it ends.
    """
    from swarm.node import cli

    with cli.outcome(as_json):
        file = load_identity_file(config, os.environ, identity)
        from swarm.node.donor.page import run_page

        def ready(url: str) -> None:
            if as_json:
                typer.echo(json.dumps({"event": "ready", "url": url}))
                return
            typer.echo(f"the node's page, for you alone: {url}")
            if open_browser:
                import webbrowser

                webbrowser.open(url)

        cli.run(run_page(file, port, ready))


def parse_duration(text: str | None) -> float | None:
    """Seconds of ``2h``, ``30m``, ``1.5d`` or ``90s``; None stays None. Raises UsageError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"duration {text!r}: write for example 2h, 30m or 1d")
    return float(match[1]) * UNITS_S[match[2]]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is no number") from None


def _command(
    identity: Path | None,
    config: Path | None,
    as_json: bool,
    request: Callable[[], tuple[str, dict[str, Any]]],
    *,
    show_limits: bool = False,
) -> None:
    """Send a request to the running node, and print what it says."""
    from swarm.node import cli
    from swarm.node.control import running_node

    with cli.outcome(as_json):
        command, details = request()
        with running_node(load_identity_file(config, os.environ, identity)) as node:
            answer = node.ask_owner(command, **details)
        if answer is None:
            raise UsageError("the node has just ended")
        if as_json:
            typer.echo(json.dumps(answer))
        elif show_limits:
            for name, value in answer["limits"].items():
                typer.echo(f"{name:24} {_shown(value)}")
        else:
            typer.echo(_sentence(answer))


def _shown(value: Any) -> str:
    match value:
        case None:
            return "no limit"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:g}"
    return str(value)


def _sentence(answer: dict[str, Any]) -> str:
    reasons = ", ".join(answer["reasons"])
    if not reasons:
        return "the node works"
    until = answer["rests_until"]
    return f"the node rests: {reasons}" + (f"; until {until}" if until else "")
