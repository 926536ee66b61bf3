"""What a client tries when hops are missing, for how long, and how it says that it failed."""

from __future__ import annotations

from collections.abc import Sequence

from swarm.client.link import HopFailed
from swarm.client.planner import Planner
from swarm.ports import Clock
from swarm.protocol.errors import ErrorCode, NoRouteError, SwarmError
from swarm.routing import block_ranges

OPEN_ATTEMPTS = 4
"""Hops that may refuse or be gone before a new session is given up."""
OPEN_S = 2.0
"""For nodes to turn up, where a new session would find blocks without a host: one that was seen to
join a moment ago may be ready, and one that could not be reached may only have been busy."""
HEAL_ATTEMPTS = 16
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 2.0
_NO_ROOM = (ErrorCode.NO_CAPACITY, ErrorCode.TOO_MANY_SESSIONS)


class Patience:
    """How often and for how long a gap is tried to be filled."""

    def __init__(self, clock: Clock, heal_s: float, offline_s: float, attempts: int) -> None:
        self.attempts = attempts
        self._clock = clock
        self._heal_s = heal_s
        self._offline_s = offline_s
        self._started_s = clock.monotonic_s()
        self._gives_up_s = self._started_s + heal_s
        self._pause_s = FIRST_PAUSE_S
        self._is_last_round = False

    @classmethod
    def to_open(cls, clock: Clock) -> Patience:
        """A new session fails soon, so that its user may choose what to do."""
        return cls(clock, OPEN_S, OPEN_S, OPEN_ATTEMPTS)

    async def wait(self, planner: Planner) -> bool:
        """Wait a moment for nodes to turn up; False when that has taken too long already.

        As long as nobody at all answers, it is our own network that is gone, and it may come back.
        """
        now_s = self._clock.monotonic_s()
        if now_s >= self._gives_up_s:
            if self._is_last_round or now_s >= self._started_s + self._offline_s:
                return False
            if await planner.is_online():
                # Perhaps only just: whoever could not be reached before is tried once more.
                self._is_last_round = True
                return True
            self._gives_up_s = self._clock.monotonic_s() + self._heal_s
        await self._clock.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return True


def could_not_open(failures: Sequence[HopFailed], last: SwarmError | None) -> SwarmError:
    """One error that says what was tried; `no room` keeps its hint when to come back."""
    if not failures and last is not None:
        return last
    reasons = _reasons(failures)
    retry_after_ms = max((failure.retry_after_ms for failure in failures), default=0)
    if all(failure.code in _NO_ROOM for failure in failures):
        hint = f"; retry in {retry_after_ms / 1000:.0f} s" if retry_after_ms else ""
        text = f"no room for this session now{hint} ({reasons})"
    else:
        text = f"no chain could be opened: {reasons}"
        if last is not None:
            text += f"; without these nodes, {last}"
    return NoRouteError(
        text,
        missing_blocks=last.missing_blocks if isinstance(last, NoRouteError) else (),
        retry_after_ms=retry_after_ms,
    )


def could_not_heal(
    gap: tuple[int, int] | None, failures: Sequence[HopFailed], last: SwarmError | None
) -> NoRouteError:
    """Which blocks are lost, and what was tried to replace them."""
    blocks = tuple(range(*gap)) if gap is not None else ()
    if isinstance(last, NoRouteError) and last.missing_blocks:
        blocks = last.missing_blocks
    text = f"blocks {block_ranges(blocks)} are lost" if blocks else "two hops lost their connection"
    if last is not None:
        text += f": {last}"
    if failures:
        text += f"; tried: {_reasons(failures)}"
    return NoRouteError(
        f"{text}. What was generated so far is kept: resume when nodes with these blocks are back",
        missing_blocks=blocks,
        retry_after_ms=max((failure.retry_after_ms for failure in failures), default=0),
    )


def _reasons(failures: Sequence[HopFailed]) -> str:
    return "; ".join(dict.fromkeys(str(failure) for failure in failures))
