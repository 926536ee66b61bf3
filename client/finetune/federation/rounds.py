"""What an aggregator accepts, from whom and when. Pure: no clock, no random source, no I/O.

Rules:

1. A round has phases in a fixed order; a message counts in its phase and under the round's id only,
   so that none can be repeated elsewhere. Every attempt at a round has an id of its own.
2. From each participant one message per phase. The same one again changes nothing (its answer may
   have been lost); another one is refused.
3. A phase ends when all from whom a message is due have answered, or at its deadline. Who has not
   answered by then has dropped out of the attempt.
4. With enough of them the round goes on, otherwise it is attempted again without waiting for those
   who dropped out. ``ADVERTISE`` alone is never given up: people train there, and it waits on.
5. A sum of fewer than the minimum is never asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from enum import StrEnum

from swarm.client.finetune.secure_sum import (
    Advertised,
    Aggregator,
    Unmasking,
    Words,
    threshold_of,
)
from swarm.protocol.errors import ErrorCode, NoRouteError, ProtocolError
from swarm.protocol.identity import PeerId

log = logging.getLogger(__name__)

ROUND_ID_BYTES = 16
MAX_ATTEMPTS = 20

Message = Advertised | Mapping[PeerId, bytes] | Words | Unmasking


class Phase(StrEnum):
    """What is being collected."""

    ADVERTISE = "advertise"
    SHARE = "share"
    MASKED = "masked"
    UNMASK = "unmask"
    SUM = "sum"
    """Nothing: the aggregator adds up."""
    DONE = "done"
    """Nothing: the last round is over."""


class Round:
    """One round, in as many attempts as it takes. Times are seconds of a clock that only rises."""

    def __init__(
        self,
        invited: Collection[PeerId],
        minimum: int,
        length: int,
        *,
        train_s: float,
        answer_s: float,
    ) -> None:
        self._invited = frozenset(invited)
        self._minimum = minimum
        self._length = length
        self._train_s = train_s
        self._answer_s = answer_s
        self._unmaskings: dict[PeerId, Unmasking] = {}
        self._taken: dict[tuple[PeerId, Phase], str] = {}
        self._due: frozenset[PeerId] = frozenset()
        self.attempts = 0
        self.phase = Phase.DONE
        self.round_id = b""
        self.deadline_s = 0.0
        self.aggregator = Aggregator(b"", (), 0)

    def begin(self, round_id: bytes, now_s: float) -> None:
        """The first attempt: everybody is expected."""
        self._attempt(round_id, self._invited, now_s + self._train_s)

    @property
    def answered(self) -> int:
        """How many have, in this phase."""
        return len(self._answered())

    @property
    def due(self) -> int:
        """From how many an answer is due in this phase."""
        return len(self._due)

    def is_known(self, peer: PeerId, phase: Phase, round_id: bytes, digest: str) -> bool:
        """Whether this message was taken already; asked before its body is read.

        Raises ProtocolError for one that would not be taken: NOT_NAMED_BY_SESSION, NOT_VALID_NOW
        (the phase is over, or another one's turn), EQUIVOCATION (a second, other one).
        """
        if peer not in self._invited:
            raise ProtocolError(ErrorCode.NOT_NAMED_BY_SESSION, "not invited")
        if round_id != self.round_id:
            raise ProtocolError(ErrorCode.NOT_VALID_NOW, "another round, or another attempt")
        taken = self._taken.get((peer, phase))
        if taken is not None:
            if taken != digest:
                raise ProtocolError(ErrorCode.EQUIVOCATION, f"a second {phase}")
            return True
        if phase is not self.phase:
            raise ProtocolError(ErrorCode.NOT_VALID_NOW, f"{phase} while it is {self.phase}")
        if phase is not Phase.ADVERTISE and peer not in self._due:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "dropped out of this attempt")
        return False

    def take(
        self,
        peer: PeerId,
        phase: Phase,
        round_id: bytes,
        digest: str,
        message: Message,
        now_s: float,
    ) -> None:
        """Count ``message``, whose body has the hash ``digest``. Raises ProtocolError."""
        if self.is_known(peer, phase, round_id, digest):
            return
        if now_s >= self.deadline_s:
            raise ProtocolError(ErrorCode.NOT_VALID_NOW, "too late")
        match phase, message:
            case Phase.ADVERTISE, Advertised() if message.peer == peer:
                self.aggregator.add_keys(message)
            case Phase.SHARE, Mapping():
                self.aggregator.add_shares(peer, message)
            case Phase.MASKED, _ if not isinstance(message, Advertised | Mapping | Unmasking):
                self.aggregator.add_masked(peer, message)
            case Phase.UNMASK, Unmasking():
                self.aggregator.check_unmasking(peer, message)
                self._unmaskings[peer] = message
            case _:
                raise ProtocolError(ErrorCode.BAD_FIELD, "a message of another phase")
        self._taken[peer, phase] = digest

    def advance(self, now_s: float, fresh_id: bytes) -> bool:
        """Go on if it is time; True when the phase or the attempt has changed.

        ``fresh_id`` is the id of the next attempt, if there has to be one. Raises NoRouteError
        after too many attempts.
        """
        if self.phase in (Phase.SUM, Phase.DONE):
            return False
        answered = self._answered()
        is_over = now_s >= self.deadline_s
        if not (self._due <= answered or is_over):
            return False
        if len(answered) >= self._needed():
            self._enter(_NEXT[self.phase], answered, now_s + self._answer_s)
            return True
        if self.phase is Phase.ADVERTISE:
            # Those who are there are too few by themselves: the others are waited for (again).
            log.info("%d are there, %d are needed", len(answered), self._needed())
            self._due, self.deadline_s = self._invited, now_s + self._train_s
            return False
        log.info("%s: %d answered, %d are needed", self.phase, len(answered), self._needed())
        self.repeat(answered, now_s, fresh_id)
        return True

    def total(self) -> Words:
        """The sum, in the phase ``SUM``; takes seconds for long vectors.

        Raises ProtocolError when the shares are not of one secret.
        """
        return self.aggregator.total(self._unmaskings)

    def repeat(self, awaited: Collection[PeerId], now_s: float, fresh_id: bytes) -> None:
        """Another attempt, in which ``awaited`` are waited for. Raises NoRouteError."""
        if self.attempts >= MAX_ATTEMPTS:
            raise NoRouteError(f"the round has failed {MAX_ATTEMPTS} times; start again to retry")
        self._attempt(fresh_id, frozenset(awaited), now_s + self._answer_s)

    @property
    def stayed(self) -> frozenset[PeerId]:
        """Who is in the sum."""
        return frozenset(self.aggregator.stayed())

    def _attempt(self, round_id: bytes, due: frozenset[PeerId], deadline_s: float) -> None:
        self.attempts += 1
        self.round_id = round_id
        self.aggregator = Aggregator(round_id, self._invited, self._length)
        self._taken.clear()
        self._unmaskings.clear()
        self._enter(Phase.ADVERTISE, due, deadline_s)

    def _enter(self, phase: Phase, due: frozenset[PeerId], deadline_s: float) -> None:
        self.phase, self._due, self.deadline_s = phase, due, deadline_s

    def _answered(self) -> frozenset[PeerId]:
        return frozenset(peer for peer, phase in self._taken if phase is self.phase)

    def _needed(self) -> int:
        """Masks can be taken away by more than half of those who advertised, and no fewer."""
        if self.phase is Phase.ADVERTISE:
            return self._minimum
        threshold = threshold_of(len(self.aggregator.all_keys()))
        return threshold if self.phase is Phase.UNMASK else max(self._minimum, threshold)


_NEXT = {
    Phase.ADVERTISE: Phase.SHARE,
    Phase.SHARE: Phase.MASKED,
    Phase.MASKED: Phase.UNMASK,
    Phase.UNMASK: Phase.SUM,
}
