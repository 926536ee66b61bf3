"""What an audit needs of a session; ``client.chain.Chain`` has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from swarm.client.hops import SessionRequest
from swarm.client.planner import Planner
from swarm.client.vouchers import HopAccount
from swarm.ledger.audit_rule import Floats
from swarm.ledger.sketch import Sketcher
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import SESSION_ID_BYTES
from swarm.protocol.tensors import WireTensor


@dataclass(frozen=True, slots=True)
class AuditedHop:
    """One node's part in a session."""

    peer_id: PeerId
    first_block: int
    end_block: int
    addresses: tuple[str, ...]
    session_id: bytes
    account: HopAccount | None
    """None for a node that keeps no books."""

    def at(self, peer: PeerId) -> AuditedHop:
        """Another node that computed the same; its session is named after this one."""
        session_id = bytes(SESSION_ID_BYTES - len(self.session_id)) + self.session_id
        return AuditedHop(peer, self.first_block, self.end_block, (), session_id, None)


class AuditedChain(Protocol):
    """A session between two steps, or after the last one."""

    @property
    def request(self) -> SessionRequest: ...

    @property
    def planner(self) -> Planner: ...

    @property
    def length(self) -> int: ...

    @property
    def sketcher(self) -> Sketcher: ...

    def audited_hops(self) -> Sequence[AuditedHop]:
        """In the order of their blocks; empty while the chain is not whole."""

    def ends_with_blocks(self, end_block: int) -> bool:
        """Whether results come from the hop with this end."""

    def own_inputs(self, length: int) -> WireTensor | None:
        """What the first hop was given; None when it is not kept, or rows were reordered."""

    def results_before(self, length: int) -> tuple[NDArray[np.intp], Floats]:
        """Positions below ``length`` whose results came back, and their sketches
        ``[rows, positions, 64]``."""

    async def collect_receipts(self, timeout_s: float) -> None:
        """Vouch for everything, so that receipts bind everything."""
