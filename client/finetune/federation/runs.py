"""One run of ``swarm federate run`` or ``join``: reads what it needs, and shows how it goes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.resolve import local_checkpoint
from swarm.client.app import SwarmClient
from swarm.client.background import BackgroundLoop
from swarm.client.config import ClientSettings
from swarm.client.finetune.adapter_files import write_adapter
from swarm.client.finetune.ends import TrainingEnds
from swarm.client.finetune.federation.aggregator_client import AggregatorClient
from swarm.client.finetune.federation.files import DoneRound, FederationFiles
from swarm.client.finetune.federation.local_training import SwarmTraining
from swarm.client.finetune.federation.member import Member, MemberObserver
from swarm.client.finetune.federation.process import Beginning, new_beginning, run_aggregator
from swarm.client.finetune.federation.rounds import Phase, Round
from swarm.client.finetune.federation.terms import (
    FEDERATION_ID_BYTES,
    METHODS,
    FederationTerms,
    default_minimum,
)
from swarm.client.finetune.model import base_model
from swarm.client.finetune.progress import Watcher
from swarm.client.finetune.run import Job, Opener, data_digest, read_objectives, shown_progress
from swarm.client.finetune.settings import FinetuneSettings
from swarm.client.joining import connected, progress_line
from swarm.client.output import note
from swarm.operator.app import leave_on_signals
from swarm.protocol.errors import UsageError
from swarm.protocol.identity import Identity, PeerId
from swarm.virtual_time import LoopClock

_WHAT = {
    Phase.ADVERTISE: "training",
    Phase.SHARE: "sharing secrets",
    Phase.MASKED: "collecting masked changes",
    Phase.UNMASK: "taking masks away",
    Phase.SUM: "adding up",
}


# --- the aggregator
def begin_through_swarm(
    model: str, recipe: FinetuneSettings, settings: ClientSettings
) -> Beginning:
    """First values of a new adapter. Raises SwarmErrors."""
    if recipe.method not in METHODS:
        raise UsageError(f"federations train {' or '.join(METHODS)}")
    with connected(settings) as (background, client):
        checkpoint = _checkpoint(model, background, client)
        base = base_model(checkpoint, settings.dtype)
        return background.run(new_beginning(Opener(client, base), base, recipe))


def found(
    files: FederationFiles,
    beginning: Beginning,
    *,
    invited: Sequence[str],
    rounds: int,
    minimum: int | None,
    train_s: float,
    answer_s: float,
) -> None:
    """Write terms and beginning. Raises UsageError."""
    terms = FederationTerms(
        federation_id=secrets.token_bytes(FEDERATION_ID_BYTES),
        aggregator=files.identity().peer_id,
        model=beginning.model,
        model_revision=beginning.model_revision,
        recipe=beginning.recipe,
        invited=tuple(map(PeerId, invited)),
        rounds=rounds,
        minimum=default_minimum(len(invited)) if minimum is None else minimum,
        train_s=train_s,
        answer_s=answer_s,
    )
    files.create(terms, beginning.adapter)


def check_same(terms: FederationTerms, invited: Sequence[str], rounds: int | None) -> None:
    """Raises UsageError when a federation that goes on is asked to be another one."""
    if (invited and set(invited) != set(terms.invited)) or rounds not in (None, terms.rounds):
        raise UsageError(
            "the folder holds a federation with other participants or rounds; leave --invite and "
            "--rounds out to go on with it, or take another folder"
        )


def serve_federation(
    files: FederationFiles,
    host: str,
    port: int,
    *,
    ready: Callable[[str, FederationTerms], None],
    linger_s: float,
    as_json: bool,
) -> tuple[DoneRound, ...]:
    """The aggregator's process, until its end or a signal. Raises SwarmErrors."""
    rounds = files.terms().rounds

    async def serve() -> tuple[DoneRound, ...]:
        leaving = asyncio.Event()
        with leave_on_signals(leaving):
            return await run_aggregator(
                files,
                host,
                port,
                ready=ready,
                leaving=leaving,
                changed=_RoundsShown(progress, rounds, quiet=as_json),
                linger_s=linger_s,
            )

    with shown_progress(as_json) as progress:
        return asyncio.run(serve())


class _RoundsShown:
    """A bar on a terminal; elsewhere a line for each phase."""

    def __init__(self, progress: Progress | None, rounds: int, *, quiet: bool) -> None:
        self._progress = progress
        self._rounds = rounds
        self._quiet = quiet
        self._task = progress.add_task("waiting", total=rounds) if progress is not None else None
        self._last: tuple[int, int, Phase] | None = None

    def __call__(self, number: int, current: Round) -> None:
        done = current.phase is Phase.DONE
        text = "all rounds are done" if done else f"round {number}: {_WHAT[current.phase]}"
        if current.phase not in (Phase.SUM, Phase.DONE):
            text += f", {current.answered} of {current.due}"
        if self._progress is not None and self._task is not None:
            completed = self._rounds if done else number - 1
            self._progress.update(self._task, completed=completed, description=text)
        elif not self._quiet and self._last != (number, current.attempts, current.phase):
            note(text)
        self._last = (number, current.attempts, current.phase)


# --- a participant
@dataclass(frozen=True, slots=True)
class Participation:
    """What ``swarm federate join`` was told."""

    url: str
    model: str
    data: Path
    out: Path
    key: Path
    aggregator: str | None
    together_with: tuple[str, ...] | None
    held_out: int
    raw: bool
    in_flight: int
    snapshot_every: int
    join: ClientSettings


def take_part(told: Participation, *, as_json: bool) -> dict[str, Any]:
    """All rounds; the adapter is in PEFT's format then. Raises SwarmErrors.

    What the aggregator says is looked at before anything is asked of the swarm.
    """
    identity = Identity.load_or_create(told.key)
    terms = asyncio.run(_ask_terms(told, identity))
    check_members(terms, identity.peer_id, told.together_with)
    with (
        shown_progress(as_json) as progress,
        connected(told.join) as (background, client),
    ):
        checkpoint = _checkpoint(told.model, background, client)
        if terms.model_revision != checkpoint.revision:
            raise UsageError(
                f"the federation trains {terms.model} {terms.model_revision.hex()[:16]}…, and "
                f"{checkpoint.path} is {checkpoint.revision.hex()[:16]}…"
            )
        watcher = Watcher(progress, quiet=as_json)
        return background.run(
            _take_part(told, identity, terms, checkpoint, client, watcher, quiet=as_json)
        )


async def _ask_terms(told: Participation, identity: Identity) -> FederationTerms:
    async with AggregatorClient(told.url, identity, clock=LoopClock()) as client:
        return await client.terms(None if told.aggregator is None else PeerId(told.aggregator))


async def _take_part(
    told: Participation,
    identity: Identity,
    terms: FederationTerms,
    checkpoint: Checkpoint,
    swarm: SwarmClient,
    watcher: Watcher,
    *,
    quiet: bool,
) -> dict[str, Any]:
    clock = LoopClock()
    async with AggregatorClient(told.url, identity, clock=clock) as client:
        if await client.terms(terms.aggregator) != terms:
            raise UsageError(f"the aggregator at {told.url} has just begun another federation")
        if not quiet:
            note(f"{len(terms.invited)} participants, {terms.rounds} rounds, {terms.model}")
        job = Job(
            told.model,
            told.data,
            told.out,
            terms.recipe,
            told.join,
            held_out=told.held_out,
            raw=told.raw,
            resume=True,
        )
        ends, objectives = await asyncio.to_thread(
            lambda: (TrainingEnds.load(checkpoint), read_objectives(job, checkpoint))
        )
        base = base_model(checkpoint, told.join.dtype)
        training = SwarmTraining(
            Opener(swarm, base),
            ends,
            base,
            terms,
            objectives[0],
            clock,
            held_out=objectives[1],
            data_digest=data_digest(job),
            observer=watcher,
            micro_batches_in_flight=told.in_flight,
            snapshot_every=told.snapshot_every,
        )
        member = Member(
            client,
            identity,
            terms,
            training,
            told.out,
            clock=clock,
            observer=MemberObserver() if quiet else _Told(),
        )
        result = await member.run()
    await asyncio.to_thread(
        write_adapter,
        told.out,
        result,
        terms.recipe,
        model_name=base.name,
        model_type=base.model_type,
        model_revision=base.revision,
        model_config=ends.config,
    )
    return {
        "adapter": str(told.out),
        "rounds": terms.rounds,
        "examples": objectives[0].size,
        "tokens": watcher.speed.tokens,
    }


def check_members(terms: FederationTerms, own: PeerId, together_with: Sequence[str] | None) -> None:
    """Raises UsageError when it is not the federation that its user meant."""
    if own not in terms.invited:
        raise UsageError(f"you are not invited: ask for --invite {own} (as swarm federate id says)")
    if together_with is not None:
        others = set(terms.invited) - {own}
        if others != set(together_with) - {own}:
            strangers = ", ".join(sorted(others - set(together_with))) or "fewer than you expect"
            raise UsageError(f"others are invited than by --with: {strangers}")


class _Told(MemberObserver):
    """Lines for the user."""

    def round_begins(self, number: int, rounds: int) -> None:
        note(f"round {number} of {rounds}: training on your data")

    def sent(self, number: int, phase: Phase) -> None:
        if phase is Phase.MASKED:
            note(f"round {number}: your change is given away under its masks")

    def repeated(self, number: int, attempt: int) -> None:
        note(f"round {number}: too few stayed, attempt {attempt}")


def _checkpoint(model: str, background: BackgroundLoop, client: SwarmClient) -> Checkpoint:
    local = local_checkpoint(model)
    if local is None:
        local = background.run(client.fetch_ends(model, progress_line()))
    return Checkpoint.open(local)
