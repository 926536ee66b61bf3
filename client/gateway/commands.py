"""``swarm gateway``: an OpenAI-compatible server and a chat page, and the keys to it."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.client.gateway.settings import load_gateway_settings

if TYPE_CHECKING:
    from swarm.client.gateway.process import Listening

EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="gateway",
    no_args_is_help=False,
    invoke_without_command=True,
    rich_markup_mode="rich",
    help="Serve OpenAI's API and a chat page in front of a swarm.",
)
keys_app = typer.Typer(
    name="keys",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Make, list and revoke API keys. A running gateway notices within a second.",
)
app.add_typer(keys_app)

KeysFile = Annotated[
    Path | None, typer.Option("--keys-file", metavar="FILE", help="Where the keys are kept.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]


@app.callback(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm gateway --model ./checkpoint --peers /ip4/192.0.2.1/tcp/31330/p2p/12D3KooW...\n\n"
    "swarm gateway keys add 'Library of Mombasa'\n\n"
    "swarm gateway --model ./checkpoint --host 0.0.0.0 --port 8000"
)
def gateway(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", metavar="MODEL", help="Checkpoint folder or name to serve; repeatable."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME=FOLDER",
            help="An adapter in PEFT's format, served as MODEL@NAME; repeatable.",
        ),
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option("--peers", metavar="ADDRESS", help="A peer to join by; repeatable."),
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen on; 127.0.0.1 if left out.")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="TCP port; 8000 if left out, 0 picks a free one.")
    ] = None,
    keys_file: KeysFile = None,
    without_keys: Annotated[
        bool, typer.Option("--without-keys", help="Serve everybody who can connect.")
    ] = False,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", help="A web page of another host that may use the API."),
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="auto, float32 or bfloat16.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FILE", help="TOML file; its table \\[gateway] is for us."
        ),
    ] = None,
    log_level: Annotated[
        str, typer.Option("--log-level", help="debug, info, warning or error.")
    ] = "info",
    as_json: AsJson = False,
) -> None:
    """Serve OpenAI's API and a chat page in front of a swarm, until Ctrl-C.

    Programs that know OpenAI's API need only another base URL: [bold]http://HOST:PORT/v1[/bold].
    Ctrl-C lets running answers finish; a second one ends them.
    """
    if context.invoked_subcommand is not None:
        return
    from swarm.client import joining

    with joining.outcome(as_json):
        settings, rest = load_gateway_settings(
            {
                "models": model,
                "adapters": adapter,
                "host": host,
                "port": port,
                "keys_file": keys_file,
                "without_keys": without_keys or None,
                "allowed_origins": allow_origin,
            },
            config,
        )
        client_settings = joining.client_settings(peers, dtype, rest)
        joining.prepare_process()
        logging.basicConfig(
            level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        import asyncio

        from swarm.client.gateway.process import run_gateway

        def ready(listening: Listening) -> None:
            _say_ready(listening, as_json)

        try:
            asyncio.run(run_gateway(settings, client_settings, ready))
        except asyncio.CancelledError:  # the second Ctrl-C
            raise typer.Exit(EXIT_INTERRUPTED) from None


@keys_app.command(
    epilog="[bold]Examples[/bold]\n\nswarm gateway keys add 'Library of Mombasa'\n\n"
    "swarm gateway keys add research --account research.key --answers 64 --json"
)
def add(
    name: Annotated[str, typer.Argument(help="Whom the key is for.")],
    account: Annotated[
        Path | None,
        typer.Option(
            "--account", metavar="FILE", help="Key of the operator's account that pays for it."
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option("--budget", help="That the account may draw on; empty: its own credit."),
    ] = "",
    requests_per_minute: Annotated[
        int | None, typer.Option("--requests-per-minute", help="Instead of the gateway's limit.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option("--tokens-per-minute", help="Of prompts and answers.")
    ] = None,
    answers: Annotated[
        int | None, typer.Option("--answers", help="Answers in the making at a time.")
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", metavar="FILE", help="TOML: which nodes may see what it asks."),
    ] = None,
    keys_file: KeysFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it. It is shown this once: only its hash is kept."""
    from swarm.client import joining
    from swarm.client.gateway.keys import make_key

    with joining.outcome(as_json):
        key, text = make_key(
            name,
            payer=None if account is None else _payer(account, budget),
            policy=None if policy is None else joining.read_policy(policy),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            answers=answers,
        )
        _file(keys_file).add(key)
        if as_json:
            print(json.dumps({"id": key.key_id, "name": key.name, "key": text}))
        else:
            print(text)
            print("keep it: it is not shown again", file=sys.stderr)


@keys_app.command(name="list", epilog="[bold]Example[/bold]\n\nswarm gateway keys list --json")
def list_keys(keys_file: KeysFile = None, as_json: AsJson = False) -> None:
    """Show all keys, without their secrets."""
    from swarm.client import joining

    with joining.outcome(as_json):
        keys = _file(keys_file).all()
        if as_json:
            print(json.dumps({"keys": [_key_json(key) for key in keys]}))
            return
        if not keys:
            print("no keys yet; swarm gateway keys add NAME makes one", file=sys.stderr)
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("id", "name", "account", "made", "state", box=None)
        for key in keys:
            state = Text("valid", "green") if key.revoked_unix_s is None else Text("revoked", "red")
            made = datetime.fromtimestamp(key.created_unix_s).strftime("%Y-%m-%d")
            table.add_row(key.key_id, Text(key.name), Text(key.account), made, state)
        Console().print(table)


@keys_app.command(epilog="[bold]Example[/bold]\n\nswarm gateway keys revoke 'Library of Mombasa'")
def revoke(
    key: Annotated[str, typer.Argument(help="A key's id or name.")],
    keys_file: KeysFile = None,
    as_json: AsJson = False,
) -> None:
    """End a key for good."""
    from swarm.client import joining

    with joining.outcome(as_json):
        revoked = _file(keys_file).revoke(key)
        if as_json:
            print(json.dumps(_key_json(revoked)))
        else:
            print(f"revoked {revoked.key_id} ({revoked.name})")


def _file(path: Path | None) -> Any:
    from swarm.client.gateway.keys import KeyFile
    from swarm.client.gateway.settings import DEFAULT_KEYS_FILE

    return KeyFile(path or DEFAULT_KEYS_FILE)


def _payer(path: Path, budget: str) -> Any:
    from swarm.client.gateway.keys import Payer
    from swarm.protocol.identity import Identity

    whole = path.expanduser().resolve()
    return Payer(Identity.load(whole).peer_id, str(whole), budget)


def _key_json(key: Any) -> dict[str, Any]:
    from dataclasses import asdict

    fields = asdict(key)
    del fields["secret_sha256"]
    return fields


def _say_ready(listening: Listening, as_json: bool) -> None:
    if as_json:
        event = {
            "event": "ready",
            "url": listening.url,
            "models": list(listening.models),
            "needs_keys": listening.needs_keys,
            "pid": os.getpid(),
        }
        print(json.dumps(event), flush=True)
        return
    print(f"serving {', '.join(listening.models)}")
    print(f"  chat page   {listening.url}/")
    print(f"  OpenAI API  {listening.url}/v1")
    print(f"  API keys    {'needed' if listening.needs_keys else 'not needed'}", flush=True)
