"""Wiring of a client: the network, the directory and the chains that are open.

``SwarmClient`` is what the SDK, the command line and other programs share. One client serves any
number of sessions on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from swarm.client.chain import Chain, ChainObserver, ChainTimeouts, HopFailed, SessionRequest
from swarm.client.config import ClientSettings
from swarm.membership import ModelSummary, list_models, read_nodes
from swarm.ports import Clock, Directory, Transport
from swarm.protocol.errors import ErrorCode, NoRouteError, SwarmError
from swarm.protocol.identity import PeerId
from swarm.protocol.records import NodeRecord
from swarm.protocol.tensors import DType
from swarm.routing import ChainPlan, choose_chain
from swarm.virtual_time import LoopClock

log = logging.getLogger(__name__)

OPEN_ATTEMPTS = 4
"""Chains that are tried before a session is given up; each failed hop is left out of the next."""


class Network(Transport, Directory, Protocol):
    """Both ports of one peer."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Attempt:
    """A chain that could not be opened, and why."""

    plan: ChainPlan
    error: SwarmError


class SwarmClient:
    """A peer that hosts nothing: finds nodes, opens chains. An async context manager."""

    def __init__(
        self,
        network: Network,
        *,
        clock: Clock | None = None,
        timeouts: ChainTimeouts | None = None,
        observer: ChainObserver | None = None,
        seed: int | None = None,
    ) -> None:
        self._network = network
        self._clock = clock or LoopClock()
        self._timeouts = timeouts or ChainTimeouts()
        self._observer = observer
        self._random = random.Random(seed)  # noqa: S311  (spreads load; no secret)
        self._chains: set[asyncio.Task[None]] = set()
        self._resources = AsyncExitStack()

    @classmethod
    async def connect(
        cls, settings: ClientSettings, *, observer: ChainObserver | None = None
    ) -> SwarmClient:
        """Join the swarm through the settings' peers. Raises NetworkError when none answers."""
        # hivemind takes seconds to import: here, and not when a program only asks for --help.
        from swarm.hivemind_network import HivemindNetwork, NetworkSettings

        async with AsyncExitStack() as stack:
            identity_path = settings.identity_path
            if identity_path is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-client-"))
                identity_path = Path(folder) / "identity.key"
            network = await HivemindNetwork.create(
                identity_path,
                NetworkSettings(
                    # Clients are never dialled: nodes answer on the streams that clients open.
                    listen_addresses=("/ip4/127.0.0.1/tcp/0",),
                    initial_peers=settings.peers,
                    serve_directory=False,
                    start_timeout_s=settings.connect_timeout_s,
                ),
            )
            stack.push_async_callback(network.close)
            client = cls(
                network,
                timeouts=ChainTimeouts(
                    open_s=settings.open_timeout_s, step_s=settings.step_timeout_s
                ),
                observer=observer,
            )
            client._resources = stack.pop_all()
            return client
        raise AssertionError("unreachable")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all chains and leave the network."""
        for task in tuple(self._chains):
            task.cancel()
        await asyncio.gather(*self._chains, return_exceptions=True)
        await self._resources.aclose()

    async def models(self) -> list[ModelSummary]:
        """What the swarm serves, by its directory."""
        return await list_models(self._network, self._clock)

    async def nodes(self, model_revision: bytes) -> list[NodeRecord]:
        """Nodes that announce blocks of a model revision."""
        return await read_nodes(self._network, model_revision, self._clock)

    async def open_chain(
        self,
        request: SessionRequest,
        *,
        number_of_blocks: int,
        dtype: DType | None = None,
        model_name: str = "this model",
    ) -> Chain:
        """Choose hops and open a session on them; nodes that refuse or are gone are left out.

        ``dtype`` restricts the nodes to one compute precision. Raises NoRouteError when blocks are
        served by nobody or have no room, and when too many attempts failed.
        """
        excluded: set[PeerId] = set()
        attempts: list[Attempt] = []
        for _ in range(OPEN_ATTEMPTS):
            records = await self.nodes(request.model_revision)
            if not records:
                raise NoRouteError(await self._unknown_model(request, model_name))
            try:
                plan = choose_chain(
                    records,
                    number_of_blocks=number_of_blocks,
                    dtype=dtype,
                    excluded=excluded,
                    tokens=request.rows * request.maximum_tokens,
                    dice=self._random,
                )
            except NoRouteError as error:
                if attempts:
                    raise _tried(attempts, error) from attempts[-1].error
                raise
            chain = Chain(
                self._network,
                plan,
                request,
                clock=self._clock,
                observer=self._observer,
                timeouts=self._timeouts,
            )
            task = asyncio.create_task(chain.run())
            self._chains.add(task)
            task.add_done_callback(self._chains.discard)
            try:
                await chain.opened()
            except HopFailed as error:
                log.info("chain not opened: %s", error)
                attempts.append(Attempt(plan, error))
                excluded.add(error.peer_id)
                if self._observer is not None:
                    reason = error.code.name if error.code is not None else "NETWORK"
                    self._observer.retried(reason.lower())
            except BaseException:
                await chain.close()
                raise
            else:
                return chain
        raise _tried(attempts, None) from attempts[-1].error

    async def _unknown_model(self, request: SessionRequest, model_name: str) -> str:
        served = await self.models()
        others = [model for model in served if model.model_name == model_name]
        if others:
            return (
                f"the swarm serves another revision of {model_name}; "
                "use the same checkpoint as its nodes"
            )
        names = ", ".join(sorted({model.model_name for model in served})) or "no model at all"
        return f"nobody serves {model_name}; this swarm serves: {names}"


def _tried(attempts: list[Attempt], last: NoRouteError | None) -> NoRouteError:
    """One error that says what was tried; `no room` keeps its hint when to come back."""
    reasons = "; ".join(str(attempt.error) for attempt in attempts)
    retry_after_ms = max(
        (error.retry_after_ms for error in map(_hop_error, attempts) if error), default=0
    )
    full = all(
        error is not None and error.code in (ErrorCode.NO_CAPACITY, ErrorCode.TOO_MANY_SESSIONS)
        for error in map(_hop_error, attempts)
    )
    if full:
        hint = f"; retry in {retry_after_ms / 1000:.0f} s" if retry_after_ms else ""
        text = f"no room for this session now{hint} ({reasons})"
    else:
        text = f"no chain could be opened: {reasons}"
        if last is not None:
            text += f"; without these nodes, {last}"
    return NoRouteError(
        text,
        missing_blocks=last.missing_blocks if last is not None else (),
        retry_after_ms=retry_after_ms,
    )


def _hop_error(attempt: Attempt) -> HopFailed | None:
    return attempt.error if isinstance(attempt.error, HopFailed) else None
