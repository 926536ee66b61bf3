"""What is known of a running node at a time: filled in by its parts, read by the view."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from swarm.node.donor.guard import Guard
from swarm.node.metrics import LoadedEngine, NodeMetrics
from swarm.node.view import NodeStatus, RecentRate


class Board:
    """Collects a :class:`NodeStatus` from whoever knows a part of it."""

    def __init__(self, status: NodeStatus, metrics: NodeMetrics) -> None:
        self.metrics = metrics
        self.engine: LoadedEngine | None = None
        self.guard: Guard | None = None
        """What the owner allows; seeds have none."""
        self._drain_ends_s = 0.0
        self._status = status
        self._started_s = time.monotonic()
        self._rate = RecentRate()

    def update(self, **changes: Any) -> None:
        """Set fields of the status; from any thread."""
        self._status = replace(self._status, **changes)

    def drain(self, wait_s: float) -> None:
        """The node drains now and waits for its sessions so long."""
        self._drain_ends_s = time.monotonic() + wait_s
        own = range(self._status.first_block, self._status.end_block)
        others = tuple(n - (block in own) for block, n in enumerate(self._status.coverage))
        self.update(state="draining", coverage=others)

    def forget_engine(self) -> None:
        """The engine is closed: let go of its memory."""
        self.engine = None
        self.metrics.forget_engine()

    def rest(self) -> None:
        """The node has left for now: nothing of what it hosted is true any more."""
        kept = self._status
        self._status = NodeStatus(
            state="resting",
            display_name=kept.display_name,
            model=kept.model,
            metrics_url=kept.metrics_url,
        )

    def snapshot(self) -> NodeStatus:
        """The status now, with what metrics and engine count."""
        now_s = time.monotonic()
        totals = self.metrics.totals
        status = replace(
            self._status,
            uptime_s=now_s - self._started_s,
            sessions=totals.sessions_open,
            tokens=totals.tokens,
            tokens_per_s=self._rate.update(now_s, totals.tokens),
            refused=totals.refused,
        )
        if status.state == "draining":
            status = replace(status, drain_left_s=max(0.0, self._drain_ends_s - now_s))
        if self.guard is not None and self.guard.reasons:
            status = replace(
                status,
                rests_because=tuple(map(str, self.guard.reasons)),
                rests_until=self.guard.rests_until,
            )
        if self.engine is None:
            return status
        load = self.engine.load
        return replace(
            status,
            queued_steps=load.queued_steps,
            cache_tokens_total=load.cache_tokens_total,
            cache_tokens_used=load.cache_tokens_total - load.cache_tokens_free,
        )
