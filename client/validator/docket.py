"""Whom a validator challenges next, and what its findings amount to: pure.

The rules:

- An ordinary challenge goes through a node drawn by lot, the more likely the longer we have not
  challenged it, so that each is met in the end and none knows when.
- A node that failed a segment, or with which others disagree, is a *suspect*: it is challenged
  again soon. After a second failed segment the operator keeps it out, and we ask no more of it.
- A node that others have accused and that the operator keeps out is *rechecked* by challenges of
  our own. Two failed segments confirm it; ten right ones and no failed one say that it was not
  reproduced. Either way it is for the operator and others then.
- What was not measured (nothing shown, no second opinion) is no verdict.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum

from swarm.ledger.reputation import Found
from swarm.protocol.identity import PeerId

FAILED_FOR_VERDICT = 2
"""Different segments, as the operator counts them."""
RIGHT_FOR_SUSPECT = 5
"""After so many right ones in a row a suspect is a node like others."""
RIGHT_FOR_RECHECK = 10
"""So many and no failed one: what others have found cannot be reproduced."""
MISSES = 4
"""Challenges in a row that did not meet their target."""
REST_S = 3600.0
"""A target that was missed so often is left alone for this long."""
LONGEST_UNSEEN_S = 24 * 3600.0
"""Of nodes that were not challenged for longer none is more urgent than another."""
MOST_NODES = 8192


class Case(Enum):
    """Why a node is looked at more than others."""

    SUSPECT = "suspect"
    RECHECK = "recheck"
    ACCUSED = "accused"
    """We have found two failed segments: it is for the operator and others now."""
    CLEARED = "cleared"
    """We could not reproduce what others have found: so is this."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a validator remembers of one node."""

    challenged_unix_s: float = 0.0
    case: str = ""
    """Value of a :class:`Case`, or empty."""
    failed: int = 0
    right: int = 0
    """Of the case: failed segments, and right ones since the last failed one."""
    misses: int = 0
    rests_until_unix_s: float = 0.0

    @property
    def is_open(self) -> bool:
        """Whether it is to be challenged soon."""
        return self.case in (Case.SUSPECT.value, Case.RECHECK.value)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Known:
        """Of our own file; raises ValueError for anything else."""
        try:
            return cls(**json.loads(text))
        except TypeError as error:
            raise ValueError("no state of a validator") from error


@dataclass(frozen=True, slots=True)
class Target:
    """A node that the next challenge shall go through."""

    node: PeerId
    case: Case | None = None


class Docket:
    """What one validator knows, and what follows from it."""

    def __init__(self, known: Mapping[PeerId, Known] | None = None) -> None:
        self._known = dict(known or {})

    def of(self, node: PeerId) -> Known:
        return self._known.get(node, Known())

    def open_cases(self, announced: Sequence[PeerId], now_unix_s: float) -> list[PeerId]:
        """Those of the announced nodes that are to be challenged soon."""
        return [
            node
            for node in announced
            if self.of(node).is_open and self.of(node).rests_until_unix_s <= now_unix_s
        ]

    @property
    def told(self) -> list[PeerId]:
        """Nodes of which we have found enough, and which the operator has not decided about."""
        ours = (Case.ACCUSED.value, Case.CLEARED.value)
        return sorted(node for node, known in self._known.items() if known.case in ours)

    def rechecks(self, quarantined: Collection[PeerId]) -> list[PeerId]:
        """The operator's list, without what is ours: new ones become cases, those that are not on
        it any more are closed. Returns the nodes whose state has changed."""
        changed = []
        for node in quarantined:
            known = self.of(node)
            if not known.case or known.case == Case.SUSPECT.value:
                # A suspect's failed segments are ours: they count as the first of the recheck.
                self._known[node] = replace(known, case=Case.RECHECK.value, right=0)
                changed.append(node)
        for node, known in list(self._known.items()):
            if known.case == Case.RECHECK.value and node not in quarantined:
                self._known[node] = _closed(known)
                changed.append(node)
        return changed

    def next_target(
        self,
        announced: Sequence[PeerId],
        now_unix_s: float,
        dice: random.Random,
        *,
        only_cases: bool = False,
    ) -> Target | None:
        """Of the nodes that are announced and may be judged; None when there is nobody to look at.

        Cases go first, whichever was challenged longest ago.
        """
        awake = [node for node in announced if self.of(node).rests_until_unix_s <= now_unix_s]
        cases = self.open_cases(announced, now_unix_s)
        if cases:
            first = min(cases, key=lambda node: (self.of(node).challenged_unix_s, node))
            return Target(first, Case(self.of(first).case))
        others = sorted(node for node in awake if not self.of(node).case)
        if only_cases or not others:
            return None
        unseen_s = [
            min(LONGEST_UNSEEN_S, max(1.0, now_unix_s - self.of(node).challenged_unix_s))
            for node in others
        ]
        return Target(dice.choices(others, unseen_s)[0])

    def missed(self, node: PeerId, now_unix_s: float) -> None:
        """A challenge was meant for it and went another way, or none at all."""
        known = replace(self.of(node), misses=self.of(node).misses + 1)
        if known.misses >= MISSES:
            known = replace(known, misses=0, rests_until_unix_s=now_unix_s + REST_S)
        self._note(node, known)

    def found(
        self, node: PeerId, found: Found, now_unix_s: float, *, is_measured: bool
    ) -> str | None:
        """Note a finding; returns what the verdict says of it, None for no verdict.

        ``is_measured``: there is evidence that others can be shown.
        """
        known = replace(self.of(node), challenged_unix_s=now_unix_s, misses=0)
        outcome = None
        match found:
            case Found.PASSED if is_measured:
                known, outcome = _right(known)
            case Found.FAILED if is_measured:
                known, outcome = _failed(known), "failed"
            case Found.FAILED | Found.DISPUTED if not known.case:
                known = replace(known, case=Case.SUSPECT.value, failed=0, right=0)
        self._note(node, known)
        return outcome

    def decided(self, node: PeerId) -> None:
        """A node that we have judged is no longer kept out: it was revoked, or is free."""
        self._known[node] = _closed(self.of(node))

    def _note(self, node: PeerId, known: Known) -> None:
        self._known[node] = known
        while len(self._known) > MOST_NODES:
            # new identities are free: those without a case that we met longest ago go first
            oldest = min(
                self._known,
                key=lambda each: (bool(self.of(each).case), self.of(each).challenged_unix_s),
            )
            del self._known[oldest]


def _right(known: Known) -> tuple[Known, str]:
    right = known.right + 1
    if known.case == Case.RECHECK.value and right >= RIGHT_FOR_RECHECK and not known.failed:
        return replace(_closed(known), case=Case.CLEARED.value), "not_reproduced"
    wanted = RIGHT_FOR_RECHECK if known.case == Case.RECHECK.value else RIGHT_FOR_SUSPECT
    if known.is_open and right >= wanted:
        # One failed segment and many right ones confirm nothing: it stays with what was said.
        rests = known.case == Case.RECHECK.value
        return (_accused(known) if rests else _closed(known)), "passed"
    return replace(known, right=right if known.is_open else 0), "passed"


def _failed(known: Known) -> Known:
    failed = known.failed + 1 if known.case else 1
    if failed >= FAILED_FOR_VERDICT:
        return _accused(known)
    return replace(known, case=known.case or Case.SUSPECT.value, failed=failed, right=0)


def _accused(known: Known) -> Known:
    return replace(known, case=Case.ACCUSED.value, failed=0, right=0)


def _closed(known: Known) -> Known:
    return replace(known, case="", failed=0, right=0)
