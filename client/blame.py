"""Who is given up when hops of one session do not get on with each other.

What hops say of each other cannot be proven. Who may be at fault for an error that a hop reports:

==============================================  ================================================
it, or the hop before                           not finite or misfitting tensors, positions or
                                                fields: an honest hop sends none, and an honest
                                                one refuses none. Both are given up at once
it, the hop before, or what lies between them   a stream that cannot be made or breaks again and
                                                again, gaps and repetitions, steps beyond the
                                                vouchers, a deadline, outputs that overflow. The
                                                later hop is given up; when the one before has the
                                                same with another, that one
any hop                                         a result for another step, position or number of
                                                tokens than was asked for. All are given up
it alone                                        everything else, and all that the first hop says
                                                of what the client itself sent
==============================================  ================================================

Which nodes are avoided for it, and for how long, is the planner's (``client.quarrels``). What is
given up here is only this session's: two that contradicted each other are not joined again in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from swarm.client.link import HopFailed, Link
from swarm.protocol.errors import ErrorCode, NoRouteError, SwarmError
from swarm.protocol.identity import PeerId
from swarm.routing import ChainPlan

INPUT_IS_WRONG = frozenset(
    {
        ErrorCode.BAD_FRAME,
        ErrorCode.UNKNOWN_MESSAGE,
        ErrorCode.BAD_FIELD,
        ErrorCode.TOO_LARGE,
        ErrorCode.UNEXPECTED_MESSAGE,
        ErrorCode.BAD_STEP,
        ErrorCode.BAD_POSITION,
        ErrorCode.BAD_TENSOR,
        ErrorCode.UNSUPPORTED_DTYPE,
        ErrorCode.INPUT_NOT_FINITE,
    }
)
"""One of two hops is at fault."""
MAY_LIE_BETWEEN = frozenset(
    {
        ErrorCode.NOT_FINITE,
        ErrorCode.DEADLINE_PASSED,
        ErrorCode.VOUCHER_MISSING,
        ErrorCode.GAP,
        ErrorCode.STALE_STEP,
        ErrorCode.TOO_MANY_STEPS,
    }
)
"""One of two hops is, or nobody."""
JOINTS_TO_BLAME_FOR = 2


class Blame:
    """The blame of one session."""

    def __init__(self, lose: Callable[[Link, HopFailed], None]) -> None:
        self._lose = lose
        self._apart: set[frozenset[PeerId]] = set()
        self._failed_joints: set[tuple[PeerId, PeerId]] = set()

    def all_of(self, links: Sequence[Link], cause: SwarmError) -> HopFailed:
        """Give up hops of which one is at fault; the failure of the last of them."""
        suspects = frozenset(link.peer_id for link in links)
        if len(suspects) == 2:
            self._apart.add(suspects)
        failures = [HopFailed(link.hop, cause, suspects) for link in links]
        for failure in failures[:-1]:
            failure.is_counted = True  # it is one failure
        for link, failure in zip(links, failures, strict=True):
            self._lose(link, failure)
        return failures[-1]

    def joint(self, before: Link, link: Link, cause: SwarmError) -> HopFailed:
        """Give up one of two hops that cannot be joined; its failure."""
        self._failed_joints.add((before.peer_id, link.peer_id))
        failed_with = sum(source == before.peer_id for source, _ in self._failed_joints)
        lost = before if failed_with >= JOINTS_TO_BLAME_FOR else link
        failure = HopFailed(lost.hop, cause, frozenset((before.peer_id, link.peer_id)))
        self._lose(lost, failure)
        return failure

    def without(self, link: Link, reason: SwarmError) -> None:
        """Give up a hop that is of no more use and did nothing wrong."""
        failure = HopFailed(link.hop, reason)
        failure.is_counted = True
        self._lose(link, failure)

    def check(self, plan: ChainPlan, previous: PeerId | None, following: PeerId | None) -> None:
        """Raise NoRouteError if a plan joins two again that contradicted each other."""
        peers = [previous, *(hop.peer_id for hop in plan.hops), following]
        for index, hop in enumerate(plan.hops):
            if {frozenset(peers[index : index + 2]), frozenset(peers[index + 1 : index + 3])} & (
                self._apart
            ):
                raise NoRouteError(
                    "only nodes that contradict each other are left",
                    missing_blocks=tuple(range(hop.first_block, hop.end_block)),
                )
