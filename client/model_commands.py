"""``swarm models``: what a swarm serves, and the catalogue of models and adapters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.client.config import ClientSettings
from swarm.client.joining import (
    AsJson,
    Config,
    Peers,
    connected,
    outcome,
    prepare_process,
    progress_line,
    settings_from,
)
from swarm.client.output import note
from swarm.command_results import print_result
from swarm.protocol.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from swarm.catalogue.library import Library
    from swarm.catalogue.store import StoredRevision
    from swarm.client.background import BackgroundLoop
    from swarm.protocol.identity import Identity
    from swarm.protocol.manifest import Manifest

Mirrors = Annotated[
    list[str] | None,
    typer.Option("--mirror", metavar="PLACE", help="Folder or web address with weights."),
]
ModelName = Annotated[str, typer.Argument(metavar="NAME", help="NAME or NAME@REVISION.")]
Kind = Annotated[bool, typer.Option("--adapter", help="An adapter, not a model.")]

models = typer.Typer(
    no_args_is_help=False,
    invoke_without_command=True,
    rich_markup_mode="rich",
    help="Show what the swarm serves; publish, look up and fetch models and adapters.",
)


@models.callback(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm models --peers /ip4/192.0.2.1/tcp/31330/p2p/12D3KooW...\n\n"
    "swarm models --json | jq '.models[].missing_blocks'"
)
def served(
    context: typer.Context, peers: Peers = None, config: Config = None, as_json: AsJson = False
) -> None:
    """Show what the swarm serves: models, how often each block is there, and by which nodes.

    The commands below are about the catalogue: manifests, and the chunks of weights.
    """
    if context.invoked_subcommand is not None:
        return
    with outcome(as_json):
        settings = settings_from(peers, None, config)
        with connected(settings) as (background, client):
            from swarm.client.listing import ServedModel, models_table

            async def read() -> list[ServedModel]:
                return [
                    ServedModel.of(summary, await client.nodes(summary.model_revision))
                    for summary in await client.models()
                ]

            found = background.run(read())
        if as_json:
            print(json.dumps({"models": [model.to_json() for model in found]}))
        elif not found:
            note("this swarm serves no model yet; host one with swarm-node join MODEL --peers ...")
        else:
            from rich.console import Console

            Console().print(models_table(found))


@models.command(
    name="list",
    epilog="[bold]Example[/bold]\n\nswarm models list --json | jq '.manifests[].name'",
)
def list_manifests(
    peers: Peers = None, config: Config = None, mirror: Mirrors = None, as_json: AsJson = False
) -> None:
    """List models and adapters whose weights can be fetched: in the swarm, mirrors, this disk."""
    with outcome(as_json), library(peers, config, mirror) as (background, opened):

        async def read() -> list[dict[str, Any]]:
            rows: dict[bytes, dict[str, Any]] = {}
            for item in await opened.catalogue.all():
                rows[item.digest] = {
                    "name": item.name,
                    "kind": item.kind,
                    "revision": item.revision.hex(),
                    "digest": item.digest.hex(),
                    "publishers": sorted(item.publishers),
                    "holders": len(await opened.catalogue.sources(item.digest)),
                    "places": ["swarm"],
                }
            for mirror_ in opened.mirrors:
                for entry in await mirror_.entries():
                    described = await mirror_.manifest(entry.digest)
                    if described is not None:
                        signers = [item.publisher for item in described[1]]
                        row = rows.setdefault(entry.digest, _row(described[0], signers))
                        row["places"].append(mirror_.name)
            for stored in opened.store.revisions():
                signers = [item.publisher for item in stored.signatures]
                row = rows.setdefault(stored.manifest.digest, _row(stored.manifest, signers))
                row["places"].append("disk" if stored.held.all() else "disk, in part")
            return sorted(rows.values(), key=lambda row: (row["name"], row["digest"]))

        rows = background.run(read())
        if as_json:
            print(json.dumps({"manifests": rows}))
        elif not rows:
            note("the catalogue is empty; publish a model with swarm models publish DIR")
        else:
            _print_rows(rows)


@models.command(epilog="[bold]Example[/bold]\n\nswarm models show SmolLM2-135M-Instruct")
def show(
    name: ModelName,
    adapter: Kind = False,
    peers: Peers = None,
    config: Config = None,
    mirror: Mirrors = None,
    as_json: AsJson = False,
) -> None:
    """Show a manifest: who signed it, its licence, its parts, and how much of it is here."""
    with outcome(as_json), library(peers, config, mirror) as (background, opened):
        stored = background.run(located(opened, name, adapter))
        holders = background.run(opened.catalogue.sources(stored.manifest.digest))
        description = _describe(stored, len(holders))
        if as_json:
            print(json.dumps(description))
        else:
            for key, value in description.items():
                if isinstance(value, list):
                    value = ", ".join(map(str, value))
                print(f"{key:<18} {value}")


@models.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm models pull SmolLM2-135M-Instruct --peers ...\n\n"
    "swarm models pull SmolLM2-135M-Instruct --blocks 0:10 --to ./checkpoint"
)
def pull(
    name: ModelName,
    adapter: Kind = False,
    blocks: Annotated[
        str | None,
        typer.Option("--blocks", metavar="FIRST:END", help="Only these blocks; 0:0 for none."),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Also copy it to this folder.")
    ] = None,
    peers: Peers = None,
    config: Config = None,
    mirror: Mirrors = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a model's or adapter's weights from peers and mirrors, and check every chunk."""
    with outcome(as_json), library(peers, config, mirror) as (background, opened):
        stored = background.run(located(opened, name, adapter))
        manifest = stored.manifest
        parts = manifest.parts
        if blocks is not None:
            parts = (*manifest.files(), *manifest.end_parts())
            parts += manifest.parts_of_blocks(*_span(blocks))
        background.run(opened.fetch(stored, parts, None if as_json else progress_line()))
        folder = stored.folder
        if to is not None:
            from swarm.catalogue.export import export_revision

            export_revision(stored, parts, to)
            folder = to
        if as_json:
            print(json.dumps(_describe(stored, 0) | {"path": str(folder)}))
        else:
            print(folder)


@models.command(
    epilog="[bold]Example[/bold]\n\nswarm models mirror /media/stick SmolLM2-135M-Instruct"
)
def mirror(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Made when it is missing.")],
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Models to copy.")],
    adapter: Kind = False,
    peers: Peers = None,
    config: Config = None,
    mirror: Mirrors = None,
    as_json: AsJson = False,
) -> None:
    """Write models or adapters into a mirror folder, for a USB stick or a web server."""
    with outcome(as_json), library(peers, config, mirror) as (background, opened):
        from swarm.catalogue.mirror import write_mirror

        holdings = []
        for name in names:
            stored = background.run(located(opened, name, adapter))
            progress = None if as_json else progress_line()
            background.run(opened.fetch(stored, stored.manifest.parts, progress))
            holdings.append(stored)
        write_mirror(folder, holdings)
        copied = [item.manifest.name for item in holdings]
        if as_json:
            print_result({"folder": str(folder), "names": copied}, as_json=True)
        else:
            note(f"{folder} has {', '.join(copied)}")


@models.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm models publish ./checkpoint --name Karibu-1B --licence Apache-2.0 --peers ...\n\n"
    "swarm models publish ./adapter --base SmolLM2-135M-Instruct --key publisher.key --peers ..."
)
def publish(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint or an adapter.")],
    name: Annotated[str, typer.Option("--name", help="By default the folder's name.")] = "",
    licence: Annotated[str, typer.Option("--licence", help="As in SPDX: Apache-2.0.")] = "",
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Of an adapter: the model that it is for."),
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option("--attribute", metavar="KEY=VALUE", help="A further signed statement."),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option("--key", metavar="FILE", help="Publisher's key; made when it is missing."),
    ] = None,
    copies: Annotated[
        int,
        typer.Option("--copies", help="Serve until so many others hold all of it; 0: only sign."),
    ] = 1,
    peers: Peers = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Describe and sign a model or adapter, and serve it until others hold it.

    Nodes and seeds on this computer that are given the same folder serve it as published.
    """
    with outcome(as_json):
        from swarm.client.publishing import describe_directory, serve_until_held, sign_and_keep

        if not directory.is_dir():
            raise CheckpointError(f"{directory} is no folder")
        identity = publisher(key)
        attributes = dict(_attribute(item) for item in attribute or ())
        described = describe_directory(
            directory, name=name, licence=licence, base=base, attributes=attributes
        )
        stored = sign_and_keep(described, identity)
        manifest = described.manifest
        if as_json:
            print(json.dumps(_describe(stored, 0)), flush=True)
        else:
            note(
                f"{manifest.kind} {manifest.name}, revision {manifest.revision.hex()[:12]}, "
                f"{manifest.total_bytes / 1e6:,.0f} MB, signed by {identity.peer_id}"
            )
        if copies > 0:
            settings = settings_from(peers, None, config)
            prepare_process()
            asyncio.run(serve_until_held(settings, described, stored.signatures, copies, note))


# --- parts ---------------------------------------------------------------------------------------
@contextmanager
def library(
    peers: list[str] | None, config: Path | None, mirrors: list[str] | None
) -> Iterator[tuple[BackgroundLoop, Library]]:
    """Join the swarm, as somebody who looks things up and fetches."""
    from dataclasses import replace

    settings: ClientSettings = settings_from(peers, None, config)
    if mirrors:
        settings = replace(settings, mirrors=tuple(mirrors))
    with connected(settings) as (background, client):
        yield background, client.library()


async def located(library: Library, name: str, adapter: bool) -> StoredRevision:
    """The revision that a name means. Raises UsageError when nobody knows it."""
    stored = await library.locate(name, "adapter" if adapter else "model")
    if stored is None:
        raise UsageError(f"nobody knows {name!r}; swarm models list shows what there is")
    return stored


def _row(manifest: Manifest, signers: Sequence[str]) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "kind": manifest.kind,
        "revision": manifest.revision.hex(),
        "digest": manifest.digest.hex(),
        "publishers": sorted(map(str, signers)),
        "holders": 0,
        "places": [],
    }


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("name", "kind", "revision", "holders", "publisher", "where"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(
            row["name"],
            row["kind"],
            row["revision"][:12],
            str(row["holders"]),
            ", ".join(publisher[-8:] for publisher in row["publishers"]),
            ", ".join(row["places"]),
        )
    Console().print(table)


def _describe(stored: StoredRevision, holders: int) -> dict[str, Any]:
    manifest = stored.manifest
    return {
        "name": manifest.name,
        "kind": manifest.kind,
        "revision": manifest.revision.hex(),
        "digest": manifest.digest.hex(),
        "licence": manifest.licence,
        "base_revision": manifest.base_revision.hex(),
        "blocks": manifest.number_of_blocks,
        "parts": len(manifest.parts),
        "chunks": manifest.number_of_chunks,
        "total_bytes": manifest.total_bytes,
        "chunks_here": int(stored.held.sum()),
        "holders": holders,
        "publishers": [item.publisher for item in stored.signatures],
        "attributes": dict(manifest.attributes),
    }


def _span(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit()):
        raise UsageError(f"blocks {text!r}: write FIRST:END, for example 0:10 for blocks 0 to 9")
    return int(first), int(end)


def _attribute(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise UsageError(f"--attribute {text!r}: write KEY=VALUE")
    return key, value


def publisher(key: Path | None) -> Identity:
    from swarm.catalogue.resolve import models_directory
    from swarm.protocol.identity import Identity

    path = key.expanduser() if key is not None else models_directory().parent / "publisher.key"
    return Identity.load_or_create(path)
