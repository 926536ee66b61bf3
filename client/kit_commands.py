"""``swarm kit``: everything for computers that have no network but their own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from swarm.client.joining import AsJson, Config, Peers, outcome, progress_line, settings_from
from swarm.client.model_commands import Mirrors, library, located
from swarm.client.output import note
from swarm.command_results import print_result

kit = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Pack a swarm into a folder, for computers without a network but their own.",
)


@kit.callback()
def about() -> None:
    """Keeps ``make`` a command of its own."""


@kit.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm kit make ./kit SmolLM2-135M-Instruct --charter charter.swarm --peers ...\n\n"
    "swarm kit make /media/stick/kit ./checkpoint --wheels ./wheelhouse"
)
def make(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Ends in .tar: one file.")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders or names.")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME", help="An adapter to add.")
    ] = None,
    charter: Annotated[
        Path | None,
        typer.Option("--charter", metavar="FILE", help="Of the swarm that it is for."),
    ] = None,
    passport: Annotated[
        Path | None, typer.Option("--passport", metavar="FILE", help="Of one peer: its own kit.")
    ] = None,
    invitation: Annotated[
        Path | None,
        typer.Option("--invitation", metavar="FILE", help="Each newcomer gets a passport by it."),
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option("--at", metavar="ADDRESS", help="Peers to join by from the kit."),
    ] = None,
    wheels: Annotated[
        str,
        typer.Option("--wheels", help="auto asks pip, none leaves them out, or a folder of them."),
    ] = "auto",
    peers: Peers = None,
    mirror: Mirrors = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Pack software, models, charter and settings into a folder or a tar file."""
    with outcome(as_json):
        from swarm.catalogue.holdings import Holding
        from swarm.client.kit import KitContents, make_kit, pack
        from swarm.client.publishing import held_directory

        folders = [Path(name).expanduser() for name in models]
        holdings: list[Holding] = [held_directory(path) for path in folders if path.is_dir()]
        missing = [name for name, path in zip(models, folders, strict=True) if not path.is_dir()]
        wanted = [(name, False) for name in missing] + [(name, True) for name in adapter or ()]
        if wanted:
            with library(peers, config, mirror) as (background, opened):
                for name, is_adapter in wanted:
                    stored = background.run(located(opened, name, is_adapter))
                    parts = stored.manifest.parts
                    background.run(
                        opened.fetch(stored, parts, None if as_json else progress_line())
                    )
                    holdings.append(stored)
        joined_by = tuple(at or peers or ())
        if not joined_by and wanted:
            joined_by = settings_from(peers, None, config).peers
        contents = KitContents(
            holdings,
            peers=joined_by,
            charter=charter,
            passport=passport,
            invitation=invitation,
            wheels=wheels,
        )
        if folder.suffix == ".tar":
            with tempfile.TemporaryDirectory(dir=folder.resolve().parent) as temporary:
                made = Path(temporary) / folder.stem
                make_kit(made, contents)
                pack(made, folder)
        else:
            make_kit(folder, contents)
        names = [item.manifest.name for item in holdings]
        if as_json:
            print_result({"folder": str(folder), "names": names}, as_json=True)
        else:
            note(f"{folder} has {', '.join(names)}; there, run: sh join.sh")
