"""What a chain needs of whoever chooses its hops, and a planner with one plan for tests.

``client.router.Router`` is the real one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Protocol

from swarm.client.bans import FailureKind
from swarm.protocol.errors import NoRouteError
from swarm.protocol.identity import PeerId
from swarm.routing import ChainPlan, Hop


class Planner(Protocol):
    """Chooses nodes for blocks and learns from what becomes of them."""

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
        Raises NoRouteError, which names the blocks and why. Cancelling is safe.
        """

    async def is_online(self) -> bool:
        """Whether any peer answers; False when it must be our own network that is gone."""

    def failed(self, peer: PeerId, kind: FailureKind) -> None:
        """The peer let a session down: look elsewhere first for a while."""

    def quarrelled(self, peers: Collection[PeerId]) -> None:
        """One of these peers did wrong, and it cannot be told which."""

    def passed(self, hops: Sequence[Hop], reported_s: Sequence[float], step_s: float) -> None:
        """A step of one token went through a whole chain, undisturbed, in ``step_s``.

        ``reported_s`` is what each hop says that it took, queueing included.
        """

    def measured_round_trip(self, peer: PeerId, round_trip_s: float) -> None:
        """A ping of the client came back after ``round_trip_s``."""


class FixedPlanner:
    """Always the same hops, cut to the blocks asked for; for tests and fixed chains."""

    def __init__(self, plan: ChainPlan) -> None:
        self._plan = plan
        self.failures: list[tuple[PeerId, FailureKind]] = []
        self.quarrels: list[frozenset[PeerId]] = []

    async def plan(
        self,
        first_block: int,
        end_block: int,
        *,
        excluded: Collection[PeerId] = (),
        previous: PeerId | None = None,
        following: PeerId | None = None,
    ) -> ChainPlan:
        """The part of the fixed plan for these blocks. Raises NoRouteError as every planner."""
        hops = tuple(
            replace(
                hop,
                first_block=max(hop.first_block, first_block),
                end_block=min(hop.end_block, end_block),
            )
            for hop in self._plan.hops
            if hop.first_block < end_block and hop.end_block > first_block
        )
        missing = {
            block
            for hop in hops
            if hop.peer_id in excluded
            for block in range(hop.first_block, hop.end_block)
        }
        missing |= set(range(first_block, end_block)) - {
            block for hop in hops for block in range(hop.first_block, hop.end_block)
        }
        if missing:
            raise NoRouteError(
                "the fixed chain has lost hops", missing_blocks=tuple(sorted(missing))
            )
        return ChainPlan(hops, self._plan.expected_step_s)

    async def is_online(self) -> bool:
        return True

    def failed(self, peer: PeerId, kind: FailureKind) -> None:
        self.failures.append((peer, kind))

    def quarrelled(self, peers: Collection[PeerId]) -> None:
        self.quarrels.append(frozenset(peers))

    def passed(self, hops: Sequence[Hop], reported_s: Sequence[float], step_s: float) -> None:
        return None

    def measured_round_trip(self, peer: PeerId, round_trip_s: float) -> None:
        return None
