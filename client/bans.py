"""Nodes that failed a client, and for how long it looks elsewhere first. Pure: time is passed in.

A ban belongs to one client and one kind of failure. It starts short, doubles with each further
failure of that kind, and is forgotten after one success or after a long time without failures. It
is never shared with others, which would let anybody shut out anybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from swarm.protocol.identity import PeerId

SHORTEST_S = 5.0
LONGEST_S = 600.0
MOST_PEERS = 4096
"""Of more, those whose bans ended first are forgotten; records of peers that never lived are free
to make, so their number must be bounded here."""


class FailureKind(Enum):
    """What a node did, as the client saw it; the value is how people read it."""

    UNREACHABLE = "could not be reached"
    SILENT = "stopped answering"
    BROKEN = "broke off"
    REFUSED = "refused"
    NO_ROOM = "had no room"
    WRONG = "answered wrongly"
    SLOW = "was far too slow"


@dataclass(slots=True)
class _Ban:
    length_s: float
    until_s: float


class Bans:
    """The bans of one client."""

    def __init__(self) -> None:
        self._of_peer: dict[PeerId, dict[FailureKind, _Ban]] = {}

    def failed(self, peer: PeerId, kind: FailureKind, now_s: float) -> None:
        """Count a failure. Several while a ban lasts are one: they have the same cause."""
        bans = self._of_peer.setdefault(peer, {})
        ban = bans.get(kind)
        if ban is None or now_s >= ban.until_s + LONGEST_S:
            bans[kind] = _Ban(SHORTEST_S, now_s + SHORTEST_S)
        elif now_s >= ban.until_s:
            length_s = min(2 * ban.length_s, LONGEST_S)
            bans[kind] = _Ban(length_s, now_s + length_s)
        if len(self._of_peer) > MOST_PEERS:
            ends_first = sorted(self._of_peer, key=self._until_s)
            for forgotten in ends_first[: MOST_PEERS // 2]:
                del self._of_peer[forgotten]

    def succeeded(self, peer: PeerId) -> None:
        """It served: whatever it did before is forgotten."""
        self._of_peer.pop(peer, None)

    def answered(self, peer: PeerId) -> None:
        """It is there and answers: that it did not before is forgotten, and nothing else."""
        bans = self._of_peer.get(peer)
        if bans is not None:
            bans.pop(FailureKind.UNREACHABLE, None)
            bans.pop(FailureKind.SILENT, None)
            if not bans:
                del self._of_peer[peer]

    def reason(self, peer: PeerId, now_s: float) -> FailureKind | None:
        """Why a peer is banned now, by the ban that lasts longest; None if it is not."""
        bans = self._of_peer.get(peer)
        if not bans:
            return None
        kind, ban = max(bans.items(), key=lambda item: item[1].until_s)
        return kind if ban.until_s > now_s else None

    def _until_s(self, peer: PeerId) -> float:
        return max(ban.until_s for ban in self._of_peer[peer].values())
