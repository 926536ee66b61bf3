"""The status page of ``swarm.status``, wired to a client: its directory, and canary sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING

from swarm.client.app import SwarmClient
from swarm.client.config import ClientSettings, SamplingSettings
from swarm.ledger.operator_client import OperatorClient
from swarm.protocol.errors import (
    ErrorCode,
    GenerationInterrupted,
    NetworkError,
    NoRouteError,
    ProtocolError,
    SwarmError,
)
from swarm.protocol.prices import UNITS_PER_CREDIT
from swarm.status.plain_text import plain_text
from swarm.status.probing import Problem
from swarm.status.snapshot import Probe, ProbeHop
from swarm.status.status_page import StatusPage, StatusSettings, served
from swarm.status.undisturbed import UndisturbedLooks
from swarm.virtual_time import LoopClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from swarm.client.generate import LocalModel

log = logging.getLogger(__name__)

CANARY = "The quick brown fox jumps over the lazy dog. Counting on: one, two, three,"
CANARY_TOKENS = 16


class CanaryProber:
    """``swarm.status.probing.Prober`` by sessions of this client, as any user would open them."""

    def __init__(self, client: SwarmClient, models: dict[str, LocalModel]) -> None:
        """``models`` by revision in hexadecimal digits."""
        self._client = client
        self._models = models

    @property
    def revisions(self) -> Collection[str]:
        return self._models.keys()

    async def probe(self, revision: str) -> Probe:
        """One short answer through the whole chain; failures are a result."""
        from swarm.client.generate import stream_generate

        model = self._models[revision]
        at_unix_s = LoopClock().unix_s()
        # Without an end-of-text token in the way: a speed needs some tokens to be measured on.
        settings = SamplingSettings(max_new_tokens=CANARY_TOKENS)
        try:
            stream = stream_generate(self._client, model, model.encode(CANARY), settings)
            async with aclosing(stream) as pieces:
                async for piece in pieces:
                    result = piece.result
        except SwarmError as error:
            log.warning("a probe failed: %s", error)
            return Probe(revision, at_unix_s, False, problem=_problem(error))
        if result is None:
            return Probe(revision, at_unix_s, False, problem=Problem.INTERRUPTED)
        return Probe(
            revision,
            at_unix_s,
            True,
            result.time_to_first_token_s,
            result.tokens_per_s,
            len(result.token_ids),
            hops=tuple(
                ProbeHop(hop.peer_id, plain_text(hop.display_name), hop.first_block, hop.end_block)
                for hop in result.plan.hops
            ),
        )


def _problem(error: SwarmError) -> Problem:
    match error:
        case GenerationInterrupted():
            return Problem.INTERRUPTED
        case NoRouteError():
            return Problem.NO_ROUTE
        case NetworkError():
            return Problem.NETWORK
        case _:
            return Problem.INTERRUPTED


class OperatorLedger:
    """``swarm.status.status_page.SettledWork`` from the totals that an operator publishes."""

    def __init__(self, operator: OperatorClient) -> None:
        self._operator = operator

    async def credits(self) -> Mapping[str, float]:
        """Of the nodes that earned most. Raises SwarmError."""
        totals = await self._operator.totals()
        leaders = totals.get("leaders", [])
        try:
            earned = {str(row["node"]): int(row["units"]) / UNITS_PER_CREDIT for row in leaders}
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(ErrorCode.BAD_FIELD, "no leaders") from error
        return {node: amount for node, amount in earned.items() if amount > 0}


async def run_status_page(
    client_settings: ClientSettings,
    settings: StatusSettings,
    *,
    operator_url: str = "",
    probed_models: Sequence[str],
    ready: Callable[[str], None],
    leaving: asyncio.Event,
) -> None:
    """Serve the page until ``leaving``; ``ready`` is called with its address.

    ``operator_url``: whose books rank donors; empty: what nodes announce does.
    ``probed_models``: checkpoints whose embeddings and head are on this computer. Raises
    CheckpointError, ConfigError and NetworkError.
    """
    async with AsyncExitStack() as stack:
        models: dict[str, LocalModel] = {}
        for name in probed_models:
            revision, model = await asyncio.to_thread(_load, name, client_settings.dtype)
            stack.callback(model.close)
            models[revision] = model
        ledger = None
        if operator_url:
            operator = await stack.enter_async_context(OperatorClient(operator_url))
            ledger = OperatorLedger(operator)
        client = await stack.enter_async_context(await SwarmClient.connect(client_settings))
        page = StatusPage(
            settings,
            client.directory,
            client.clock,
            transport=client.transport,
            prober=CanaryProber(client, models) if models else None,
            ledger=ledger,
            around_look=UndisturbedLooks(),
        )
        stack.callback(page.close)
        ready(await stack.enter_async_context(served(page)))
        async with asyncio.TaskGroup() as group:
            running = group.create_task(page.run())
            await leaving.wait()
            running.cancel()


def _load(name: str, dtype: str) -> tuple[str, LocalModel]:
    from swarm.catalogue.checkpoint import Checkpoint, resolve_checkpoint
    from swarm.client.generate import LocalModel

    revision = Checkpoint.open(resolve_checkpoint(name)).revision.hex()
    return revision, LocalModel.load(name, dtype=dtype)
