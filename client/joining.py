"""Around every command that joins a swarm: settings, the connection, the model's ends, errors.

Exit codes: 0 done, 1 a bug, 2 wrong usage, settings or checkpoint, 3 the swarm cannot serve this
now, 4 the network cannot be used, 130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.client.background import BackgroundLoop
from swarm.client.config import (
    LEDGER_FILE,
    PEERS_FILE,
    PEERS_VARIABLE,
    ClientSettings,
    load_settings,
    read_settings,
)
from swarm.client.gateway.settings import TABLE as GATEWAY_TABLE
from swarm.client.output import error_to_json, explain, note
from swarm.protocol.errors import (
    ConfigError,
    NoRouteError,
    RemoteError,
    SwarmError,
    UsageError,
)
from swarm.protocol.policy import Policy
from swarm.threads import configure_threads_environment

if TYPE_CHECKING:
    from swarm.catalogue.download import Progress
    from swarm.client.app import SwarmClient
    from swarm.client.generate import LocalModel

EXIT_USAGE = 2
EXIT_CANNOT_SERVE = 3
EXIT_NETWORK = 4
EXIT_INTERRUPTED = 130

Peers = Annotated[
    list[str] | None,
    typer.Option(
        "--peers",
        metavar="ADDRESS",
        help="A peer to join by, as printed by [bold]swarm-node seed[/bold]; repeat it or separate "
        f"by commas. {PEERS_VARIABLE} in the environment does the same.",
    ),
]
PolicyFile = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        metavar="FILE",
        help="TOML: countries, organisations, minimum_tier ... of nodes that may see the session.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="TOML file with settings; flags win over it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")]


@dataclass(frozen=True, slots=True)
class Swarm:
    background: BackgroundLoop
    client: SwarmClient
    model: LocalModel


@contextmanager
def joined(model_name: str, settings: ClientSettings) -> Iterator[Swarm]:
    """Load the model's ends and join; what is not on this disk is fetched from the swarm."""
    prepare_process()
    from swarm.catalogue.resolve import local_checkpoint
    from swarm.client.generate import LocalModel

    local = local_checkpoint(model_name)
    model = LocalModel.load(str(local), dtype=settings.dtype) if local is not None else None
    try:
        with connected(settings) as (background, client):
            if model is None:
                path = background.run(client.fetch_ends(model_name, progress_line()))
                model = LocalModel.load(str(path), dtype=settings.dtype)
            yield Swarm(background, client, model)
    finally:
        if model is not None:
            model.close()


@contextmanager
def connected(settings: ClientSettings) -> Iterator[tuple[BackgroundLoop, SwarmClient]]:
    prepare_process()
    from swarm.client.app import SwarmClient

    background = BackgroundLoop()
    try:
        client = background.run(SwarmClient.connect(settings))
        try:
            yield background, client
        finally:
            background.run(client.close())
    finally:
        background.close()


def read_policy(path: Path) -> Policy:
    """A policy in a TOML file, at its top or as its table ``policy``. Raises ConfigError."""
    values = read_settings(path)
    return Policy.from_mapping(values.get("policy", values))


def settings_from(
    peers: list[str] | None,
    dtype: str | None,
    config: Path | None,
    policy: Path | None = None,
) -> ClientSettings:
    """How to join: what the file says, then the environment, then flags. Raises ConfigError."""
    values = read_settings(config)
    if policy is not None:
        values["policy"] = read_policy(policy)
    values.pop(GATEWAY_TABLE, None)  # one file may serve all commands
    return client_settings(peers, dtype, values)


def client_settings(
    peers: list[str] | None, dtype: str | None, file_values: Mapping[str, Any]
) -> ClientSettings:
    """The same for a file that was read already. Raises ConfigError."""
    flags = {"peers": " ".join(peers or ()) or None, "dtype": dtype}
    defaults = {"peers_file": PEERS_FILE, "ledger_file": LEDGER_FILE, "audits": True}
    return load_settings(flags, environment=os.environ, file_values={**defaults, **file_values})


def prepare_process() -> None:
    """What must be set before heavy packages load."""
    configure_threads_environment()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


# --- around every command ------------------------------------------------------------------------
@contextmanager
def outcome(as_json: bool) -> Iterator[None]:
    """Turns our errors into one line and an exit code; bugs keep their traceback."""
    try:
        yield
    except SwarmError as error:
        if as_json:
            print(json.dumps(error_to_json(error)))
        else:
            note(f"swarm: {explain(error)}")
        raise typer.Exit(exit_code(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


@contextmanager
def own_files() -> Iterator[None]:
    """Inside of ``outcome``, for commands that read and write files of this computer."""
    try:
        yield
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise ConfigError(named) from error
    except sqlite3.Error as error:
        raise ConfigError(f"the books cannot be read: {error}") from error


def exit_code(error: SwarmError) -> int:
    """Which of the documented exit codes an error ends the process with."""
    match error:
        case UsageError():
            return EXIT_USAGE
        case NoRouteError() | RemoteError():
            return EXIT_CANNOT_SERVE
        case _:
            return EXIT_NETWORK


def progress_line() -> Callable[[Progress], None] | None:
    """Shows how far a download is: on a terminal only."""
    if not sys.stderr.isatty():
        return None

    def show(progress: Progress) -> None:
        share = progress.bytes_done / max(1, progress.bytes_total)
        left = progress.seconds_left
        when = "" if left is None else f", {left:.0f} s left"
        bar = "█" * round(20 * share) + "░" * (20 - round(20 * share))
        sys.stderr.write(
            f"\r\x1b[K{bar} {share:.0%} of {progress.bytes_total / 1e6:,.0f} MB, "
            f"{progress.peers} peers, {progress.bytes_per_s / 1e6:.1f} MB/s{when}"
        )
        if progress.bytes_done == progress.bytes_total:
            sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()

    return show
