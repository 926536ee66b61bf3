"""Tells open pages that there is something new: server-sent events, to a bounded number of readers.

An event carries only the version of the snapshot; who wants to know more asks for it.
"""

from __future__ import annotations

import asyncio

MOST_READERS = 1000
KEEP_ALIVE_S = 20.0
"""Between two comments on a quiet stream, so that nothing on the way closes it."""


class LiveUpdates:
    """Wakes all that wait when a new version is there."""

    def __init__(self) -> None:
        self._version = 0
        self._changed = asyncio.Event()
        self.readers = 0

    @property
    def is_full(self) -> bool:
        return self.readers >= MOST_READERS

    def publish(self, version: int) -> None:
        self._version = version
        self._changed.set()
        self._changed = asyncio.Event()

    async def next_version(self, known: int) -> int | None:
        """Wait for a version other than ``known``; None after a while without one."""
        if self._version == known:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    await self._changed.wait()
            except TimeoutError:
                return None
        return self._version


def event(version: int | None) -> bytes:
    """One event of the stream, or a comment that keeps it open."""
    if version is None:
        return b": quiet\n\n"
    return f"event: snapshot\nid: {version}\ndata: {version}\n\n".encode("ascii")
