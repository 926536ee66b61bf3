"""What the operator says of nodes: whose they are, and whether they are in its books at all."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from swarm.ledger.operator_client import NodeStanding, OperatorClient
from swarm.ports import Clock
from swarm.protocol.errors import NetworkError, ProtocolError, RemoteError
from swarm.protocol.identity import PeerId

log = logging.getLogger(__name__)

LIFETIME_S = 600.0
MOST_NODES = 8192
REVOKED, ACTIVE = "revoked", "active"


class Standings:
    """Asked once in ten minutes for each node."""

    def __init__(self, operator: OperatorClient, organisation: str, clock: Clock) -> None:
        """``organisation`` is ours: nobody judges its own nodes."""
        self._operator = operator
        self.organisation = organisation
        self._clock = clock
        self._known: dict[PeerId, tuple[float, NodeStanding | None]] = {}

    async def of(self, node: PeerId) -> NodeStanding | None:
        """None for a node that is not enrolled. Raises NetworkError, RemoteError, ProtocolError."""
        now_s = self._clock.monotonic_s()
        known = self._known.get(node)
        if known is not None and now_s < known[0] + LIFETIME_S:
            return known[1]
        standing = await self._operator.node_standing(node)
        self._known[node] = (now_s, standing)
        if len(self._known) > MOST_NODES:
            del self._known[next(iter(self._known))]
        return standing

    def forget(self, node: PeerId) -> None:
        """Its state has changed."""
        self._known.pop(node, None)

    async def may_be_judged(self, node: PeerId) -> bool:
        """Not one of ours, of nobody's books or out of them; while the operator is away, by what
        it said last, and a node that it never spoke of may be."""
        try:
            standing = await self.of(node)
        except (NetworkError, RemoteError, ProtocolError) as error:
            log.info("the operator does not say whose %s is: %s", node, error)
            if node not in self._known:
                return True
            standing = self._known[node][1]
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
            for node, (_, standing) in self._known.items()
            if standing is not None and standing.organisation == self.organisation
        }
