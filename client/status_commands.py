"""The command ``swarm status-page``; attached to ``swarm`` in ``client.cli``."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from pathlib import Path
from typing import Annotated

import typer

DATABASE = Path("~/.local/share/sovereign-swarm/status.sqlite")
"""Where the page remembers what it saw, unless told otherwise."""

app = typer.Typer()


@app.command(
    name="status-page",
    epilog="[bold]Examples[/bold]\n\n"
    "swarm status-page --peers /ip4/192.0.2.1/tcp/31330/p2p/12D3KooW...\n\n"
    "swarm status-page --probe SmolLM2-135M-Instruct --host 0.0.0.0 --port 8090 "
    '--name "National AI swarm" --public-url https://status.example.org',
)
def status_page(
    peers: Annotated[
        list[str] | None,
        typer.Option("--peers", metavar="ADDRESS", help="A peer to join by; repeatable."),
    ] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(
            "--probe",
            metavar="MODEL",
            help="Ask this model a short question now and then, and show how fast it answers. Its "
            "embeddings and head must be on this computer; repeatable.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="What the page calls the swarm.")
    ] = "Sovereign Swarm",
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="TCP port; 0 picks a free one.")] = 8090,
    database: Annotated[
        Path, typer.Option("--database", metavar="FILE", help="What the page remembers.")
    ] = DATABASE,
    period: Annotated[
        float, typer.Option("--period", metavar="SECONDS", help="Between two looks at the swarm.")
    ] = 30.0,
    probe_period: Annotated[
        float, typer.Option("--probe-period", metavar="SECONDS", help="Between two probes.")
    ] = 300.0,
    operator: Annotated[
        str,
        typer.Option(
            "--operator", metavar="URL", help="Rank donors by what this operator has settled."
        ),
    ] = "",
    public_url: Annotated[
        str, typer.Option("--public-url", metavar="URL", help="Where readers find the page.")
    ] = "",
    public_peers: Annotated[
        str,
        typer.Option(
            "--public-peers",
            metavar="ADDRESS",
            help="Put this address into the join lines instead of $SWARM_PEERS: everybody sees it.",
        ),
    ] = "",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="auto, float32 or bfloat16, for probes.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="TOML file with settings.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print where the page is as one JSON object.")
    ] = False,
) -> None:
    """Serve the public status page of a swarm: what it serves, by whom, how well.

    Reads the swarm's directory, remembers it in a file, and shows no network address and no text of
    anybody. It needs no other server; put one in front of it for TLS.
    """
    from swarm.client.config import read_settings
    from swarm.client.gateway.settings import TABLE
    from swarm.client.joining import client_settings, outcome, prepare_process
    from swarm.client.output import note

    with outcome(as_json):
        values = read_settings(config)
        values.pop(TABLE, None)  # one file may serve all commands
        settings = client_settings(peers, dtype, values)
        prepare_process()
        from swarm.client.status_page import run_status_page
        from swarm.status.status_page import StatusSettings

        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        file = database.expanduser()
        page = StatusSettings(
            database=file,
            host=host,
            port=port,
            period_s=period,
            probe_period_s=probe_period,
            swarm_name=name,
            public_url=public_url,
            public_peers=public_peers,
        )
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

        def ready(url: str) -> None:
            if as_json:
                print(json.dumps({"event": "ready", "url": url}), flush=True)
            else:
                note(f"the status page is at {url}; Ctrl-C ends it")

        async def serve() -> None:
            leaving = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, leaving.set)
            await run_status_page(
                settings,
                page,
                operator_url=operator,
                probed_models=probe or (),
                ready=ready,
                leaving=leaving,
            )

        asyncio.run(serve())
