"""What a client does when hops are missing, for how long, and how it says that it failed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from swarm.client.hops import JOINT_GRACE_S, Hops, NothingToReplay, Resumption
from swarm.client.link import HopFailed, Link
from swarm.client.planner import Planner
from swarm.client.steps import Steps
from swarm.ports import Clock
from swarm.protocol.errors import ErrorCode, NetworkError, NoRouteError, SwarmError
from swarm.protocol.identity import PeerId
from swarm.routing import block_ranges

OPEN_ATTEMPTS = 4
"""Hops that may refuse or be gone before a new session is given up."""
OPEN_S = 2.0
"""For nodes to turn up, where a new session would find blocks without a host: one that was seen to
join a moment ago may be ready, and one that could not be reached may only have been busy."""
OPEN_OFFLINE_S = 30.0
"""The same while nobody at all answers. Shorter than for a session that has begun: there is nothing
to lose yet, and where all nodes are gone for good its user should hear of it."""
HEAL_ATTEMPTS = 16
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 2.0
REACHED_AGAIN_S = 15.0
"""After an outage of our own: libp2p does not dial a peer for 5 s and more after it failed to."""
LOOK_S = 0.5
"""Between two looks whether anybody answers; a look in vain takes seconds."""
MENDS_WITHOUT_RESULT = 3
_NO_ROOM = (ErrorCode.NO_CAPACITY, ErrorCode.TOO_MANY_SESSIONS, ErrorCode.ADAPTER_NO_ROOM)


class Patience:
    """How often and for how long a gap is tried to be filled."""

    def __init__(
        self,
        clock: Clock,
        heal_s: float,
        offline_s: float,
        attempts: int,
        deadline: asyncio.Timeout | None = None,
    ) -> None:
        """``deadline``: moved on by the time for which our own network was gone."""
        self.attempts = attempts
        self._deadline = deadline
        self._clock = clock
        self._heal_s = heal_s
        self._offline_s = offline_s
        self._started_s = clock.monotonic_s()
        self._gives_up_s = self._started_s + heal_s
        self._pause_s = FIRST_PAUSE_S
        self._is_last_round = False
        self._tried_s = self._started_s
        """When the latest attempt began."""

    @classmethod
    def to_open(cls, clock: Clock, deadline: asyncio.Timeout) -> Patience:
        """A new session fails soon, so that its user may choose what to do."""
        return cls(clock, OPEN_S, OPEN_OFFLINE_S, OPEN_ATTEMPTS, deadline)

    async def wait(self, planner: Planner) -> bool:
        """Wait a moment for nodes to turn up; False when that has taken too long already."""
        outage_ended = await self.outage_ended(planner)
        now_s = self._clock.monotonic_s()
        if now_s < self._gives_up_s and not outage_ended:
            await self._clock.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        elif not outage_ended:
            if self._is_last_round or now_s >= self._started_s + self._offline_s:
                return False
            # Perhaps it has just ended: whoever could not be reached before is tried once more,
            # and for the usual time if the latest attempt was stuck for longer than that.
            self._is_last_round = True
            if now_s - self._tried_s > self._heal_s:
                self._gives_up_s = now_s + self._heal_s
        self._tried_s = self._clock.monotonic_s()
        return True

    async def outage_ended(self, planner: Planner) -> bool:
        """Wait while nobody at all answers: it is our own network then, and it may come back.

        True when it was gone and is back; everybody has some time to be reached again.
        """
        was_offline = False
        counted_s = self._tried_s
        while self._clock.monotonic_s() < self._started_s + self._offline_s:
            if await planner.is_online():
                if was_offline:
                    self._gives_up_s = self._clock.monotonic_s() + REACHED_AGAIN_S
                return was_offline
            was_offline = True
            await self._clock.sleep(LOOK_S)
            now_s = self._clock.monotonic_s()
            if self._deadline is not None and (when_s := self._deadline.when()) is not None:
                self._deadline.reschedule(when_s + now_s - counted_s)
            counted_s = now_s
        return False


class Healer:
    """Fills the gaps of one chain and mends its joints."""

    def __init__(
        self,
        hops: Hops,
        steps: Steps,
        planner: Planner,
        *,
        clock: Clock,
        count_failure: Callable[[HopFailed], None],
    ) -> None:
        self._hops = hops
        self._steps = steps
        self._planner = planner
        self._clock = clock
        self._count_failure = count_failure
        self._broken_joints: set[Link] = set()

    def break_joint(self, link: Link) -> None:
        """``link`` needs a new stream from the hop before it."""
        self._broken_joints.add(link)

    def forget(self, link: Link) -> None:
        """A hop that is lost has no joint to be mended."""
        self._broken_joints.discard(link)

    async def heal(self, patience: Patience, *, opening: bool) -> None:
        """Make the chain whole. Raises NoRouteError that says what was tried."""
        hops = self._hops
        failures: list[HopFailed] = []
        excluded: list[PeerId] = []
        while True:
            gap = hops.first_gap
            if gap is None and not self._broken_joints:
                return
            try:
                if gap is not None:
                    await self._fill(gap, excluded)
                else:
                    await self._mend(self._broken_joints.pop())
            except HopFailed as error:
                failures.append(error)
                excluded.append(error.peer_id)
                self._count_failure(error)
                hops.give_up(error)
                if len(failures) >= patience.attempts:
                    if not await patience.outage_ended(self._planner):
                        raise _unhealed(gap, failures, None, opening=opening) from error
                    failures.clear()
                    excluded.clear()
            except (NoRouteError, NetworkError) as error:
                is_full = isinstance(error, NoRouteError) and error.retry_after_ms > 0
                if (is_full and opening) or not await patience.wait(self._planner):
                    raise _unhealed(gap, failures, error, opening=opening) from error
                excluded.clear()  # they may be back, or were not to blame
            except NothingToReplay as error:
                raise _unhealed(gap, failures, error, opening=opening) from error

    async def _fill(self, gap: tuple[int, int], excluded: Sequence[PeerId]) -> None:
        hops, steps = self._hops, self._steps
        resume = Resumption.of(steps.session)
        fresh = await hops.fill(*gap, resume, steps.journal, excluded)
        # Their streams are all new; so is that to the hop behind the gap.
        self._broken_joints.difference_update(fresh)
        following = hops.following(fresh[-1])
        if following is not None:
            self._broken_joints.discard(following)
        if gap[0] == 0:
            for step in steps.sent_since(resume.step):
                try:
                    await fresh[0].connection.send(step)
                except NetworkError as error:
                    raise HopFailed(fresh[0].hop, error) from error

    async def _mend(self, link: Link) -> None:
        """Give ``link`` a new stream from the hop before, unless one of them turns out gone."""
        await self._clock.sleep(JOINT_GRACE_S)
        before = self._hops.previous_of(link) if link.failure is None else None
        if before is None:
            return
        link.mended += 1
        if link.mended > MENDS_WITHOUT_RESULT:
            reason = NetworkError("cannot be joined to the hop before")
            raise self._hops.blame.joint(before, link, reason)
        await self._hops.join_again(before, link, self._steps.session.resume_step)


def _unhealed(
    gap: tuple[int, int] | None,
    failures: Sequence[HopFailed],
    last: SwarmError | None,
    *,
    opening: bool,
) -> SwarmError:
    return could_not_open(failures, last) if opening else could_not_heal(gap, failures, last)


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
    if len(blocks) == 1:
        text = f"block {blocks[0]} is lost"
    elif blocks:
        text = f"blocks {block_ranges(blocks)} are lost"
    else:
        text = "two hops lost their connection"
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
