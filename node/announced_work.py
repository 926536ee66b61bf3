"""What a node announces of its work: tokens x blocks and energy, counted since it started.

Readers (``swarm.status``) take differences between two announcements, so the counts begin anew with
each life of the node, as does ``started_unix_s`` of its record.
"""

from __future__ import annotations

import time
from dataclasses import replace

from swarm.node.energy import EnergyMeter, counters_of
from swarm.node.metrics import NodeMetrics
from swarm.protocol.records import NodeRecord


class AnnouncedWork:
    """The counts of one life of a node."""

    def __init__(self, metrics: NodeMetrics, declared_watts: float | None) -> None:
        self._metrics = metrics
        self._before = metrics.totals
        self._declared_watts = declared_watts
        self._device = ""
        self._meter = EnergyMeter((), declared_watts)
        self._earlier_j = 0.0
        self._told_j = 0.0

    def computes_on(self, device: str) -> None:
        """The engine is on ``device``: find what measures it."""
        if device != self._device:
            self._device = device
            self._earlier_j += self._meter.total_j
            self._meter = EnergyMeter(counters_of(device), self._declared_watts)

    def added_to(self, record: NodeRecord) -> NodeRecord:
        """The record with the counts up to now; called every few seconds, which measures."""
        totals = self._metrics.totals
        self._meter.update(time.monotonic(), totals.computed_s)
        energy_j = self._earlier_j + self._meter.total_j
        self._metrics.energy_used(energy_j - self._told_j)
        self._told_j = energy_j
        return replace(
            record,
            decode_block_tokens=totals.decode_block_tokens - self._before.decode_block_tokens,
            prefill_block_tokens=totals.prefill_block_tokens - self._before.prefill_block_tokens,
            energy_j=int(energy_j),
            energy_measured=self._meter.measured,
        )
