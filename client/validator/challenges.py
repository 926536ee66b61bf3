"""One challenge: a session like anybody's, and an audit of every hop that served it.

Nothing that is sent says what it is for. The client is a new one with a key of its own, and draws
an allowance that looks like every funded account's; the session reserves what ``swarm generate``
reserves, and ends where an answer might end. What the validator wants differs on its side alone:
the route is steered by costs that only it sees.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from swarm.catalogue.adapter import AdapterFiles
from swarm.client.app import SwarmClient
from swarm.client.auditing import Finding
from swarm.client.chain import Chain
from swarm.client.challenge_terms import ChallengeTerms, Reference
from swarm.client.config import SamplingSettings
from swarm.client.generate import LocalModel, TextSession
from swarm.client.hops import SessionRequest
from swarm.client.validator.adapters import draw_adapter
from swarm.client.validator.docket import Target
from swarm.ledger.reputation import Found, Reputations
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import PeerId
from swarm.protocol.records import NodeRecord
from swarm.protocol.tensors import DType
from swarm.routing import overlaps

log = logging.getLogger(__name__)

CHALLENGE_S = 600.0
"""For one session and its audits; what takes longer is given up."""
ADAPTER_S = 120.0
"""For finding an adapter; after that the bare model has to do."""
TEMPERATURES = (0.0, 0.7, 1.0)

Judged = Callable[[Sequence[PeerId]], Awaitable[Collection[PeerId]]]
"""Of the hops that served a session, those that we may judge."""
Connect = Callable[[ChallengeTerms], Awaitable[SwarmClient]]
"""Joins the swarm as somebody whom nobody has seen before."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Shortest and longest; between them the logarithm is drawn evenly, as lengths of texts are."""

    prompt_characters: tuple[int, int] = (80, 2400)
    answer_tokens: tuple[int, int] = (16, 128)


LENGTHS = Lengths()


@dataclass(frozen=True, slots=True)
class Shape:
    """How long a challenge's prompt and answer are."""

    prompt_characters: int
    answer_tokens: int
    temperature: float

    @classmethod
    def draw(cls, lengths: Lengths, dice: random.Random) -> Shape:
        return cls(
            _between(*lengths.prompt_characters, dice),
            _between(*lengths.answer_tokens, dice),
            dice.choice(TEMPERATURES),
        )


@dataclass(frozen=True, slots=True)
class Served:
    """What became of a challenge."""

    peers: tuple[PeerId, ...]
    """Hops, in the order of their blocks."""
    prompt_tokens: int
    answer_tokens: int
    findings: tuple[Finding, ...]
    replayed_tokens: int
    """What replicas had to compute for the audits."""
    adapter: str = ""
    """``NAME@REVISION``; empty for the bare model."""


class Challenge:
    """One client for one session. An async context manager, which joins and leaves the swarm."""

    def __init__(
        self, model: LocalModel, connect: Connect, reference: Reference | None, dice: random.Random
    ) -> None:
        self._model = model
        self._connect = connect
        self._terms = ChallengeTerms(Reputations(), reference)
        self._dice = dice
        self._client: SwarmClient | None = None

    async def __aenter__(self) -> Self:
        self._client = await self._connect(self._terms)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def records(self) -> list[NodeRecord]:
        """Nodes that announce blocks of the model. Raises NetworkError."""
        client = self._joined()
        return await client.nodes(self._model.blocks_of(client).revision)

    def steer(
        self, records: Sequence[NodeRecord], target: Target, avoided: Collection[PeerId]
    ) -> None:
        """Let the route of the session lead through the target if it can be had at all, and past
        the avoided nodes; suspects are compared with the reference each time."""
        client = self._joined()
        of_target = [record for record in records if record.peer_id == target.node]
        for record in records:
            rivals = record.peer_id != target.node and any(
                overlaps(record, each.first_block, each.end_block) for each in of_target
            )
            if rivals or record.peer_id in avoided:
                self._terms.steering.found(
                    record.peer_id,
                    Found.FAILED,
                    segment="steered around",
                    now_unix_s=client.clock.unix_s(),
                )
        if target.case is not None:
            client.auditor.reference_share = 1.0

    async def adapter(self, records: Sequence[NodeRecord], target: Target) -> AdapterFiles | None:
        """By lot one that the target announces; of a suspect, which may have stopped to announce
        it, any other one if need be. None when none is to be had."""
        announced = {
            hint for record in records if record.peer_id == target.node for hint in record.adapters
        }
        if not announced and target.case is None:
            return None
        try:
            async with asyncio.timeout(ADAPTER_S):
                return await draw_adapter(
                    announced,
                    self._model.checkpoint,
                    self._joined().library(),
                    self._dice,
                    or_any=target.case is not None,
                )
        except (TimeoutError, NetworkError) as error:
            log.info("no adapter is to be had now: %s", error)
            return None

    async def ask(
        self, prompt: str, shape: Shape, judged: Judged, adapter: AdapterFiles | None = None
    ) -> Served:
        """The session, and audits of those of its hops that ``judged`` picks.

        Raises NoRouteError and NetworkError.
        """
        try:
            async with asyncio.timeout(CHALLENGE_S):
                return await self._ask(prompt, shape, judged, adapter)
        except TimeoutError:
            raise NetworkError(f"the challenge took longer than {CHALLENGE_S:.0f} s") from None

    async def _ask(
        self, prompt: str, shape: Shape, judged: Judged, adapter: AdapterFiles | None
    ) -> Served:
        client, model = self._joined(), self._model
        opener = _Remembering(client)
        ids = (
            model.encode_chat([{"role": "user", "content": prompt}])
            if model.has_chat_template
            else model.encode(prompt)
        )
        sampling = SamplingSettings(temperature=shape.temperature, seed=self._dice.getrandbits(31))
        ids = ids[: max(1, model.maximum_tokens - sampling.max_new_tokens)]
        # What anybody reserves who says nothing of the length of the answer.
        reserved = min(len(ids) + sampling.max_new_tokens, model.maximum_tokens)
        answered = 0
        async with (
            TextSession(opener, model, reserved, adapter=adapter) as session,
            aclosing(session.stream(ids, sampling)) as pieces,
        ):
            async for _ in pieces:
                answered += 1
                if answered >= shape.answer_tokens:
                    break
            chain = opener.chain
            if chain is None:
                raise NetworkError("the session has no chain")
            peers = tuple(hop.peer_id for hop in chain.audited_hops())
            chosen = await judged(peers)
            findings = await client.auditor.audit(chain, chosen) if chosen else []
        return Served(
            peers,
            len(ids),
            answered,
            tuple(findings),
            client.auditor.replayed_tokens,
            adapter.catalogue_name if adapter is not None else "",
        )

    def _joined(self) -> SwarmClient:
        if self._client is None:
            raise RuntimeError("use it as an async context manager")
        return self._client


class _Remembering:
    """A ``ChainOpener`` that keeps the chain: audits need more of it than answers do."""

    def __init__(self, client: SwarmClient) -> None:
        self._client = client
        self.chain: Chain | None = None

    async def open_chain(
        self,
        request: SessionRequest,
        *,
        number_of_blocks: int,
        dtype: DType | None = None,
        model_name: str = "",
    ) -> Chain:
        self.chain = await self._client.open_chain(
            request, number_of_blocks=number_of_blocks, dtype=dtype, model_name=model_name
        )
        return self.chain

    async def close(self) -> None:
        """The client is closed by whoever joined with it."""


def _between(least: int, most: int, dice: random.Random) -> int:
    return round(math.exp(dice.uniform(math.log(least), math.log(most))))
