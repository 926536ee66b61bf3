"""What the operator says of nodes: whose they are, and whether they are in its books at all."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence

from swarm.client.validator.state import ValidatorState
from swarm.ledger.operator_client import NodeStanding, OperatorClient
from swarm.ports import Clock
from swarm.protocol.errors import NetworkError, ProtocolError, RemoteError
from swarm.protocol.identity import PeerId

log = logging.getLogger(__name__)

LIFETIME_S = 600.0
MOST_NODES = 8192
REVOKED = "revoked"


class Standings:
    """Asked once in ten minutes for each node, and remembered for when the operator is away."""

    def __init__(
        self, operator: OperatorClient, organisation: str, state: ValidatorState, clock: Clock
    ) -> None:
        """``organisation`` is ours: nobody judges its own nodes."""
        self.organisation = organisation
        self._operator = operator
        self._state = state
        self._clock = clock
        self._asked_s: dict[PeerId, float] = {}

    async def of(self, node: PeerId) -> NodeStanding | None:
        """None for a node that is not enrolled. Raises NetworkError, RemoteError, ProtocolError."""
        now_s = self._clock.monotonic_s()
        if now_s >= self._asked_s.get(node, -math.inf) + LIFETIME_S:
            standing = await self._operator.node_standing(node)
            await self._state.heard(node, standing)
            self._asked_s[node] = now_s
            if len(self._asked_s) > MOST_NODES:
                del self._asked_s[next(iter(self._asked_s))]
        return self._state.standings.get(node)

    def forget(self, node: PeerId) -> None:
        """Its state may have changed."""
        self._asked_s.pop(node, None)

    async def may_be_judged(self, node: PeerId) -> bool:
        """Whether it is in the operator's books and not one of ours.

        While the operator is away by what it said last; of a node that it never spoke of nothing is
        said.
        """
        try:
            standing = await self.of(node)
        except (NetworkError, RemoteError, ProtocolError) as error:
            log.info("the operator does not say whose %s is: %s", node, error)
            standing = self._state.standings.get(node)
        if standing is None or standing.state == REVOKED:
            return False
        return standing.organisation != self.organisation

    async def judged(self, nodes: Sequence[PeerId]) -> Collection[PeerId]:
        """Those of them that may be judged."""
        return [node for node in nodes if await self.may_be_judged(node)]

    @property
    def own(self) -> set[PeerId]:
        """Nodes of our organisation, as far as we have heard of them."""
        return {
            node
            for node, standing in self._state.standings.items()
            if standing is not None and standing.organisation == self.organisation
        }
