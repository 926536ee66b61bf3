"""Chooses the hops of a client's sessions, and learns from what becomes of them.

For each chain the router draws candidates from the nodes that may serve it, asks all of them at
once how busy they are, and takes the cheapest chain among those that answered in time. The choices
themselves are pure (``swarm.routing``, ``swarm.chain_choice``); what is remembered is in
``client.known_nodes``.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from swarm.addresses import is_loopback
from swarm.chain_choice import (
    APART_S,
    CLIENT,
    Candidate,
    Place,
    candidate,
    charged_s,
    choose_chain,
    others_in_batch,
    place_of,
)
from swarm.client.bans import FailureKind
from swarm.client.known_nodes import KnownNodes
from swarm.connection import Connection
from swarm.ledger.reputation import Reputations, Standing
from swarm.ledger.rules import is_eligible
from swarm.ports import Clock, Transport
from swarm.protocol.errors import (
    ErrorCode,
    NetworkError,
    NoRouteError,
    PeerUnreachable,
    PolicyUnmet,
    RemoteError,
    SwarmError,
)
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import AskLoad, LoadReport
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.version import STREAM_PROTOCOL
from swarm.routing import (
    NO_ROOM,
    ChainPlan,
    Hop,
    Needs,
    no_route,
    obstacle,
    overlaps,
    permitted,
    sample_nodes,
    uncovered,
)

log = logging.getLogger(__name__)

OLDEST_VIEW_S = 120.0
"""Records that nobody refreshed for so long are read again before they are used."""
READ_AGAIN_S = 1.0
"""When there is no route, the directory is read again, but not more often than this."""
READ_S = 5.0
"""For reading it again; somebody waits for the plan."""
ATTEMPTS = 3
"""Reads of the directory for one plan: in a large swarm each shows other shards."""
SHORTEST_WAIT_S = 0.4
"""For answers, however fast the first ones came: a node's cores may all be busy."""
LONGEST_WAIT_S = 3.0
"""For answers without which there is no chain."""
NOT_READY = frozenset(state.name.lower() for state in (NodeState.JOINING, NodeState.DRAINING))
"""Obstacles that may have gone since the directory was read."""
ONLINE_SAMPLE = 8
"""Nodes that are dialled to find out whether our own network is there."""
ONLINE_WAIT_S = 2.0
LARGEST_DOUBT = 1.1
"""What was measured may be wrong by so much: of two equal nodes a client would otherwise always
take the one that it happened to measure faster."""
LAST_RESORT_S = 60.0
"""What using a banned node costs in the choice: more than any detour."""
UNPAID_S = 1.0
"""What a node costs in the choice that the session's allowance cannot pay: it serves us last, and
where others are near they shall earn what the allowance is for."""
BRINGING_S = 0.05
"""What it costs in the choice to bring a node an adapter, spread over the tokens of an answer."""


def _is_here(record: NodeRecord) -> bool:
    """Whether only programs on this computer reach it."""
    return bool(record.addresses) and all(map(is_loopback, record.addresses))


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a node said when it was asked."""

    record: NodeRecord
    load: LoadReport


class Router:
    """A ``client.planner.Planner`` for sessions with the same needs."""

    def __init__(
        self,
        transport: Transport,
        known: KnownNodes,
        needs: Needs,
        *,
        clock: Clock,
        dice: random.Random,
        reputations: Reputations | None = None,
    ) -> None:
        """``reputations``: what audits found; nodes in quarantine are never used."""
        self._reputations = reputations or Reputations()
        self._transport = transport
        self._known = known
        self._needs = needs
        self._clock = clock
        self._dice = dice

    async def plan(
        self,
        first_block: int,
        end_block: int,
        *,
        excluded: Collection[PeerId] = (),
        previous: PeerId | None = None,
        following: PeerId | None = None,
    ) -> ChainPlan:
        """The best chain for blocks ``[first_block, end_block)``, without the ``excluded`` peers.

        ``previous`` and ``following`` are the hops on both sides of a gap; None is the client.
        Raises NoRouteError, which names the blocks and why, or says when to try again for room;
        NetworkError when the directory cannot be read. Cancelling is safe.
        """
        known = self._known
        await self._refresh(OLDEST_VIEW_S)
        reasons = dict.fromkeys(excluded, "tried before or in use")
        for attempt in range(1, ATTEMPTS + 1):
            try:
                answers = await self._willing(first_block, end_block, reasons)
                break
            except NoRouteError:
                if attempt == ATTEMPTS or not await self._refresh(READ_AGAIN_S):
                    raise
        # No await from here on: of plans made at the same moment each sees those before it.
        candidates = [self._candidate(answer) for answer in answers]
        self._dice.shuffle(candidates)
        apart = known.apart
        plan = choose_chain(
            candidates,
            first_block,
            end_block,
            previous=self._place(previous),
            following=self._place(following),
            apart=apart,
        )
        for hop in plan.hops:
            known.opening(hop.peer_id)
        last_resorts = sum(self._is_last_resort(hop.peer_id) for hop in plan.hops)
        unpaid = sum(not self._is_paid(hop.peer_id) for hop in plan.hops)
        added_s = last_resorts * LAST_RESORT_S + unpaid * UNPAID_S
        peers = (previous, *(hop.peer_id for hop in plan.hops), following)
        added_s += APART_S * sum(frozenset(pair) in apart for pair in pairwise(peers))
        return replace(plan, expected_step_s=plan.expected_step_s - added_s)

    async def _refresh(self, older_than_s: float) -> bool:
        """See to it that the directory was read lately; whether that took a read.

        While nobody who keeps it can be reached, what is known already has to do.
        Raises NetworkError when that is nothing.
        """
        known = self._known
        try:
            async with asyncio.timeout(READ_S if known.records else None):
                return await known.refresh(older_than_s=older_than_s)
        except (TimeoutError, NetworkError) as error:
            if not known.records:
                raise
            log.info("could not read the directory: %s", error or "it takes too long")
            return False

    def pays_with(self, route_seed: bytes) -> None:
        """The session's allowance is another one now; the seed of its draw, empty without one."""
        self._needs = replace(self._needs, route_seed=route_seed)

    async def is_online(self) -> bool:
        """Whether any of a few nodes, whichever blocks they have, can be dialled.

        True as well where that says nothing of our own network: nobody who is known may be asked,
        or all of them run on this computer.
        """
        records = [r for r in self._known.records if not permitted(r, self._needs)[1]]
        if self._known.records and all(_is_here(record) for record in records):
            return True
        drawn = self._dice.sample(records, min(len(records), ONLINE_SAMPLE))

        async def answers(record: NodeRecord) -> bool:
            try:
                async with asyncio.timeout(ONLINE_WAIT_S):
                    stream = await self._transport.open(
                        record.peer_id, STREAM_PROTOCOL, record.addresses
                    )
                    async with Connection(stream) as connection:
                        await connection.say_hello()
            except (TimeoutError, NetworkError):
                return False
            except SwarmError:
                return True
            return True

        asking = [asyncio.create_task(answers(record)) for record in drawn]
        try:
            for answer in asyncio.as_completed(asking):
                if await answer:
                    return True
            return False
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    def failed(self, peer: PeerId, kind: FailureKind) -> None:
        """Look elsewhere first for a while; longer each time it happens again."""
        self._known.failed(peer, kind)

    def quarrelled(self, peers: Collection[PeerId]) -> None:
        """One of these peers did wrong, and it cannot be told which: who quarrels with several is
        avoided for long, the others for a moment."""
        self._known.quarrelled(peers)

    def passed(self, hops: Sequence[Hop], reported_s: Sequence[float], step_s: float) -> None:
        """A step of one token went through a whole chain, undisturbed, in ``step_s``.

        ``reported_s`` is what each hop says that it took, queueing included; what it does not
        explain is charged to all of them. From now on this counts, and not what they announce.
        """
        places = [self._place(hop.peer_id) for hop in hops]
        for hop, hop_s in zip(hops, charged_s(step_s, reported_s, places), strict=True):
            blocks = hop.end_block - hop.first_block
            self._known.served(hop.peer_id, blocks=blocks, step_s=hop_s)

    def measured_round_trip(self, peer: PeerId, round_trip_s: float) -> None:
        """A ping of the client came back after ``round_trip_s``."""
        self._known.measured_round_trip(peer, round_trip_s)

    # --- costs
    def _candidate(self, answer: _Answer) -> Candidate:
        peer = answer.record.peer_id
        doubt = self._dice.uniform(1.0, LARGEST_DOUBT)
        entry = candidate(
            answer.record,
            answer.load,
            round_trip_s=doubt * self._known.round_trip_s(peer),
            in_flight=self._known.openings(peer),
            slowness=doubt * self._known.slowness(answer.record),
        )
        if self._needs.preferred_adapter and not answer.load.has_adapter:
            entry = replace(entry, wait_s=entry.wait_s + BRINGING_S)
        if not self._is_paid(peer):
            entry = replace(entry, wait_s=entry.wait_s + UNPAID_S)
        if self._is_last_resort(peer):
            return replace(entry, wait_s=entry.wait_s + LAST_RESORT_S)
        return entry

    def _is_paid(self, peer: PeerId) -> bool:
        """Whether the session's allowance can pay it; others work for nothing."""
        seed = self._needs.route_seed
        return not seed or is_eligible(seed, peer)

    def _place(self, peer: PeerId | None) -> Place:
        if peer is None:
            return CLIENT
        record = self._known.record(peer)
        round_trip_s = self._known.round_trip_s(peer)
        if record is None:
            return Place(round_trip_s, peer=peer)
        return place_of(record, round_trip_s)

    def _standing(self, peer: PeerId) -> Standing:
        return self._reputations.standing(peer, self._clock.unix_s())

    def _quarantine(self, peer: PeerId) -> str:
        standing = self._standing(peer)
        return standing.value if standing is Standing.QUARANTINED else ""

    def _is_last_resort(self, peer: PeerId) -> bool:
        return self._known.is_banned(peer) or self._standing(peer) is not Standing.USABLE

    # --- candidates
    async def _willing(
        self, first_block: int, end_block: int, reasons: dict[PeerId, str]
    ) -> list[_Answer]:
        """Nodes that are ready to serve and together cover the blocks. Raises NoRouteError.

        ``reasons`` says which nodes cannot be used and why; those that refuse are added, so that
        a second attempt does not wait for them again.
        """
        known = []
        for announced in self._known.records:
            record, refusal = permitted(announced, self._needs)
            if not overlaps(record, first_block, end_block):
                if overlaps(announced, first_block, end_block):
                    refusal = refusal or "below the policy's tier for the first and last blocks"
                    record = announced
                else:
                    continue
            if refusal:
                # Not like other reasons: nothing may be asked of it, whatever else it says.
                reasons[record.peer_id] = refusal
            known.append(record)
        for record in known:
            reason = obstacle(record, self._needs) or self._quarantine(record.peer_id)
            if reason:
                reasons.setdefault(record.peer_id, reason)
        usable = [record for record in known if record.peer_id not in reasons]
        unbanned = [record for record in usable if not self._is_last_resort(record.peer_id)]
        # What they said of their state may be some seconds old; they are asked at last.
        unready = {
            record.peer_id: reasons.pop(record.peer_id)
            for record in known
            if reasons.get(record.peer_id) in NOT_READY
        }
        waiting = [record for record in known if record.peer_id in unready]
        answers: list[_Answer] = []
        # Banned nodes, those that were not sampled and those that the session's allowance cannot
        # pay are asked when the others are not enough.
        groups = [unbanned, usable, waiting]
        if self._needs.route_seed:
            groups.insert(0, [record for record in unbanned if self._is_paid(record.peer_id)])
        for group in groups:
            asked = {answer.record.peer_id for answer in answers} | reasons.keys()
            group = [record for record in group if record.peer_id not in asked]
            if uncovered([answer.record for answer in answers] + group, first_block, end_block):
                continue
            drawn = sample_nodes(
                group,
                first_block,
                end_block,
                dice=self._dice,
                round_trip_s=self._known.round_trips_s,
                adapter_id=self._needs.preferred_adapter,
            )
            outcomes = await self._ask(drawn, first_block, end_block)
            for record in drawn:
                outcome = outcomes[record.peer_id]
                if isinstance(outcome, str):
                    reasons[record.peer_id] = unready.get(record.peer_id, outcome)
                else:
                    answers.append(_Answer(record, outcome))
            if not uncovered([answer.record for answer in answers], first_block, end_block):
                return answers
        error = no_route(known, {**unready, **reasons}, first_block, end_block)
        policy = self._needs.policy
        if policy is None:
            raise error
        raise PolicyUnmet(
            f"{error}, under the policy: {policy.describe()}",
            missing_blocks=error.missing_blocks,
            retry_after_ms=error.retry_after_ms,
        )

    async def _ask(
        self, records: Sequence[NodeRecord], first_block: int, end_block: int
    ) -> dict[PeerId, LoadReport | str]:
        """The load of each node, or why it cannot be used. Waits for the late ones only while
        those that answered make no chain."""
        started_s = self._clock.monotonic_s()
        outcomes: dict[PeerId, LoadReport | str] = {}
        willing: list[NodeRecord] = []
        times_s: list[float] = []
        answered = asyncio.Event()

        async def ask(record: NodeRecord) -> None:
            outcome = outcomes[record.peer_id] = await self._ask_one(record, first_block, end_block)
            if isinstance(outcome, LoadReport):
                willing.append(record)
            times_s.append(self._clock.monotonic_s() - started_s)
            answered.set()

        async with asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(ask(record)) for record in records]
            while len(outcomes) < len(records):
                wait_s = LONGEST_WAIT_S
                if not uncovered(willing, first_block, end_block):
                    wait_s = min(wait_s, max(SHORTEST_WAIT_S, 2 * median(times_s)))
                answered.clear()
                try:
                    async with asyncio.timeout(started_s + wait_s - self._clock.monotonic_s()):
                        await answered.wait()
                except TimeoutError:
                    break
            for task in asking:
                task.cancel()
        for record in records:
            if record.peer_id not in outcomes:
                self._known.failed(record.peer_id, FailureKind.SILENT)
                outcomes[record.peer_id] = FailureKind.SILENT.value
        return outcomes

    async def _ask_one(
        self, record: NodeRecord, first_block: int, end_block: int
    ) -> LoadReport | str:
        peer = record.peer_id
        question = AskLoad(
            model_revision=self._needs.model_revision,
            first_block=max(first_block, record.first_block),
            end_block=min(end_block, record.end_block),
            tokens=self._needs.tokens,
            adapter_id=self._needs.preferred_adapter,
        )
        try:
            stream = await self._transport.open(peer, STREAM_PROTOCOL, record.addresses)
            async with Connection(stream) as connection:
                policy = self._needs.policy
                if policy is not None:
                    await connection.say_hello(only_for=policy.check)
                    asked_s = self._clock.monotonic_s()
                    await connection.send(question)
                else:
                    asked_s = self._clock.monotonic_s()
                    await connection.say_hello(question)
                load = await connection.receive_only(LoadReport)
                self._known.measured_round_trip(peer, self._clock.monotonic_s() - asked_s)
        except SwarmError as error:
            log.debug("%s did not say how busy it is: %s", peer, error)
            kind = failure_kind(error)
            self._known.failed(peer, kind)
            return kind.value
        self._known.reported(peer, others_in_batch(load))
        if load.accepting and load.cache_tokens_free >= self._needs.tokens:
            return load
        return NO_ROOM if load.cache_tokens_free < self._needs.tokens else "taking no sessions"


def failure_kind(error: SwarmError) -> FailureKind:
    """How an error on a stream with a peer counts against it."""
    if isinstance(error, RemoteError):
        full = error.code in (
            ErrorCode.NO_CAPACITY,
            ErrorCode.TOO_MANY_SESSIONS,
            ErrorCode.ADAPTER_NO_ROOM,
        )
        return FailureKind.NO_ROOM if full else FailureKind.REFUSED
    if isinstance(error, PeerUnreachable):
        return FailureKind.UNREACHABLE
    if isinstance(error, NetworkError):
        return FailureKind.BROKEN
    return FailureKind.WRONG
