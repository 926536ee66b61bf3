"""The time by which directory entries expire.

hivemind takes this computer's clock for the time of the swarm and refuses peers that disagree. Here
what the peers of the swarm say counts: a computer whose clock is wrong works all the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median_low

import hivemind.dht.node
import hivemind.dht.protocol
import hivemind.dht.routing
import hivemind.utils.timed_storage
from hivemind.dht.protocol import MAX_DHT_TIME_DISCREPANCY_SECONDS

ASKED_THE_TIME = (
    hivemind.dht.node,
    hivemind.dht.protocol,
    hivemind.dht.routing,
    hivemind.utils.timed_storage,
)


class DhtClock:
    """This computer's clock and by how much the swarm's is ahead of it."""

    def __init__(self) -> None:
        self.offset_s = 0.0

    def unix_s(self) -> float:
        return time.time() + self.offset_s

    def install(self) -> None:
        """hivemind asks the time of a function that many of its modules have imported."""
        for module in ASKED_THE_TIME:
            module.get_dht_time = self.unix_s


def agreed_offset_s(offsets_s: Sequence[float]) -> float:
    """What to correct by, after peers that the owner named said how far their clocks are ahead.

    Nothing when one of them agrees with ours: then it is right, or at least not alone.
    """
    if any(abs(offset_s) < MAX_DHT_TIME_DISCREPANCY_SECONDS for offset_s in offsets_s):
        return 0.0
    return median_low(offsets_s) if offsets_s else 0.0


DHT_CLOCK = DhtClock()
"""Of this process: hivemind's functions cannot be told which network they work for."""
