"""What is known of a running node at a time: filled in by its parts, read by the view."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from swarm.node.metrics import LoadedEngine, NodeMetrics
from swarm.node.view import NodeStatus, RecentRate


class Board:
    """Collects a :class:`NodeStatus` from whoever knows a part of it."""

    def __init__(self, status: NodeStatus, metrics: NodeMetrics) -> None:
        self.metrics = metrics
        self.engine: LoadedEngine | None = None
        self._status = status
        self._started_s = time.monotonic()
        self._rate = RecentRate()

    def update(self, **changes: Any) -> None:
        """Set fields of the status; from any thread."""
        self._status = replace(self._status, **changes)

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
        if self.engine is None:
            return status
        load = self.engine.load
        return replace(
            status,
            queued_steps=load.queued_steps,
            cache_tokens_total=load.cache_tokens_total,
            cache_tokens_used=load.cache_tokens_total - load.cache_tokens_free,
        )
