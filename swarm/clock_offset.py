"""How far our clock is from that of the others, and a clock that makes up for it.

Records expire at points in time, so a node whose clock is minutes off would announce what everybody
drops, and drop what everybody announces. Peers tell their time when they answer a ping; the median
of several of them cannot be moved by one that lies. What peers are told is the time of our own,
uncorrected clock: otherwise swarms could drift together.
"""

from __future__ import annotations

from collections import OrderedDict
from statistics import median

from swarm.ports import Clock
from swarm.protocol.identity import PeerId

ENOUGH_PEERS = 3
MAXIMUM_PEERS = 64
"""Heard last."""
TOLERATED_S = 2.0
"""Smaller offsets do no harm and are not corrected."""


class ClockOffsets:
    """What other clocks said, against ``clock``, ours as it is."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset_s: OrderedDict[PeerId, float] = OrderedDict()
        self._believed_s = 0.0

    def observe(self, peer: PeerId, unix_s: float, round_trip_s: float) -> None:
        """A peer has just said that it is ``unix_s``; its answer took half the round trip."""
        self._offset_s[peer] = unix_s + round_trip_s / 2 - self._clock.unix_s()
        self._offset_s.move_to_end(peer)
        while len(self._offset_s) > MAXIMUM_PEERS:
            self._offset_s.popitem(last=False)

    def believe(self, offset_s: float) -> None:
        """What the peers say that the owner named, for as long as too few others are heard."""
        self._believed_s = offset_s

    @property
    def offset_s(self) -> float:
        """To be added to our clock: 0 when it is right, or nobody knows better."""
        known = self._offset_s.values()
        offset_s = median(known) if len(known) >= ENOUGH_PEERS else self._believed_s
        return offset_s if abs(offset_s) > TOLERATED_S else 0.0


class CorrectedClock:
    """``ports.Clock`` with the time of the swarm."""

    def __init__(self, clock: Clock, offsets: ClockOffsets) -> None:
        self._clock = clock
        self._offsets = offsets

    def monotonic_s(self) -> float:
        return self._clock.monotonic_s()

    def unix_s(self) -> float:
        return self._clock.unix_s() + self._offsets.offset_s

    async def sleep(self, duration_s: float) -> None:
        await self._clock.sleep(duration_s)


def describe_offset(offset_s: float) -> str:
    """For people: empty when the clock is right."""
    if not offset_s:
        return ""
    minutes, seconds = divmod(round(abs(offset_s)), 60)
    amount = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return f"this computer's clock is {amount} {'slow' if offset_s > 0 else 'fast'}"
