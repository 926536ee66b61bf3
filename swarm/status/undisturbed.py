"""Keeps the interpreter's housekeeping out of the way of readers, in the process of the page."""

from __future__ import annotations

import gc
import sys
import time
from types import TracebackType

SWITCH_S = 0.0005
THAW_EACH_S = 3600.0


class UndisturbedLooks:
    """Around each look at the swarm; for a process that does nothing but serve the page.

    A full search for cyclic garbage among what is known of ten thousand nodes stops all threads for
    up to 150 ms, several times in a look and again and again between requests. There is next to no
    such garbage. So nothing is searched during a look, what lives after it is left out from then
    on, and once an hour everything is searched.
    """

    def __init__(self) -> None:
        # The event loop gets the interpreter within half a millisecond, and not within five.
        sys.setswitchinterval(SWITCH_S)
        self._thawed_s = time.monotonic()

    def __enter__(self) -> None:
        gc.disable()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if time.monotonic() - self._thawed_s > THAW_EACH_S:
            self._thawed_s = time.monotonic()
            gc.unfreeze()
            gc.collect()
        gc.freeze()
        gc.enable()
