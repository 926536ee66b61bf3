"""Moves a session off a node that leaves by plan, while tokens go on being made.

The replacement is opened and gets the leaving hop's cache and journal in rounds, behind the back of
the session; its streams to both neighbours are made ready. Then, between two steps, the rest is
moved, both sides' digests are compared, and the route is switched. Nothing is computed again.

As long as the route is not switched, the leaving hop has everything: whatever fails, the session
goes on there, and the move is tried again until the node is gone. Then it is healed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from swarm.client.hops import Hops
from swarm.client.link import HopFailed, Link
from swarm.client.planner import Planner
from swarm.ports import Clock
from swarm.protocol.errors import (
    ErrorCode,
    NetworkError,
    NoRouteError,
    ProtocolError,
    RemoteError,
    SwarmError,
)
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import HandedOver, HandOver
from swarm.protocol.session import ClientSession

log = logging.getLogger(__name__)

PAUSE_S = 1.0
"""Before another try: until somebody else with these blocks turns up."""
MAXIMUM_ROUNDS = 8
SMALL_ROUND_TOKENS = 16
"""A round that moved no more is the last one before the switch: the switch takes as much."""


class ChainChanged(SwarmError):
    """The chain was healed meanwhile, and what was prepared does not fit any more."""


class Moves:
    """The moves of one chain, one after the other."""

    def __init__(
        self,
        hops: Hops,
        planner: Planner,
        session: ClientSession,
        *,
        clock: Clock,
        answer_s: float,
        between_steps: asyncio.Lock,
        reshaping: asyncio.Lock,
    ) -> None:
        """While ``between_steps`` is held no step is in flight, while ``reshaping`` is no healing.

        They are taken in this order.
        """
        self._hops = hops
        self._planner = planner
        self._session = session
        self._clock = clock
        self._answer_s = answer_s
        self._between_steps = between_steps
        self._reshaping = reshaping
        self._one_move = asyncio.Lock()

    async def move_away(self, leaving: Link, wait_s: float) -> bool:
        """Move the session off ``leaving`` within ``wait_s``, if there is somewhere to go to.

        False when it stays until the node is gone, or is rebuilt elsewhere.
        """
        deadline_s = self._clock.monotonic_s() + wait_s
        refused: list[PeerId] = []
        async with self._one_move:
            while leaving in self._hops.links and self._clock.monotonic_s() < deadline_s:
                try:
                    left_s = deadline_s - self._clock.monotonic_s()
                    return await self._move(leaving, refused, left_s)
                except NoRouteError as error:
                    log.info("nowhere to go from %s: %s", leaving.peer_id, error)
                    refused.clear()
                except HopFailed as error:
                    log.info("cannot move from %s yet: %s", leaving.peer_id, error)
                    if error.peer_id != leaving.peer_id:
                        refused.append(error.peer_id)
                        continue
                except ChainChanged:
                    continue
                await self._clock.sleep(PAUSE_S)
        return False

    async def _move(self, leaving: Link, refused: Sequence[PeerId], wait_s: float) -> bool:
        hops = self._hops
        before, after = hops.previous_of(leaving), hops.following(leaving)
        plan = await self._planner.plan(
            leaving.hop.first_block,
            leaving.hop.end_block,
            excluded=(leaving.peer_id, *refused),
            previous=before.peer_id if before is not None else None,
            following=after.peer_id if after is not None else None,
        )
        if len(plan.hops) > 1:
            await self._give_up(leaving)
            return False
        fresh = await hops.open_in_place_of(leaving, plan.hops[0], before)
        try:
            await self._move_what_there_is(leaving, fresh, wait_s)
            if after is not None:
                await hops.ask_previous(after, fresh)
                await hops.route(fresh, after)
            version = await hops.prepare(before, fresh) if before is not None else 0
            async with self._between_steps, self._reshaping:
                self._require_unchanged(leaving, before, after)
                await self._move_the_rest(leaving, fresh, self._answer_s)
                self._require_unchanged(leaving, before, after)
                if before is not None:
                    await hops.switch(before, fresh, version)
                hops.swap(leaving, fresh)
            log.info("moved from %s to %s", leaving.peer_id, fresh.peer_id)
            return True
        finally:
            if fresh in hops.links:
                await hops.close(leaving)
            else:
                await hops.close(fresh)
                if after is not None and after in hops.links and leaving in hops.links:
                    await hops.ask_previous(after, leaving)

    def _require_unchanged(self, leaving: Link, before: Link | None, after: Link | None) -> None:
        hops = self._hops
        if (
            leaving not in hops.links
            or hops.first_gap is not None
            or hops.previous_of(leaving) is not before
            or hops.following(leaving) is not after
            or self._session.oldest_in_flight is not None
        ):
            raise ChainChanged("the chain has changed")

    async def _move_what_there_is(self, leaving: Link, fresh: Link, wait_s: float) -> None:
        """Rounds in the background, until what remains is small."""
        moved = 0
        for _ in range(MAXIMUM_ROUNDS):
            answer = await self._hand_over(leaving, fresh, wait_s, final=False)
            news, moved = answer.length - moved, answer.length
            if news <= SMALL_ROUND_TOKENS:
                return

    async def _move_the_rest(self, leaving: Link, fresh: Link, timeout_s: float) -> None:
        """The last round, between two steps. Raises HopFailed unless both sides have the same."""
        said = await self._hand_over(leaving, fresh, timeout_s, final=True)
        has = await fresh.took_over(timeout_s)
        wanted = (self._session.length, said.digest, self._session.resume_step)
        if (has.length, has.digest, has.next_step) != wanted or said.length != has.length:
            error = ProtocolError(ErrorCode.BAD_TENSOR, "not what was handed over")
            raise HopFailed(fresh.hop, error)

    async def _hand_over(
        self, leaving: Link, fresh: Link, timeout_s: float, *, final: bool
    ) -> HandedOver:
        question = HandOver(
            peer=fresh.peer_id, session_id=fresh.opened.session_id, final=int(final)
        )
        answer = await leaving.ask(question, HandedOver, 0, timeout_s)
        if answer.code:
            # Whatever it was: another replacement may do better.
            code = ErrorCode(answer.code) if answer.code in set(ErrorCode) else ErrorCode.INTERNAL
            raise HopFailed(fresh.hop, RemoteError(code, peer=fresh.peer_id))
        return answer

    async def _give_up(self, leaving: Link) -> None:
        """Nobody has all the blocks, but several together do: they are filled by replay."""
        async with self._between_steps:
            error = NetworkError("leaves, and its blocks go to several nodes")
            self._hops.lose(leaving, HopFailed(leaving.hop, error))
        await self._hops.close(leaving)
