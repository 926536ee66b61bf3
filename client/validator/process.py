"""A validator's process: challenges at random times, verdicts that are kept and posted.

Two tasks: one makes challenges, one after the other; one delivers verdicts. ``docket`` decides whom
to look at and what a finding amounts to, ``challenges`` does it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

from swarm.client.auditing import Finding
from swarm.client.challenge_terms import Reference
from swarm.client.generate import LocalModel
from swarm.client.grants import OperatorGrants
from swarm.client.validator.challenges import LENGTHS, Challenge, Connect, Lengths, Served, Shape
from swarm.client.validator.delivery import Delivery, Posted
from swarm.client.validator.docket import Docket, Target
from swarm.client.validator.prompts import PrivateTexts
from swarm.client.validator.standings import Standings
from swarm.client.validator.state import KeptVerdict, ValidatorState
from swarm.client.validator.verdicts import verdict_of
from swarm.ledger.operator_client import OperatorClient
from swarm.ports import Clock
from swarm.protocol.errors import (
    ConfigError,
    NetworkError,
    NoRouteError,
    ProtocolError,
    RemoteError,
    SwarmError,
)
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.ledger_objects import sign
from swarm.protocol.records import NodeRecord

log = logging.getLogger(__name__)

ORGANISATION = "organisation"
"""Under which name the state keeps whose key it is."""
SOON = 0.1
"""Part of the period after which a suspect is met again."""
SHORTEST_WAIT_S = 1.0
LONGEST_WAIT = 4.0
"""Periods: the waits are drawn as those of independent users are, without the rare long ones."""
ADAPTER_SHARE = 0.5
"""Of the challenges that could be with an adapter."""
DRAWS = 16
"""So many nodes are drawn before it is said that there is nobody to look at."""


@dataclass(frozen=True, slots=True)
class ValidatorSettings:
    """How a validator goes about it."""

    identity: Identity
    """The organisation's key: signs verdicts, and draws the allowances of challenges."""
    period_s: float = 600.0
    """Mean time between two challenges."""
    only_rechecks: bool = False
    """Only nodes that others have accused, and suspects."""
    lengths: Lengths = LENGTHS

    def __post_init__(self) -> None:
        if not 1 <= self.period_s <= 7 * 24 * 3600:
            raise ConfigError("the period is between a second and a week")


@dataclass(frozen=True, slots=True)
class Judged:
    """A finding and the verdict that it led to, if it did."""

    finding: Finding
    outcome: str | None


@dataclass(frozen=True, slots=True)
class Challenged:
    """One challenge that was made."""

    target: Target
    served: Served
    judged: tuple[Judged, ...]
    texts_left: int


class Validator:
    """One organisation's validator of one model."""

    def __init__(
        self,
        settings: ValidatorSettings,
        state: ValidatorState,
        texts: PrivateTexts,
        model: LocalModel,
        connect: Connect,
        operator: OperatorClient,
        *,
        clock: Clock,
        dice: random.Random,
        organisation: str,
        grants: OperatorGrants | None = None,
        reference: Reference | None = None,
        posted: Callable[[Posted], None] = lambda _: None,
    ) -> None:
        """``grants``: what pays for the sessions of all that ``connect`` gives; it is drawn ahead
        of them."""
        self.delivery = Delivery(state, operator, clock, self._posted)
        self._tell = posted
        self._settings = settings
        self._state = state
        self._texts = texts
        self._model = model
        self._connect = connect
        self._operator = operator
        self._clock = clock
        self._dice = dice
        self._grants = grants
        self._reference = reference
        self._standings = Standings(operator, organisation, state, clock)
        self._docket = Docket(state.known)
        self._announced: list[PeerId] = []

    # --- one challenge
    async def challenge(self) -> Challenged | None:
        """Look at some node now; None when nobody is there to be looked at.

        What was found is on the disk when this returns. Raises NoRouteError and NetworkError when
        the swarm cannot serve it, UsageError when the texts are used up.
        """
        async with Challenge(self._model, self._connect, self._reference, self._dice) as challenge:
            records = await challenge.records()
            await self._read_quarantined()
            target = await self._target(records)
            if target is None:
                return None
            adapter = None
            if self._dice.random() < ADAPTER_SHARE:
                adapter = await challenge.adapter(records, target)
            shape = Shape.draw(self._settings.lengths, self._dice)
            piece = self._texts.take(shape.prompt_characters, self._dice)
            await self._state.use(piece.digests)
            challenge.steer(records, target, self._standings.own)
            try:
                served = await challenge.ask(piece.text, shape, self._standings.judged, adapter)
            except SwarmError:
                await self._missed(target.node)
                raise
        if target.node not in served.peers:
            await self._missed(target.node)
        judged = await self._judge(served)
        return Challenged(target, served, judged, self._texts.sentences_left)

    async def _target(self, records: list[NodeRecord]) -> Target | None:
        """Whom to look at: drawn until it is one that we may judge."""
        self._announced = [record.peer_id for record in records]
        nodes = list(self._announced)
        for _ in range(DRAWS):
            target = self._docket.next_target(
                nodes,
                self._clock.unix_s(),
                self._dice,
                only_cases=self._settings.only_rechecks,
            )
            if target is None or await self._standings.may_be_judged(target.node):
                return target
            nodes.remove(target.node)
        return None

    async def _read_quarantined(self) -> None:
        """What others have accused, and what was cleared; as it was when the operator is away."""
        try:
            listed = await self._operator.quarantined()
            mine = self._standings.organisation
            wanted = [PeerId(each.node) for each in listed if each.organisation != mine]
            changed = self._docket.rechecks(wanted)
            untold = {each.node for each in self._state.waiting}
            for node in self._docket.told:
                # Not listed, although it was told: revoked, or free again.
                if node not in wanted and node not in untold:
                    self._standings.forget(node)
                    self._docket.decided(node)
                    changed.append(node)
            await self._keep(changed)
        except (NetworkError, RemoteError, ProtocolError) as error:
            log.info("the operator does not say who is in quarantine: %s", error)

    async def _judge(self, served: Served) -> tuple[Judged, ...]:
        """Sign what was found and keep it."""
        now = self._clock.unix_s()
        judged, verdicts, changed = [], [], []
        judges = set(await self._standings.judged([each.peer_id for each in served.findings]))
        for finding in served.findings:
            if finding.peer_id not in judges:
                continue
            evidence = finding.evidence
            outcome = self._docket.found(
                finding.peer_id, finding.found, now, is_measured=evidence is not None
            )
            changed.append(finding.peer_id)
            judged.append(Judged(finding, outcome))
            if outcome is not None and evidence is not None:
                verdict = verdict_of(evidence, finding.comparison, outcome, now)
                sealed = sign(verdict, self._settings.identity.private_key)
                verdicts.append(
                    KeptVerdict(verdict.segment, finding.peer_id, outcome, sealed, verdict.unix_s)
                )
        await self._keep(changed, verdicts)
        if verdicts:
            self.delivery.there_is_news()
        return tuple(judged)

    async def _missed(self, node: PeerId) -> None:
        self._docket.missed(node, self._clock.unix_s())
        await self._keep([node])

    async def _keep(self, nodes: list[PeerId], verdicts: list[KeptVerdict] | None = None) -> None:
        if nodes or verdicts:
            known = {node: self._docket.of(node) for node in nodes}
            await self._state.keep(known, verdicts or [])

    def _posted(self, posted: Posted) -> None:
        self._standings.forget(posted.verdict.node)
        self._tell(posted)

    # --- until it is told to end
    async def run(self, challenged: Callable[[Challenged | SwarmError | None], None]) -> None:
        """Challenge at random times, deliver, until cancelled. Raises UsageError at the end of the
        texts."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.delivery.run())
            while True:
                wait_s = self._wait_s()
                ahead_s = self._dice.uniform(0, wait_s)
                await self._clock.sleep(wait_s - ahead_s)
                if self._grants is not None:
                    await self._grants.draw_ahead()
                await self._clock.sleep(ahead_s)
                try:
                    challenged(await self.challenge())
                except (NetworkError, NoRouteError, RemoteError, ProtocolError) as error:
                    challenged(error)

    async def once(self, challenged: Callable[[Challenged | SwarmError | None], None]) -> None:
        """One challenge, or with ``only_rechecks`` all that are due; then deliver.

        Raises what ``challenge`` raises, and NetworkError when verdicts could not be delivered.
        """
        while True:
            made = await self.challenge()
            challenged(made)
            if made is None or not self._settings.only_rechecks:
                break
        await self.delivery.deliver()

    def _wait_s(self) -> float:
        """To the next challenge: nobody can tell from those before when it comes."""
        cases = self._docket.open_cases(self._announced, self._clock.unix_s())
        mean_s = self._settings.period_s * (SOON if cases else 1.0)
        drawn_s = self._dice.expovariate(1 / mean_s)
        return min(max(SHORTEST_WAIT_S, drawn_s), LONGEST_WAIT * mean_s)


async def organisation_of(
    operator: OperatorClient, identity: Identity, state: ValidatorState
) -> str:
    """Whose key it is, by the operator's word; as it was said last while the operator is away.

    Raises ConfigError for a key whose verdicts do not count, NetworkError.
    """
    try:
        known = await operator.validators()
    except NetworkError:
        if name := state.meta.get(ORGANISATION):
            return name
        raise
    name = known.get(identity.public_key_bytes)
    if name is None:
        raise ConfigError(
            "the operator lists no validator with this key; its public half is "
            f"{identity.public_key_bytes.hex()}, and the operator adds it by "
            "swarm operator organisation FOLDER NAME KEY --validator"
        )
    await state.remember(ORGANISATION, name)
    return name
