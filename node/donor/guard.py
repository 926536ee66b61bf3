"""Watches the owner's limits, and tells the node when to rest and when to work.

One task reads the sensors again and again and decides (``readings``). A node asks ``rested`` before
it joins, and works inside ``shift``, whose event is set when a limit or the owner wants it to rest:
then it drains as if it left, and joins again when it may. Pauses, limits and the diary live here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

from swarm.node.donor.bandwidth import Pace
from swarm.node.donor.diary import Diary
from swarm.node.donor.limits import DonorLimits, LimitsFile
from swarm.node.donor.readings import Readings, Reason, Standing, decide
from swarm.node.donor.sensors import Sensors
from swarm.ports import Clock
from swarm.protocol.errors import ConfigError

log = logging.getLogger(__name__)

READ_PERIOD_S = 5.0
SAVE_PERIOD_S = 60.0
SENSORS_TIMEOUT_S = 30.0
LONGEST_PAUSE_S = 366 * 24 * 3600.0


class Guard:
    """The owner's will, as a node sees it. ``watch`` is its one task."""

    def __init__(
        self,
        limits: LimitsFile,
        sensors: Sensors,
        diary: Diary,
        *,
        clock: Clock,
        local_now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Raises ConfigError for a damaged file of limits."""
        self._file = limits
        self._sensors = sensors
        self._clock = clock
        self._local_now = local_now
        self.diary = diary
        self.limits: DonorLimits = limits.load()
        self.up = Pace(clock, self.limits.upload_bytes_per_s)
        self.down = Pace(clock, self.limits.download_bytes_per_s)
        self._readings = Readings()
        self._standing = Standing()
        self._paused_until: datetime | None = None
        self._changed = asyncio.Event()
        self._look = asyncio.Event()
        self._is_online = False

    # --- what the node asks
    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Why the node should not work now; empty when it may."""
        return tuple(sorted(self._standing.reasons))

    @property
    def rests_until(self) -> str:
        """When it may work again, where that is known, for people."""
        now = self._local_now()
        ends = []
        if Reason.PAUSED in self._standing.reasons and self._paused_until is not None:
            ends.append(self._paused_until)
        if Reason.HOURS in self._standing.reasons and self.limits.hours is not None:
            ends.append(self.limits.hours.next_begin(now))
        if not ends or len(ends) < len(self._standing.reasons):
            return ""
        end = max(ends)
        if end >= datetime.max - timedelta(days=2):
            return ""
        return f"{end:%H:%M}" if end - now < timedelta(hours=20) else f"{end:%a %d %b %H:%M}"

    async def rested(self, leaving: asyncio.Event, resting: Callable[[], None]) -> bool:
        """Wait until the node may work; False when the owner leaves for good.

        ``resting`` is called whenever there is something new to tell the owner.
        """
        await self._decide()
        while not leaving.is_set() and self._standing.reasons:
            resting()
            await self._change(leaving)
        return not leaving.is_set()

    @asynccontextmanager
    async def shift(self, leaving: asyncio.Event) -> AsyncIterator[asyncio.Event]:
        """An event that is set when the node must rest or the owner leaves for good."""
        over = asyncio.Event()

        async def wait() -> None:
            while not leaving.is_set() and not self._standing.reasons:
                await self._change(leaving)
            over.set()

        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(wait())
            self._is_online = True
            try:
                yield over
            finally:
                self._is_online = False
                waiting.cancel()

    async def _change(self, leaving: asyncio.Event) -> None:
        """Wait until the reasons change or the owner leaves."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._changed, leaving)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self._changed.clear()

    async def watch(self) -> None:
        """Look at the computer until cancelled."""
        saved_s = self._clock.monotonic_s()
        try:
            while True:
                await self._decide()
                now_s = self._clock.monotonic_s()
                if now_s - saved_s >= SAVE_PERIOD_S:
                    saved_s = now_s
                    self.diary.save()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(READ_PERIOD_S):
                        await self._look.wait()
                self._look.clear()
        finally:
            self._note()
            self.diary.save()

    async def _decide(self) -> None:
        try:
            async with asyncio.timeout(SENSORS_TIMEOUT_S):
                self._readings = await self._sensors.read()
        except Exception as error:  # a driver's bug must not end the node
            log.warning("the sensors cannot be read: %s", error)
        self._decide_by_last_readings()

    def _decide_by_last_readings(self) -> None:
        now = self._local_now()
        if self._paused_until is not None and now >= self._paused_until:
            self._paused_until = None
        self._note()
        before = self._standing
        self._standing = decide(
            self.limits,
            self._readings,
            before,
            local_time=now,
            now_s=self._clock.monotonic_s(),
            paused=self._paused_until is not None,
            month_bytes=self.diary.month_bytes,
        )
        if self._standing.reasons != before.reasons:
            log.info("rests because: %s", ", ".join(self.reasons) or "nothing any more")
            self._changed.set()

    def _note(self) -> None:
        self.diary.note(
            self._clock.monotonic_s(),
            online=self._is_online,
            reasons=self.reasons,
        )

    # --- what the owner does
    def pause(self, duration_s: float | None) -> None:
        """Rest for so long, or until :meth:`resume`. Raises ConfigError."""
        if duration_s is None:
            self._paused_until = datetime.max
        elif 0 < duration_s <= LONGEST_PAUSE_S:
            self._paused_until = self._local_now() + timedelta(seconds=duration_s)
        else:
            raise ConfigError("a pause lasts at most a year")
        self._decide_by_last_readings()

    def resume(self) -> None:
        """End a pause. Other reasons go on to hold."""
        self._paused_until = None
        self._decide_by_last_readings()

    def change_limits(self, changes: Mapping[str, Any]) -> None:
        """Keep other limits from now on. Raises ConfigError; then nothing changes."""
        self.limits = self._file.change(changes)
        self.up.bytes_per_s = self.limits.upload_bytes_per_s
        self.down.bytes_per_s = self.limits.download_bytes_per_s
        self._decide_by_last_readings()
        self._look.set()

    def to_json(self) -> dict[str, Any]:
        """Everything that the owner's page shows beside the node's status."""
        self._note()
        return {
            "limits": self.limits.to_json(),
            "readings": asdict(self._readings),
            "reasons": list(self.reasons),
            "rests_until": self.rests_until,
            "today": asdict(self.diary.today),
            "month_bytes": self.diary.month_bytes,
            "days": [
                {"day": when.isoformat(), **asdict(day)}
                for when, day in sorted(self.diary.days.items())[-30:]
            ],
        }
