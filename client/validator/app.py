"""Wiring of a validator's process: files, the operator, the model, and a new client each time."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.resolve import local_checkpoint
from swarm.client.adapter_push import AdapterSource
from swarm.client.app import SwarmClient
from swarm.client.challenge_terms import ChallengeTerms, Reference
from swarm.client.config import ClientSettings
from swarm.client.generate import LocalModel
from swarm.client.grants import grants_by
from swarm.client.validator.delivery import Posted
from swarm.client.validator.process import (
    Challenged,
    Validator,
    ValidatorSettings,
    organisation_of,
)
from swarm.client.validator.prompts import PrivateTexts
from swarm.client.validator.state import ValidatorState
from swarm.ledger.operator_client import OperatorClient
from swarm.protocol.errors import ConfigError, SwarmError
from swarm.protocol.tensors import WireTensor
from swarm.virtual_time import LoopClock

log = logging.getLogger(__name__)

LARGEST_TEXT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ValidatorFiles:
    """What a validator has on its disk."""

    key: Path
    texts: tuple[Path, ...]
    state: Path


@dataclass(frozen=True, slots=True)
class Listener:
    """Who hears of what happens."""

    started: Callable[[str], None]
    """By the name of the organisation."""
    challenged: Callable[[Challenged | SwarmError | None], None]
    posted: Callable[[Posted], None]


async def run_validator(
    model_name: str,
    settings: ValidatorSettings,
    files: ValidatorFiles,
    client_settings: ClientSettings,
    listener: Listener,
    leaving: asyncio.Event,
    *,
    has_weights: bool = False,
    once: bool = False,
) -> None:
    """Challenge until ``leaving``, or once.

    Raises ConfigError and CheckpointError for what is not right here, UsageError when the texts are
    used up; with ``once`` also what keeps the swarm or the operator from answering.
    """
    client_settings = as_anybody(client_settings, files.key)
    clock = LoopClock()
    async with AsyncExitStack() as stack:
        state = await asyncio.to_thread(ValidatorState.open, files.state)
        stack.push_async_callback(state.close)
        texts = PrivateTexts(map(_read, files.texts), state.used)
        operator = await stack.enter_async_context(OperatorClient(client_settings.operator_url))
        organisation = await organisation_of(operator, settings.identity, state)
        path = await _model_path(model_name, client_settings)
        model = await asyncio.to_thread(LocalModel.load, str(path), dtype=client_settings.dtype)
        stack.callback(model.close)

        grants = await grants_by(client_settings, stack, clock)

        async def connect(terms: ChallengeTerms) -> SwarmClient:
            return await SwarmClient.connect(client_settings, challenge=terms, grants=grants)

        validator = Validator(
            settings,
            state,
            texts,
            model,
            connect,
            operator,
            clock=clock,
            # Nobody may foresee when we come: the seed is a secret of this process.
            dice=random.Random(secrets.randbits(128)),  # noqa: S311
            organisation=organisation,
            grants=grants,
            reference=own_weights(model.checkpoint) if has_weights else None,
            posted=listener.posted,
        )
        listener.started(organisation)
        work = validator.once if once else validator.run
        task = asyncio.create_task(work(listener.challenged))
        left = asyncio.create_task(leaving.wait())
        try:
            await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            if not task.done():
                task.cancel()
        await _ended(task)


def as_anybody(settings: ClientSettings, key: Path) -> ClientSettings:
    """Settings of a client that leaves no trace between sessions, and that the audit budget pays.

    In a swarm with a charter it is the one that the passport names, and can be recognised.
    """
    if not (settings.operator_url and settings.operator_key):
        raise ConfigError(
            "a validator needs --operator URL and --operator-key KEY: verdicts go there, and its "
            "budget pays for challenges"
        )
    return replace(
        settings,
        account_path=key,
        allowance_budget="",
        validates=True,
        ledger_file=None,
        owner_key_path=None,
        identity_path=None if settings.passport is None else settings.identity_path,
        audits=False,
    )


def own_weights(checkpoint: Checkpoint) -> Reference:
    """The reference of whoever has all blocks. Raises CheckpointError for some that are missing."""
    from swarm.client.calibration import OwnWeights

    weights = OwnWeights(checkpoint)
    one_at_a_time = asyncio.Lock()

    async def compute(
        first_block: int, end_block: int, given: WireTensor, adapter: AdapterSource | None
    ) -> WireTensor:
        async with one_at_a_time:
            return await asyncio.to_thread(weights.compute, first_block, end_block, given, adapter)

    return compute


async def _model_path(name: str, settings: ClientSettings) -> Path:
    """The model's ends, from this disk or the swarm."""
    local = await asyncio.to_thread(local_checkpoint, name)
    if local is not None:
        return local
    async with await SwarmClient.connect(settings) as client:
        return await client.fetch_ends(name)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_TEXT_BYTES:
            raise ConfigError(f"{path} is larger than {LARGEST_TEXT_BYTES >> 20} MiB: divide it")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8") from error


async def _ended(task: asyncio.Task[None]) -> None:
    """What a task ended with: nothing for one that was told to; one error instead of a group."""
    try:
        await task
    except asyncio.CancelledError:
        pass
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group
