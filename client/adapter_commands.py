"""``swarm adapters``: publish, find, fetch, check and merge adapters."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.client.joining import (
    AsJson,
    Config,
    Peers,
    connected,
    outcome,
    prepare_process,
    settings_from,
)
from swarm.client.output import note
from swarm.protocol.errors import AdapterError, UsageError

if TYPE_CHECKING:
    from swarm.catalogue.checkpoint import Checkpoint
    from swarm.catalogue.library import Library
    from swarm.catalogue.prompt_adapter import AnyAdapter
    from swarm.catalogue.store import StoredRevision
    from swarm.client.app import SwarmClient

Mirrors = Annotated[
    list[str] | None,
    typer.Option("--mirror", metavar="PLACE", help="Folder or web address with adapters."),
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="The model that it is for, on this disk."),
]
NameOrPath = Annotated[
    str, typer.Argument(metavar="NAME|PATH", help="A folder, or NAME or NAME@REVISION.")
]

adapters = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Publish, find, fetch, check and merge adapters (LoRA and DoRA in PEFT's format).",
)


class Method(Enum):
    LINEAR = "linear"
    TIES = "ties"


@adapters.command(
    epilog="[bold]Example[/bold]\n\n"
    "swarm adapters publish ./adapter-sw --name swahili-instruct --base SmolLM2-135M-Instruct "
    '--language sw --licence CC-BY-4.0 --data "Speeches of the assembly, 2010-2020" --peers ...'
)
def publish(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An adapter as PEFT saves it.")],
    name: Annotated[str, typer.Option("--name", help="By default the folder's name.")] = "",
    base: Base = None,
    licence: Annotated[str, typer.Option("--licence", help="As in SPDX: CC-BY-4.0.")] = "",
    language: Annotated[
        list[str] | None,
        typer.Option("--language", metavar="CODE", help="ISO 639, as in sw; repeatable."),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            "--domain",
            metavar="WORD",
            help="Only for prompts with one of these words; repeatable. For --adapter auto.",
        ),
    ] = None,
    data: Annotated[str, typer.Option("--data", help="What it was trained on.")] = "",
    author: Annotated[str, typer.Option("--author", help="Who stands behind it.")] = "",
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
    """Check, describe and sign an adapter, and serve it until others hold it."""
    with outcome(as_json):
        from swarm.catalogue.prompt_adapter import check_fits_model, open_any_adapter
        from swarm.client.adapters import (
            ADAPTER_ID,
            AUTHOR,
            DATA,
            DOMAINS,
            LANGUAGES,
            METHOD,
            method_of,
        )
        from swarm.client.model_commands import publisher
        from swarm.client.publishing import describe_directory, serve_until_held, sign_and_keep

        files = open_any_adapter(directory)
        checkpoint = _base_model(files, base)
        if checkpoint is not None:
            check_fits_model(files, checkpoint)
            revision = checkpoint.revision
        else:
            revision = files.model_revision
        stated = {
            LANGUAGES: ",".join(language or ()),
            DOMAINS: ",".join(domain or ()),
            DATA: data,
            AUTHOR: author,
        }
        attributes = {ADAPTER_ID: files.adapter_id.hex(), METHOD: method_of(files)}
        attributes |= {key: value for key, value in stated.items() if value}
        described = describe_directory(
            directory, name=name, licence=licence, base=revision.hex(), attributes=attributes
        )
        identity = publisher(key)
        stored = sign_and_keep(described, identity)
        description = _describe(stored) | {"holders": 0}
        if as_json:
            print(json.dumps(description), flush=True)
        else:
            _print(description)
        if copies > 0:
            settings = settings_from(peers, None, config)
            prepare_process()
            asyncio.run(serve_until_held(settings, described, stored.signatures, copies, note))


@adapters.command(
    name="list", epilog="[bold]Example[/bold]\n\nswarm adapters list --base SmolLM2-135M-Instruct"
)
def list_adapters(
    base: Base = None,
    peers: Peers = None,
    config: Config = None,
    mirror: Mirrors = None,
    as_json: AsJson = False,
) -> None:
    """List the adapters of the catalogue: for which model and language, by whom, where loaded."""
    with outcome(as_json):
        settings = settings_from(peers, None, config)
        wanted = None if base is None else _open_base(base).revision
        with connected(replace(settings, mirrors=tuple(mirror or settings.mirrors))) as (
            background,
            client,
        ):
            rows = background.run(_rows(client, client.library(), wanted))
        if as_json:
            print(json.dumps({"adapters": rows}))
        elif not rows:
            note("no adapter is listed; publish one with swarm adapters publish DIR")
        else:
            _print_rows(rows)


@adapters.command(epilog="[bold]Example[/bold]\n\nswarm adapters show swahili-instruct")
def show(
    name: NameOrPath,
    peers: Peers = None,
    config: Config = None,
    mirror: Mirrors = None,
    as_json: AsJson = False,
) -> None:
    """Show an adapter: who signed it, its licence, language and data, ranks and modules."""
    with outcome(as_json):
        if Path(name).is_dir():
            from swarm.catalogue.prompt_adapter import open_any_adapter

            description = _describe_files(open_any_adapter(name))
        else:
            settings = settings_from(peers, None, config)
            with connected(replace(settings, mirrors=tuple(mirror or settings.mirrors))) as (
                background,
                client,
            ):
                library = client.library()
                stored = background.run(_locate(library, name))
                holders = background.run(library.catalogue.sources(stored.manifest.digest))
                description = _describe(stored) | {"holders": len(holders)}
        if as_json:
            print(json.dumps(description))
        else:
            _print(description)


@adapters.command(
    epilog="[bold]Example[/bold]\n\nswarm adapters pull swahili-instruct --to ./swahili"
)
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="NAME or NAME@REVISION.")],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Also copy it to this folder.")
    ] = None,
    peers: Peers = None,
    config: Config = None,
    mirror: Mirrors = None,
    as_json: AsJson = False,
) -> None:
    """Fetch an adapter from peers and mirrors, check all of it, and print where it is."""
    with outcome(as_json):
        settings = settings_from(peers, None, config)
        with connected(replace(settings, mirrors=tuple(mirror or settings.mirrors))) as (
            background,
            client,
        ):
            from swarm.client.adapters import fetch_files

            library = client.library()
            stored = background.run(_locate(library, name))
            files = background.run(fetch_files(stored, library))
        folder = files.directory
        if to is not None:
            import shutil

            shutil.copytree(folder, to, dirs_exist_ok=True)
            folder = to
        if as_json:
            print(json.dumps(_describe(stored) | {"path": str(folder)}))
        else:
            print(folder)


@adapters.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm adapters verify ./adapter --base SmolLM2-135M-Instruct\n\n"
    "swarm adapters verify ./adapter --json"
)
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An adapter as PEFT saves it.")],
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Check an adapter's files as a node would: format, names, shapes, numbers, the model."""
    with outcome(as_json):
        from swarm.catalogue.prompt_adapter import check_fits_model, open_any_adapter

        files = open_any_adapter(directory)
        description = _describe_files(files)
        checkpoint = _base_model(files, base, needed=False)
        if checkpoint is not None:
            check_fits_model(files, checkpoint)
        description["checked_against"] = checkpoint.name if checkpoint is not None else ""
        if as_json:
            print(json.dumps(description))
        else:
            _print(description)
            if checkpoint is None:
                note("not checked against the model: it is not on this disk; give --base")


@adapters.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm adapters merge ./swahili ./law --weights 0.7,0.3 --out ./swahili-law\n\n"
    "swarm adapters merge ./a ./b ./c --method ties --density 0.2 --rank 32 --out ./abc"
)
def merge(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Two or more.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the result goes.")],
    method: Annotated[
        Method, typer.Option("--method", help="linear is exact, ties keeps what agrees.")
    ] = Method.LINEAR,
    weights: Annotated[
        str, typer.Option("--weights", metavar="W,W,...", help="One each; by default equal.")
    ] = "",
    density: Annotated[
        float, typer.Option("--density", help="ties: the share of changes that are kept.")
    ] = 0.2,
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="Bound the result's rank; by default the sum of the ranks."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make one adapter of several for the same model."""
    with outcome(as_json):
        prepare_process()
        from swarm.catalogue.adapter import AdapterFiles
        from swarm.compute.adapter_merge import merge_linear, merge_ties, write_adapter

        parts = [AdapterFiles.open(directory) for directory in directories]
        factors = _weights(weights, len(parts))
        if rank is not None and rank < 1:
            raise UsageError("--rank is at least 1")
        if method is Method.LINEAR:
            merged = merge_linear(parts, factors, rank)
        else:
            merged = merge_ties(parts, factors, density=density, rank=rank)
        files = write_adapter(
            out,
            merged.modules,
            base_model=parts[0].base_model,
            model_revision=next(
                (each.model_revision for each in parts if each.model_revision), b""
            ),
        )
        description = _describe_files(files) | {"lost_share": round(merged.lost, 6)}
        if as_json:
            print(json.dumps(description))
        else:
            _print(description)


# --- parts ---------------------------------------------------------------------------------------
def _open_base(name: str) -> Checkpoint:
    from swarm.catalogue.checkpoint import Checkpoint
    from swarm.catalogue.resolve import resolve_checkpoint

    return Checkpoint.open(resolve_checkpoint(name, allow_download=False))


def _base_model(files: AnyAdapter, base: str | None, *, needed: bool = True) -> Checkpoint | None:
    """The model that an adapter is for, if it is on this disk.

    None when only its revision is known. Raises AdapterError when not even that is, and ``needed``.
    """
    if base is not None:
        return _open_base(base)
    if files.base_model:
        from swarm.catalogue.resolve import local_checkpoint

        path = local_checkpoint(files.base_model)
        if path is not None:
            return _open_base(str(path))
    if needed and not files.model_revision:
        raise AdapterError(
            f"the model {files.base_model!r} is not on this disk, and the adapter does not "
            "name its revision; give --base MODEL"
        )
    return None


async def _locate(library: Library, name: str) -> StoredRevision:
    stored = await library.locate(name, "adapter")
    if stored is None:
        raise UsageError(f"nobody knows the adapter {name!r}; swarm adapters list shows all")
    return stored


async def _rows(
    client: SwarmClient, library: Library, base_revision: bytes | None
) -> list[dict[str, Any]]:
    """One row for each adapter: what its manifest says, who has it, which nodes have it loaded."""
    from swarm.client.adapters import adapter_id_of
    from swarm.protocol.errors import NetworkError
    from swarm.routing import adapter_hint

    found: dict[bytes, StoredRevision] = {
        stored.manifest.digest: stored
        for stored in await asyncio.to_thread(library.store.revisions)
        if stored.manifest.kind == "adapter"
    }
    for item in await library.catalogue.all():
        if item.kind == "adapter" and item.digest not in found:
            try:
                located = await library.locate(f"{item.name}@{item.revision.hex()}", "adapter")
            except (NetworkError, UsageError) as error:
                note(f"{item.name}: {error}")
                continue
            if located is not None:
                found[item.digest] = located
    loaded: dict[bytes, Counter[str]] = {}
    rows = []
    for stored in found.values():
        manifest = stored.manifest
        base = manifest.base_revision
        if base_revision not in (None, base):
            continue
        if base not in loaded:
            nodes = await client.nodes(base)
            loaded[base] = Counter(hint for record in nodes for hint in record.adapters)
        hint = adapter_hint(adapter_id_of(manifest))
        holders = len(await library.catalogue.sources(manifest.digest))
        rows.append(_describe(stored) | {"holders": holders, "loaded_by": loaded[base][hint]})
    return sorted(rows, key=lambda row: (row["name"], row["digest"]))


def _describe(stored: StoredRevision) -> dict[str, Any]:
    """What a manifest says."""
    from swarm.client.adapters import (
        ADAPTER_ID,
        AUTHOR,
        DATA,
        DOMAINS,
        LANGUAGES,
        METHOD,
        words_of,
    )

    manifest = stored.manifest
    return {
        "name": manifest.name,
        "revision": manifest.revision.hex(),
        "digest": manifest.digest.hex(),
        "adapter_id": manifest.attributes.get(ADAPTER_ID, ""),
        "base_revision": manifest.base_revision.hex(),
        "licence": manifest.licence,
        "languages": list(words_of(manifest, LANGUAGES)),
        "domains": list(words_of(manifest, DOMAINS)),
        "data": manifest.attributes.get(DATA, ""),
        "author": manifest.attributes.get(AUTHOR, ""),
        "method": manifest.attributes.get(METHOD, ""),
        "total_bytes": manifest.total_bytes,
        "publishers": [item.publisher for item in stored.signatures],
    }


def _describe_files(files: AnyAdapter) -> dict[str, Any]:
    """What the files themselves say."""
    from swarm.catalogue.adapter import AdapterFiles
    from swarm.client.adapters import method_of

    description: dict[str, Any] = {
        "path": str(files.directory),
        "adapter_id": files.adapter_id.hex(),
        "base_model": files.base_model,
        "base_revision": files.model_revision.hex(),
        "method": method_of(files),
    }
    if not isinstance(files, AdapterFiles):
        return description | {"total_bytes": files.tensor.size_bytes}
    modules = files.index.modules
    return description | {
        "rank": files.index.rank,
        "blocks": len({module.block for module in modules}),
        "modules": sorted({module.name for module in modules}),
        "total_bytes": files.index.size_bytes,
    }


def _print(description: dict[str, Any]) -> None:
    for key, value in description.items():
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        if value not in ("", None):
            print(f"{key:<16} {value}")


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("name", "language", "domains", "licence", "model", "holders", "loaded by"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(
            row["name"],
            ", ".join(row["languages"]),
            ", ".join(row["domains"]),
            row["licence"],
            row["base_revision"][:12],
            str(row["holders"]),
            f"{row['loaded_by']} nodes",
        )
    Console().print(table)


def _weights(text: str, count: int) -> list[float]:
    if not text:
        return [1 / count] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights {text!r}: write numbers separated by commas") from None
    if len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} adapters")
    return weights
