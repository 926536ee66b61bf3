"""Directory records by which charters and revocations reach everybody.

Any peer may bring them: what counts is the authority's signature inside. How records are signed,
checked and stored: ``records``.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarm.protocol.errors import ProtocolError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import MAX_STEP, PEER, SWARM_ID_BYTES, Bytes, Uint, wire
from swarm.protocol.passport import (
    MAX_CHARTER_BYTES,
    MAX_REVOCATION_PAGE_BYTES,
    MAX_REVOCATION_PAGES,
    RevocationPage,
    open_charter,
    unseal,
)


@dataclass(frozen=True, slots=True)
class CharterRecord:
    """The swarm's charter, for those who have none or an older one."""

    peer_id: PeerId = wire(1, PEER)
    sequence: int = wire(2, Uint(MAX_STEP))
    expires_unix_s: int = wire(3, Uint(MAX_STEP))
    charter: bytes = wire(4, Bytes(1, MAX_CHARTER_BYTES))

    @property
    def key(self) -> str:
        return charter_key()

    def problem(self) -> str:
        """What is wrong with it; empty if nothing is."""
        try:
            open_charter(self.charter)
        except ProtocolError as error:
            return error.detail
        return ""


@dataclass(frozen=True, slots=True)
class RevocationRecord:
    """One page of a swarm's revocation list."""

    peer_id: PeerId = wire(1, PEER)
    swarm_id: bytes = wire(2, Bytes(SWARM_ID_BYTES, SWARM_ID_BYTES))
    page: int = wire(3, Uint(MAX_REVOCATION_PAGES - 1))
    sequence: int = wire(4, Uint(MAX_STEP))
    expires_unix_s: int = wire(5, Uint(MAX_STEP))
    content: bytes = wire(6, Bytes(1, MAX_REVOCATION_PAGE_BYTES))

    @property
    def key(self) -> str:
        return revocations_key(self.swarm_id, self.page)

    def problem(self) -> str:
        """What is wrong with it; empty if nothing is."""
        try:
            page, _ = unseal(RevocationPage, self.swarm_id, self.content)
        except ProtocolError as error:
            return error.detail
        return "" if page.page == self.page < page.pages else "it is another page"


def charter_key() -> str:
    """Directory key of the swarm's charter: the only one that strangers may read."""
    return "sovereign-swarm/v1/charter"


def revocations_key(swarm_id: bytes, page: int) -> str:
    """Directory key of one page of a swarm's revocation list."""
    return f"sovereign-swarm/v1/revocations/{swarm_id.hex()}/{page}"
