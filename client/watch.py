"""Notices that a hop of a live chain is gone, cut off, stuck or far slower than it was.

- Broken streams are noticed by their readers, not here.
- Silence: every hop is pinged; phi accrual makes a silent one suspect. Its neighbours in the chain
  are then asked to ping it. If nobody reaches it, it is gone; if they do, it gets more time.
- If *all* hops are silent and nobody else answers either, it is our own network that is gone:
  nobody is blamed, and nothing is given up.
- A step that stands still: pongs say which hop has received and computed what, so that the place
  is known. Between two hops, they are joined anew; in a hop, that hop is replaced.
- A straggler answers, but its steps take far longer than they did at their best, or than what it
  was chosen for, and those of the other hops do not. It is replaced if a better chain for its
  blocks is to be had, judged by how what was expected of the other hops has come true.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low

from swarm.client.hop_speed import HopSpeed
from swarm.client.hops import Hops
from swarm.client.link import HopFailed, Link
from swarm.client.planner import Planner
from swarm.ports import Clock
from swarm.protocol.errors import NetworkError, RemoteError, SwarmError
from swarm.protocol.messages import Ping, ProbePeer, ProbeReport
from swarm.protocol.session import ClientSession

log = logging.getLogger(__name__)

LONGEST_OWN_STALL_S = 0.5


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """When a client becomes impatient."""

    active_heartbeat_s: float = 0.4
    """Between pings while a step is on its way."""
    look_s: float = 0.1
    """Between looks at what the pings brought."""
    idle_heartbeat_s: float = 5.0
    suspicious_phi: float = 5.0
    probe_s: float = 1.5
    """For neighbours to say whether they reach a suspect."""
    reprieve_s: float = 6.0
    """How long a suspect may stay silent when others still reach it."""
    standstill_s: float = 2.0
    """For a step to be on its way between two hops, beside what the link usually takes."""
    slowest_step_s: float = 30.0
    """For one hop to compute one step, while nothing is known of its speed."""
    slowness: float = 20.0
    """So many times its usual time (and 5 s at least) may a hop take before it counts as stuck."""
    straggler: float = 3.0
    """So many times its best time, or the expected one, over several steps: look for better."""
    straggler_least_s: float = 0.05
    """Shorter steps are not worth a replacement."""
    straggler_gain: float = 0.5
    """What comes instead must take less than this share of the straggler's time."""
    straggler_look_s: float = 10.0
    """Between two looks for something better than a straggler."""
    straggler_pause_s: float = 60.0
    """After a replacement, and twice as long after each further one in a chain: where none of them
    helped, the next one hardly will."""


@dataclass(slots=True)
class _Standstill:
    """Where the oldest step is, and since when."""

    step: int
    link: Link | None
    received: bool
    since_s: float


class Watch:
    """Watches one chain; ``run`` is its task."""

    def __init__(
        self,
        hops: Hops,
        session: ClientSession,
        planner: Planner,
        *,
        clock: Clock,
        settings: WatchSettings,
        mend: Callable[[Link], None],
    ) -> None:
        """``mend`` is told of a hop to which steps do not come through any more."""
        self._hops = hops
        self._session = session
        self._planner = planner
        self._clock = clock
        self._settings = settings
        self._mend = mend
        self._awake = asyncio.Event()
        self._nonce = 0
        self._examined: set[Link] = set()
        self._standstill: _Standstill | None = None
        self._straggler_pause_s = settings.straggler_pause_s
        self._next_straggler_s = -math.inf
        self._looking_for_better = False
        self._is_offline = False

    def wake(self) -> None:
        """A step is on its way, or something else begins that should not take long."""
        self._awake.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._sleep_while_idle(tasks)
                self._begin_afresh()
                pinged_s = -math.inf
                while self._is_active:
                    now_s = self._clock.monotonic_s()
                    if now_s - pinged_s >= self._settings.active_heartbeat_s:
                        pinged_s = now_s
                        self._ping_all(tasks)
                    self._look_around(tasks, now_s)
                    await self._clock.sleep(self._settings.look_s)
                    if self._clock.monotonic_s() - now_s > LONGEST_OWN_STALL_S:
                        self._begin_afresh()

    @property
    def _is_active(self) -> bool:
        return self._session.oldest_in_flight is not None or self._hops.is_changing

    async def _sleep_while_idle(self, tasks: asyncio.TaskGroup) -> None:
        while not self._is_active:
            self._awake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.idle_heartbeat_s):
                    await self._awake.wait()
            if not self._is_active:
                self._ping_all(tasks)

    def _begin_afresh(self) -> None:
        """When this process was asleep, or begins to ask often, a silence so far says nothing."""
        self._standstill = None
        for link in self._hops.all_links:
            link.expect_signs(self._settings.active_heartbeat_s)

    def _ping_all(self, tasks: asyncio.TaskGroup) -> None:
        self._nonce += 1
        for link in self._hops.all_links:
            if not link.is_pinging:
                tasks.create_task(self._ping(link))

    def _look_around(self, tasks: asyncio.TaskGroup, now_s: float) -> None:
        if self._is_offline and not all(map(self._is_suspect, self._hops.all_links)):
            # One hop is back, and so our network; the others' answers are on their way.
            self._is_offline = False
            self._begin_afresh()
        for link in self._hops.all_links:
            if self._is_suspect(link) and link not in self._examined:
                self._examined.add(link)
                tasks.create_task(self._examine(link))
        self._look_for_standstill(now_s)
        if not self._looking_for_better and self._stragglers():
            self._looking_for_better = True
            tasks.create_task(self._replace_stragglers())

    # --- silence
    async def _ping(self, link: Link) -> None:
        try:
            await link.ping(Ping(nonce=self._nonce))
        except NetworkError as error:
            self._hops.lose(link, HopFailed(link.hop, error))

    def _is_suspect(self, link: Link) -> bool:
        return link.failure is None and link.phi() > self._settings.suspicious_phi

    async def _examine(self, link: Link) -> None:
        """A second opinion on a silent hop."""
        try:
            suspected_s = self._clock.monotonic_s()
            opinions = await self._ask_neighbours(link)
            if not opinions and not await self._planner.is_online():
                log.info("nobody answers: waiting for our own network")
                self._is_offline = True
                return
            while any(opinions) and self._is_suspect(link):
                if self._clock.monotonic_s() - suspected_s > self._settings.reprieve_s:
                    break
                await self._clock.sleep(self._settings.active_heartbeat_s)
            if self._is_suspect(link):
                self._hops.lose(link, HopFailed(link.hop, NetworkError("stopped answering")))
                await link.connection.close()
        finally:
            self._examined.discard(link)

    async def _ask_neighbours(self, link: Link) -> list[bool]:
        """What those neighbours in the chain that answer us say: whether they reach ``link``."""
        asked = [other for other in self._hops.neighbours_of(link) if not self._is_suspect(other)]
        answers = await asyncio.gather(*(self._probe(other, link) for other in asked))
        return [answer for answer in answers if answer is not None]

    async def _probe(self, asked: Link, link: Link) -> bool | None:
        question = ProbePeer(peer=link.peer_id)
        try:
            report = await asked.ask(question, ProbeReport, link.peer_id, self._settings.probe_s)
        except (HopFailed, RemoteError):
            return None
        return bool(report.reachable)

    # --- steps that stand still
    def _look_for_standstill(self, now_s: float) -> None:
        oldest = self._session.oldest_in_flight
        # What silent hops said of their progress is out of date.
        if (
            oldest is None
            or self._hops.first_gap is not None
            or self._hops.is_changing
            or any(map(self._is_suspect, self._hops.links))
        ):
            self._standstill = None
            return
        holder = next((link for link in self._hops.links if link.computed_step < oldest.step), None)
        received = holder is not None and holder.received_step >= oldest.step
        seen = self._standstill
        if seen is None or (seen.step, seen.link, seen.received) != (
            oldest.step,
            holder,
            received,
        ):
            self._standstill = _Standstill(oldest.step, holder, received, now_s)
            return
        waited_s = now_s - seen.since_s
        if holder is None or not received:
            if waited_s > self._settings.standstill_s + 4 * self._longest_round_trip_s:
                self._standstill = None
                self._mend(holder or self._hops.links[-1])
        elif waited_s > self._patience_s(holder, oldest.tokens):
            self._standstill = None
            reason = NetworkError(f"took more than {waited_s:.0f} s for one step")
            self._hops.lose(holder, HopFailed(holder.hop, reason))

    @property
    def _longest_round_trip_s(self) -> float:
        return max((link.round_trip_s for link in self._hops.links), default=0.0)

    def _patience_s(self, link: Link, tokens: int) -> float:
        expected_s = link.speed.expected_s(tokens)
        if expected_s is None:
            return self._settings.slowest_step_s
        return max(5.0, self._settings.slowness * expected_s)

    # --- stragglers
    def _stragglers(self) -> list[Link]:
        if self._clock.monotonic_s() < self._next_straggler_s:
            return []
        links = self._hops.links
        return [link for link in links if self._fell_behind(link, links)]

    def _fell_behind(self, link: Link, links: Sequence[Link]) -> bool:
        """Whether a hop is slow, and others are not: else something that all share is busy."""
        others = _speeds_beside(link, links)
        slowdown = link.speed.slowdown
        overrun = 1.0
        if others:
            slowdown /= max(1.0, median_low(speed.slowdown for speed in others))
            # Alone a promise says little: nodes make it when they start, on an idle computer.
            overrun = link.speed.overrun / max(1.0, median_low(speed.overrun for speed in others))
        return (
            max(slowdown, overrun) > self._settings.straggler
            and link.speed.recent_s > self._settings.straggler_least_s
        )

    async def _replace_stragglers(self) -> None:
        """Give up hops that are slow, if the rest of the swarm has something better."""
        try:
            replaced = [await self._replace_straggler(link) for link in self._stragglers()]
            pause_s = self._settings.straggler_look_s
            if any(replaced):
                pause_s = self._straggler_pause_s
                self._straggler_pause_s *= 2
            self._next_straggler_s = self._clock.monotonic_s() + pause_s
        finally:
            self._looking_for_better = False

    async def _replace_straggler(self, link: Link) -> bool:
        before, after = self._hops.peers_around(link)
        try:
            plan = await self._planner.plan(
                link.hop.first_block,
                link.hop.end_block,
                excluded=[link.peer_id],
                previous=before,
                following=after,
            )
        except SwarmError as error:
            log.debug("nobody to replace a straggler with: %s", error)
            return False
        links = self._hops.links
        if link.failure is not None or not self._fell_behind(link, links):
            return False
        expected_s = plan.expected_step_s * _correction(link, links)
        recent_s = link.speed.recent_s
        log.info("%s takes %.3f s a token, others %.3f s", link.peer_id, recent_s, expected_s)
        if expected_s > self._settings.straggler_gain * recent_s:
            return False
        reason = NetworkError("is far slower than it should be")
        self._hops.lose(link, HopFailed(link.hop, reason))
        return True


def _speeds_beside(link: Link, links: Sequence[Link]) -> list[HopSpeed]:
    return [other.speed for other in links if other is not link]


def _correction(link: Link, links: Sequence[Link]) -> float:
    """What expected times are to be multiplied by, as this chain has shown: by how the other hops
    do; where there are none, by how ``link`` did at its best."""
    others = _speeds_beside(link, links)
    if others:
        return median_low(speed.overrun for speed in others)
    return link.speed.overrun_at_best
