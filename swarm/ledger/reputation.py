"""What a client knows of nodes by its own audits: how often to look, and whom to avoid. Pure.

The rule, which routing follows:

- A node is audited at every segment until ten in a row were right, then with probability
  ``max(0.05, 1 / clean)``: without the floor a node could behave until nobody looks.
- One failed segment: last resort, like a node that let a session down, and every segment audited.
- Two different failed segments: quarantine. The node is not used at all for 30 days, and begins
  anew after that.
- Disputes, where it cannot be told who is wrong: last resort after two different opponents,
  quarantine after four. Who lies meets new opponents; who is lied about meets few.
- Three refusals in a row to show what it handled: last resort until it shows something.

It is never shared with others, which would let anybody shut out anybody.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum

from swarm.protocol.identity import PeerId

CLEAN_BEFORE_SAMPLING = 10
AUDIT_FLOOR = 0.05
FAILURES_FOR_QUARANTINE = 2
OPPONENTS_FOR_LAST_RESORT = 2
OPPONENTS_FOR_QUARANTINE = 4
REFUSALS_FOR_LAST_RESORT = 3
QUARANTINE_S = 30 * 24 * 3600
MOST_NODES = 4096


class Found(Enum):
    """What an audit of one node in one session found."""

    PASSED = "passed"
    FAILED = "failed"
    DISPUTED = "disputed"
    """It and a neighbour, or it and the only replica, contradict each other."""
    REFUSED = "refused"
    """It did not show what it had handled."""


class Standing(Enum):
    """How routing treats a node."""

    USABLE = "usable"
    LAST_RESORT = "failed an audit"
    QUARANTINED = "quarantined after failed audits"


@dataclass(frozen=True, slots=True)
class NodeReputation:
    """The audits of one node."""

    audits: int = 0
    clean: int = 0
    """Right ones since the last wrong one."""
    failed_segments: tuple[str, ...] = ()
    disputed_with: tuple[str, ...] = ()
    refusals: int = 0
    """Since it showed something for the last time."""
    quarantined_until_unix_s: int = 0

    def standing(self, now_unix_s: float) -> Standing:
        if now_unix_s < self.quarantined_until_unix_s:
            return Standing.QUARANTINED
        if (
            self.failed_segments
            or len(self.disputed_with) >= OPPONENTS_FOR_LAST_RESORT
            or self.refusals >= REFUSALS_FOR_LAST_RESORT
        ):
            return Standing.LAST_RESORT
        return Standing.USABLE

    def audit_probability(self) -> float:
        """For the next segment."""
        if self.clean < CLEAN_BEFORE_SAMPLING or self.failed_segments or self.disputed_with:
            return 1.0
        return max(AUDIT_FLOOR, 1.0 / self.clean)

    def after(
        self, found: Found, *, segment: str, other: str = "", now_unix_s: float
    ) -> NodeReputation:
        """With one more finding. ``segment`` names what was looked at, ``other`` the opponent."""
        base = self
        if 0 < self.quarantined_until_unix_s <= now_unix_s:
            base = NodeReputation()  # it has served its time
        failed, disputed = base.failed_segments, base.disputed_with
        clean, refusals, until = base.clean, 0, base.quarantined_until_unix_s
        match found:
            case Found.PASSED:
                clean += 1
                if clean >= CLEAN_BEFORE_SAMPLING:
                    failed = disputed = ()
            case Found.FAILED:
                clean = 0
                failed = failed if segment in failed else (*failed, segment)
            case Found.DISPUTED:
                clean = 0
                disputed = disputed if other in disputed else (*disputed, other)
            case Found.REFUSED:
                refusals = base.refusals + 1
        if len(failed) >= FAILURES_FOR_QUARANTINE or len(disputed) >= OPPONENTS_FOR_QUARANTINE:
            until = int(now_unix_s) + QUARANTINE_S
        return NodeReputation(base.audits + 1, clean, failed, disputed, refusals, until)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> NodeReputation:
        """Of our own books; raises ValueError for anything else."""
        content = json.loads(text)
        for name in ("failed_segments", "disputed_with"):
            content[name] = tuple(content[name])
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError("no reputation") from error


class Reputations:
    """The nodes that one client has audited."""

    def __init__(self, known: Mapping[PeerId, NodeReputation] | None = None) -> None:
        self._of_peer = dict(known or {})

    def of(self, peer: PeerId) -> NodeReputation:
        return self._of_peer.get(peer, NodeReputation())

    def standing(self, peer: PeerId, now_unix_s: float) -> Standing:
        return self.of(peer).standing(now_unix_s)

    def found(
        self, peer: PeerId, found: Found, *, segment: str, other: str = "", now_unix_s: float
    ) -> NodeReputation:
        """Note a finding; the node's reputation from now on."""
        after = self.of(peer).after(found, segment=segment, other=other, now_unix_s=now_unix_s)
        self._of_peer.pop(peer, None)
        self._of_peer[peer] = after
        while len(self._of_peer) > MOST_NODES:
            # new identities are free: those that passed fewest audits go first
            least = min(self._of_peer, key=lambda each: self._of_peer[each].clean)
            del self._of_peer[least]
        return after

    @property
    def peers(self) -> list[PeerId]:
        """All that were looked at, those looked at last at the end."""
        return list(self._of_peer)
