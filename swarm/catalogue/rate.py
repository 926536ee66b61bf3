"""A cap on bytes per second, shared by everything that moves weights in one direction."""

from __future__ import annotations

from swarm.ports import Clock

BURST_S = 0.25
"""What may be sent at once after a pause, in seconds of the cap."""


class RateLimit:
    """Lets bytes pass at a mean rate; whoever comes waits behind those before."""

    def __init__(self, bytes_per_s: float | None, clock: Clock) -> None:
        """None is no limit."""
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_at_s = 0.0

    async def take(self, size_bytes: int) -> None:
        """Wait until so many bytes may pass. Cancelling gives nothing back."""
        if self._bytes_per_s is None:
            return
        now_s = self._clock.monotonic_s()
        begin_s = max(self._free_at_s, now_s - BURST_S)
        self._free_at_s = begin_s + size_bytes / self._bytes_per_s
        if begin_s > now_s:
            await self._clock.sleep(begin_s - now_s)
