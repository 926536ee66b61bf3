"""``swarm validator``: challenge nodes unseen, and sign what was found for the operator."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.client.joining import AsJson, Config, Peers, outcome, own_files, prepare_process
from swarm.client.output import explain
from swarm.command_results import print_result
from swarm.protocol.errors import ConfigError, ProtocolError, SwarmError, UsageError

if TYPE_CHECKING:
    from swarm.client.validator.delivery import Posted
    from swarm.client.validator.process import Challenged, Judged

STATE_FILE = Path("~/.local/share/sovereign-swarm/validator.state")

validator_app = typer.Typer(
    name="validator",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Find nodes that cheat, for an operator.\n\nA validating organisation asks the swarm like "
    "anybody else, has what nodes answered computed again, and signs what it found. Verdicts of "
    "two organisations take a cheat's escrow; honest nodes need them to be paid. docs/ledger.md.",
)

StateFile = Annotated[
    Path,
    typer.Option(
        "--state", metavar="FILE", help="Sentences that were used, verdicts, suspects: keep it."
    ),
]


@validator_app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm validator run MODEL --peers /ip4/192.0.2.1/tcp/31330/p2p/12D3KooW... "
    "--operator https://operator.example --operator-key b5769c… --key university.key "
    "--prompts ./texts/letters.txt --weights\n\n"
    "swarm validator run MODEL --recheck --once …"
)
def run(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or a model's name.")],
    operator: Annotated[
        str,
        typer.Option(
            "--operator", metavar="URL", envvar="SWARM_OPERATOR", help="Where it listens."
        ),
    ],
    operator_key: Annotated[
        str,
        typer.Option(
            "--operator-key",
            metavar="HEX",
            envvar="SWARM_OPERATOR_KEY",
            help="Its public key, from a source other than the operator.",
        ),
    ],
    key: Annotated[
        Path,
        typer.Option(
            "--key", metavar="FILE", help="Key of the organisation that the operator lists."
        ),
    ],
    prompts: Annotated[
        list[Path],
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Text that only you have; no sentence is sent twice. Repeatable.",
        ),
    ],
    peers: Peers = None,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights",
            help="This disk has all of the model: one audit in four is against it, and all of "
            "suspects.",
        ),
    ] = False,
    publisher: Annotated[
        list[str] | None,
        typer.Option(
            "--publisher",
            metavar="PEER",
            help="Believe this publisher's manifests: where nodes announce its adapters, half of "
            "the challenges are with one. Repeatable; by default those of the settings and of the "
            "charter.",
        ),
    ] = None,
    recheck: Annotated[
        bool,
        typer.Option(
            "--recheck", help="Look only at nodes that others have accused, and at suspects."
        ),
    ] = False,
    once: Annotated[
        bool,
        typer.Option("--once", help="One challenge (with --recheck: all that are due), then end."),
    ] = False,
    period: Annotated[
        float,
        typer.Option(
            "--period", metavar="SECONDS", help="Mean time between challenges; suspects: a tenth."
        ),
    ] = 600.0,
    state: StateFile = STATE_FILE,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="auto, float32 or bfloat16; as users have it.")
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Challenge nodes at random times until Ctrl-C; verdicts that cannot be posted now wait."""
    with outcome(as_json), own_files():
        from swarm.client.joining import settings_from
        from swarm.protocol.identity import Identity

        settings = settings_from(peers, dtype, config)
        settings = replace(
            settings,
            operator_url=operator,
            operator_key=operator_key,
            publishers=_peer_ids(publisher) or settings.publishers,
        )
        identity = Identity.load(key)
        prepare_process()
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        # Of what hops do there is nothing to tell that the verdicts do not.
        logging.getLogger("swarm.client.auditing").setLevel(logging.ERROR)
        from swarm.client.validator.app import Listener, ValidatorFiles, run_validator
        from swarm.client.validator.process import ValidatorSettings
        from swarm.operator.app import leave_on_signals

        shown = _Shown(as_json)

        async def work() -> None:
            leaving = asyncio.Event()
            with leave_on_signals(leaving):
                await run_validator(
                    model,
                    ValidatorSettings(identity, period, only_rechecks=recheck),
                    ValidatorFiles(key, tuple(prompts), state.expanduser()),
                    settings,
                    Listener(shown.started, shown.challenged, shown.posted),
                    leaving,
                    has_weights=weights,
                    once=once,
                )

        asyncio.run(work())


@validator_app.command(epilog="[bold]Example[/bold]\n\nswarm validator show")
def show(state: StateFile = STATE_FILE, as_json: AsJson = False) -> None:
    """What your validator has signed about each node, and what the operator answered last."""
    with outcome(as_json), own_files():
        from swarm.client.validator.state import summaries

        path = state.expanduser()
        if not path.exists():
            raise ConfigError(
                f"no validator has run here: there is no {path}, which swarm validator run makes; "
                "--state names another file"
            )
        found = summaries(path)
    nodes = [
        {
            "node": each.node,
            **{name: each.outcomes.get(name, 0) for name in ("passed", "failed", "not_reproduced")},
            "waiting": each.waiting,
            "answer": each.answer,
            "case": each.case,
        }
        for each in found
    ]
    lines = [
        f"{each.node}  "
        + ", ".join(f"{count} {name}" for name, count in sorted(each.outcomes.items()))
        + (f", {each.waiting} not posted yet" if each.waiting else "")
        + (f"; the operator: {each.answer}" if each.answer else "")
        + (f"; {each.case}" if each.case else "")
        for each in found
    ]
    print_result({"nodes": nodes}, *(lines or ["no verdicts yet"]), as_json=as_json)


def _peer_ids(given: list[str] | None) -> tuple[str, ...]:
    """Raises UsageError for what is none."""
    from swarm.protocol.identity import public_key_from_peer_id

    for each in given or ():
        try:
            public_key_from_peer_id(each)
        except ProtocolError as error:
            raise UsageError(f"{each[:80]!r} is no peer id of a publisher") from error
    return tuple(given or ())


class _Shown:
    """What happens, a line each."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json

    def started(self, organisation: str) -> None:
        self._say(
            {"event": "ready", "organisation": organisation}, f"validating for {organisation}"
        )

    def challenged(self, made: Challenged | SwarmError | None) -> None:
        if made is None:
            self._say({"event": "idle"}, "nobody to look at now")
        elif isinstance(made, SwarmError):
            text = explain(made)
            self._say({"event": "failed", "error": text}, f"no challenge: {text}")
        else:
            self._say(
                {
                    "event": "challenge",
                    "target": made.target.node,
                    "case": made.target.case.value if made.target.case else "",
                    "chain": list(made.served.peers),
                    "adapter": made.served.adapter,
                    "prompt_tokens": made.served.prompt_tokens,
                    "answer_tokens": made.served.answer_tokens,
                    "replayed_tokens": made.served.replayed_tokens,
                    "sentences_left": made.texts_left,
                    "findings": [_fields(each) for each in made.judged],
                },
                f"challenged {len(made.served.peers)} nodes by {made.served.prompt_tokens} + "
                f"{made.served.answer_tokens} tokens"
                + (f" with {made.served.adapter}" if made.served.adapter else ""),
                *(f"  {_line(each)}" for each in made.judged),
            )

    def posted(self, posted: Posted) -> None:
        verdict = posted.verdict
        self._say(
            {
                "event": "posted",
                "node": verdict.node,
                "segment": verdict.segment,
                "outcome": verdict.outcome,
                "answer": posted.answer,
            },
            f"posted {verdict.outcome} of {verdict.node}: {posted.answer}",
        )

    def _say(self, fields: dict[str, Any], *lines: str) -> None:
        print_result(fields, *lines, as_json=self._as_json)


def _fields(judged: Judged) -> dict[str, Any]:
    finding = judged.finding
    comparison, evidence = finding.comparison, finding.evidence
    return {
        "node": finding.peer_id,
        "first_block": finding.first_block,
        "end_block": finding.end_block,
        "found": finding.found.value,
        "verdict": judged.outcome or "",
        "tokens": comparison.tokens if comparison else 0,
        "median": _number(comparison.median) if comparison else None,
        "p95": _number(comparison.p95) if comparison else None,
        "by_own_weights": evidence is not None and evidence.is_by_reference,
    }


def _line(judged: Judged) -> str:
    finding = judged.finding
    errors = ""
    if finding.comparison is not None:
        errors = f", errors {finding.comparison.median:.4f} and {finding.comparison.p95:.4f}"
    said = f"; verdict: {judged.outcome}" if judged.outcome else "; no verdict"
    blocks = f"blocks {finding.first_block}-{finding.end_block - 1}"
    return f"{finding.peer_id} {blocks}: {finding.found.value}{errors}{said}"


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return round(value, 6) if math.isfinite(value) else None
