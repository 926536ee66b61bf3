"""When is a node dead for everybody, and not only for one who cannot reach it? Pure.

A record in the directory lives for minutes after its node died. Nodes that watch each other
(``swarm.buddies``) therefore testify: each witness signs which nodes it lost. Whoever reads the
directory decides by these rules whether it believes them:

- Two witnesses of different organisations, where the swarm has more than one; nodes that name no
  organisation count as one each. Witnesses must host blocks of the same model themselves.
- A testimony is about one record, by its sequence number. A newer record of the lost node ends it,
  and a node that hears that it is dead announces itself at once. Sequence numbers are milliseconds,
  so a testimony about records of the future is recognised and counts for nothing.
- Whom a reader saw come back in this way, it does not take for dead again for ten minutes,
  whatever anybody says. So even with any number of invented witnesses, which nothing prevents in an
  open swarm, a living node can be silenced for a few seconds in ten minutes and no more.
- If more than half of the nodes were dead, nobody is: rather the witnesses are cut off from the
  rest, or invented. What really died then goes when its record expires.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from swarm.protocol.identity import PeerId
from swarm.protocol.records import NodeRecord, TombstoneRecord

WITNESSES = 2
IMMUNITY_S = 600.0
BELIEVABLE_SHARE = 0.5
"""Of the known nodes may be dead at once."""
CLOCK_TOLERANCE_S = 10.0

Accusations = Mapping[PeerId, Mapping[PeerId, int]]
"""By accused node: its witnesses, and the sequence number of the record that each speaks of."""


def accusations(
    testimonies: Iterable[TombstoneRecord],
    nodes: Mapping[PeerId, NodeRecord],
    now_unix_s: float,
) -> Accusations:
    """Who says of which known node that it is dead, and with which record it died."""
    latest = (now_unix_s + CLOCK_TOLERANCE_S) * 1000
    witnesses: dict[PeerId, dict[PeerId, int]] = {}
    for testimony in testimonies:
        if testimony.peer_id not in nodes:
            continue
        for name, sequence in zip(testimony.lost_peers, testimony.lost_sequences, strict=True):
            lost = nodes.get(PeerId(name))
            if lost is not None and lost.sequence <= sequence <= latest:
                witnesses.setdefault(lost.peer_id, {})[testimony.peer_id] = sequence
    return witnesses


def lost_nodes(accused: Accusations, nodes: Mapping[PeerId, NodeRecord]) -> set[PeerId]:
    """Those among the accused that have witnesses enough."""
    organisations = {_organisation(nodes[peer]) for peer in nodes if peer not in accused}
    needed = min(WITNESSES, len(organisations))
    lost = {
        peer
        for peer, witnesses in accused.items()
        if len(witnesses) >= WITNESSES
        and len({_organisation(nodes[witness]) for witness in witnesses}) >= needed
    }
    return lost if len(lost) <= BELIEVABLE_SHARE * len(nodes) else set()


def _organisation(record: NodeRecord) -> str:
    return f"o {record.organisation}" if record.organisation else f"p {record.peer_id}"


class Tombstones:
    """Whom one reader takes for dead; remembers who came back."""

    def __init__(self) -> None:
        self._lost: dict[PeerId, int] = {}  # and the newest record that was named at first
        self._immune_until_s: dict[PeerId, float] = {}
        self.accused: Accusations = {}
        """Whether the witnesses suffice or not."""

    @property
    def lost(self) -> Collection[PeerId]:
        return self._lost.keys()

    def update(
        self,
        testimonies: Iterable[TombstoneRecord],
        nodes: Mapping[PeerId, NodeRecord],
        *,
        now_s: float,
        now_unix_s: float,
    ) -> None:
        """Judge again, by all testimonies and records that are known; ``now_s`` is monotonic."""
        for peer, sequence in self._lost.items():
            # Whatever is said meanwhile: a record after the first testimonies is a sign of life.
            if peer in nodes and nodes[peer].sequence > sequence:
                self._immune_until_s[peer] = now_s + IMMUNITY_S
        self._immune_until_s = {
            peer: until_s for peer, until_s in self._immune_until_s.items() if until_s > now_s
        }
        self.accused = accusations(testimonies, nodes, now_unix_s)
        self._lost = {
            peer: self._lost.get(peer, max(self.accused[peer].values()))
            for peer in lost_nodes(self.accused, nodes)
            if peer not in self._immune_until_s
        }
