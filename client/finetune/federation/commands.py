"""``swarm federate``: several who may not share their data train one adapter together."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.client.finetune.options import (
    Alpha,
    BatchSize,
    Dtype,
    HeldOut,
    InFlight,
    Loss,
    MaximumLength,
    Optimizer,
    Rank,
    Raw,
    SnapshotEvery,
    TargetModules,
    module_names,
)
from swarm.client.joining import (
    AsJson,
    Config,
    Peers,
    PolicyFile,
    outcome,
    prepare_process,
    settings_from,
)
from swarm.command_results import print_result

if TYPE_CHECKING:
    from swarm.client.config import ClientSettings
    from swarm.client.finetune.federation.process import Beginning
    from swarm.client.finetune.federation.terms import FederationTerms
    from swarm.client.finetune.settings import FinetuneSettings

KEY_FILE = Path("~/.local/share/sovereign-swarm/federate.key")
DEFAULT_PORT = 8460

app = typer.Typer(
    name="federate",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Train one adapter together, on data that stay apart.\n\n"
    "One of you runs the aggregator. It learns the sum of what all have learned and never a single "
    "part of it; nobody's data leave their computer. docs/finetuning.md tells how.",
)

Key = Annotated[
    Path, typer.Option("--key", metavar="FILE", help="Your key; made when it is missing.")
]


@app.command(name="id", epilog="[bold]Example[/bold]\n\nswarm federate id")
def show_id(key: Key = KEY_FILE, as_json: AsJson = False) -> None:
    """Print the peer id by which an aggregator invites you."""
    with outcome(as_json):
        from swarm.protocol.identity import Identity

        peer_id = Identity.load_or_create(key.expanduser()).peer_id
        print_result({"peer_id": peer_id}, peer_id, as_json=as_json)


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm federate run ./federation --new ./checkpoint --peers /ip4/192.0.2.1/tcp/31330/p2p/12D3… "
    "--invite 12D3KooWNairobi… --invite 12D3KooWDelhi… --invite 12D3KooWQuito… --rounds 10\n\n"
    "swarm federate run ./federation --adapter ./adapter-sw --invite … --rounds 3\n\n"
    "swarm federate run ./federation    (goes on where it was)"
)
def run(
    folder: Annotated[Path, typer.Argument(help="Where the federation is kept.")],
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", metavar="FOLDER", help="Begin with this adapter."),
    ] = None,
    new: Annotated[
        str | None,
        typer.Option("--new", metavar="MODEL", help="Begin with a new adapter for this model."),
    ] = None,
    invite: Annotated[
        list[str] | None,
        typer.Option("--invite", metavar="PEER_ID", help="Who may take part; repeat it."),
    ] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="How many.")] = None,
    minimum: Annotated[
        int | None,
        typer.Option("--minimum", help="No sum of fewer participants; more than half of all."),
    ] = None,
    train_hours: Annotated[
        float, typer.Option("--train-hours", help="How long a round waits for trainings.")
    ] = 24.0,
    answer_s: Annotated[
        float, typer.Option("--answer-seconds", help="How long each message after that may take.")
    ] = 300.0,
    method: Annotated[str, typer.Option("--method", help="Of --new: lora or dora.")] = "lora",
    rank: Rank = 16,
    alpha: Alpha = None,
    target_modules: TargetModules = "",
    loss: Loss = "sft",
    epochs: Annotated[int, typer.Option("--epochs", help="Of each round.")] = 1,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Of each round, whatever --epochs says.")
    ] = None,
    batch_size: BatchSize = 8,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="Highest of each round.")
    ] = 2e-4,
    schedule: Annotated[
        str, typer.Option("--schedule", help="Within a round: constant, linear, cosine.")
    ] = "constant",
    optimizer: Optimizer = "adamw",
    max_length: MaximumLength = 512,
    seed: Annotated[int, typer.Option("--seed", help="Of first values and orders.")] = 0,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 picks a free one.")] = DEFAULT_PORT,
    linger_s: Annotated[
        float,
        typer.Option("--linger-seconds", help="Wait for those who have not fetched the result."),
    ] = 3600.0,
    peers: Peers = None,
    policy: PolicyFile = None,
    dtype: Dtype = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Run the aggregator until all rounds are over. Ctrl-C stops; the same command goes on."""
    with outcome(as_json):
        prepare_process()
        from swarm.client.finetune.federation.files import FederationFiles
        from swarm.client.finetune.federation.runs import check_same, found, serve_federation
        from swarm.client.finetune.settings import FinetuneSettings

        recipe = FinetuneSettings(
            method=method,
            loss=loss,
            rank=rank,
            alpha=alpha,
            target_modules=module_names(target_modules),
            optimizer=optimizer,
            learning_rate=learning_rate,
            schedule=schedule,
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
        )
        files = FederationFiles(folder)
        with files.only_process():
            if files.exists:
                check_same(files.terms(), invite or [], rounds)
            else:
                beginning = _beginning(
                    adapter, new, recipe, lambda: settings_from(peers, dtype, config, policy)
                )
                found(
                    files,
                    beginning,
                    invited=invite or [],
                    rounds=rounds or 1,
                    minimum=minimum,
                    train_s=train_hours * 3600,
                    answer_s=answer_s,
                )
            done = serve_federation(
                files,
                host,
                port,
                ready=lambda url, terms: _say_ready(url, terms, as_json),
                linger_s=linger_s,
                as_json=as_json,
            )
        terms = files.terms()
        result = {
            "done": len(done) == terms.rounds,
            "rounds": [
                {
                    "round": one.number,
                    "participants": one.participants,
                    "examples": one.examples,
                    "attempts": one.attempts,
                }
                for one in done
            ],
        }
        print_result(result, f"{len(done)} of {terms.rounds} rounds are done", as_json=as_json)


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm federate join https://aggregator.example ./checkpoint --data mine.jsonl "
    "--out ./adapter-together --peers /ip4/192.0.2.1/tcp/31330/p2p/12D3KooW...\n\n"
    "swarm federate join http://192.0.2.9:8460 ./checkpoint --data mine.jsonl --out ./adapter "
    "--aggregator 12D3KooWAggregator… --with 12D3KooWNairobi… --with 12D3KooWQuito…"
)
def join(
    url: Annotated[str, typer.Argument(help="Of the aggregator.")],
    model: Annotated[
        str, typer.Argument(help="Checkpoint folder, or a name in the Hugging Face cache or hub.")
    ],
    data: Annotated[
        Path,
        typer.Option("--data", metavar="FILE", help="JSON lines, as for swarm finetune."),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where the common adapter goes.")
    ],
    key: Key = KEY_FILE,
    aggregator: Annotated[
        str | None,
        typer.Option("--aggregator", metavar="PEER_ID", help="Go on only if it is this one."),
    ] = None,
    together_with: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="PEER_ID",
            help="Go on only if these, and nobody else, take part beside you; repeat it.",
        ),
    ] = None,
    held_out: HeldOut = 0,
    raw: Raw = False,
    in_flight: InFlight = 3,
    snapshot_every: SnapshotEvery = 50,
    peers: Peers = None,
    policy: PolicyFile = None,
    dtype: Dtype = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Take part: train each round on your data, and give the change away under masks.

    Ctrl-C stops; the same command goes on. The result is PEFT's format, for everybody the same.
    """
    with outcome(as_json):
        settings = settings_from(peers, dtype, config, policy)
        prepare_process()
        from swarm.client.finetune.federation.runs import Participation, take_part

        participation = Participation(
            url=url,
            model=model,
            data=data,
            out=out,
            key=key.expanduser(),
            aggregator=aggregator,
            together_with=tuple(together_with) if together_with else None,
            held_out=held_out,
            raw=raw,
            in_flight=in_flight,
            snapshot_every=snapshot_every,
            join=settings,
        )
        result = take_part(participation, as_json=as_json)
        print_result(result, f"the common adapter is in {out}", as_json=as_json)


def _beginning(
    adapter: Path | None,
    new: str | None,
    recipe: FinetuneSettings,
    settings: Callable[[], ClientSettings],
) -> Beginning:
    """Raises UsageError unless exactly one of the two ways is chosen."""
    from swarm.client.finetune.federation.process import beginning_of
    from swarm.client.finetune.federation.runs import begin_through_swarm
    from swarm.protocol.errors import UsageError

    if adapter is not None and new is None:
        return beginning_of(adapter, recipe)
    if new is not None and adapter is None:
        return begin_through_swarm(new, recipe, settings())
    raise UsageError("begin with either --adapter FOLDER or --new MODEL")


def _say_ready(url: str, terms: FederationTerms, as_json: bool) -> None:
    event = {
        "event": "ready",
        "url": url,
        "aggregator": terms.aggregator,
        "invited": list(terms.invited),
        "rounds": terms.rounds,
        "pid": os.getpid(),
    }
    print_result(
        event,
        f"aggregator of {terms.model} at {url}",
        f"  swarm federate join {url} MODEL --aggregator {terms.aggregator} --data … --out …",
        f"  {len(terms.invited)} invited, {terms.rounds} rounds",
        as_json=as_json,
    )
