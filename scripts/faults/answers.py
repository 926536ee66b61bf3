"""What a session is asked, what it answers and when: judged against the undisturbed model."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, field

from scripts.faults.progress import WatchedChains
from swarm.protocol.identity import PeerId


@dataclass(frozen=True, slots=True)
class Task:
    """What a session is asked, and the answer of the undisturbed model."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    speculative: bool = False
    """Through transformers' ``generate`` with prompt lookup: steps of several tokens, rollbacks."""

    def variant(self, new_tokens: int, *, speculative: bool = False) -> Task:
        """The same question for a shorter answer, or by another way to the same answer."""
        return Task(self.prompt, self.answer[:new_tokens], speculative)


@dataclass(slots=True, eq=False)
class Session:
    """One generation and what came of it."""

    task: Task
    chains: WatchedChains
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    """When each token came, on the monotonic clock."""
    error: BaseException | None = None
    ended: bool = False

    @property
    def peers(self) -> frozenset[PeerId]:
        """The nodes that serve it now."""
        return self.chains.peers

    @property
    def is_right(self) -> bool:
        """Whether all tokens so far are those of the undisturbed model, none lost, none twice."""
        expected = self.task.answer
        if self.ended and self.error is None:
            return tuple(self.tokens) == expected
        return tuple(self.tokens) == expected[: len(self.tokens)]

    def stall_s(self, since_s: float) -> float | None:
        """The wait for the next token after a fault, or for the one after it if that was longer.

        The next one may have been on its way already, past the node that was hit. None when there
        was no token any more.
        """
        after = [at_s for at_s in self.times_s if at_s >= since_s][:2]
        if not after:
            return None
        return max(later - one for one, later in itertools.pairwise([since_s, *after]))

    def longest_step_s(self, since_s: float) -> float:
        """The longest wait for a token from a fault on; 0 when there was no token any more."""
        after = [at_s for at_s in self.times_s if at_s >= since_s]
        return max((b - a for a, b in itertools.pairwise([since_s, *after])), default=0.0)

    @property
    def median_step_s(self) -> float:
        """Between two tokens; 0 when there were fewer."""
        gaps = [b - a for a, b in itertools.pairwise(self.times_s)]
        return statistics.median(gaps) if gaps else 0.0
