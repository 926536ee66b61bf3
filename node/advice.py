"""Tells the owner of a node how its model does in the swarm, and what would help."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from swarm.block_vectors import block_vectors, placed_nodes
from swarm.membership import list_models, read_nodes
from swarm.model_health import ModelHealth, Verdict, advice, model_health
from swarm.ports import Clock, Directory
from swarm.protocol.errors import NetworkError
from swarm.protocol.records import NodeRecord

log = logging.getLogger(__name__)

OTHERS_PERIOD_S = 300.0
"""Between two looks at the swarm's other models, which only a model that cannot be kept needs."""
MOST_OTHERS = 8


class Adviser:
    """Looks at what the directory shows of one model, and of others when that is no good."""

    def __init__(self, directory: Directory, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        self._others: list[ModelHealth] = []
        self._looked_s: float | None = None

    async def advise(self, records: Sequence[NodeRecord]) -> str:
        """What to tell the owner; empty while the model is healthy. ``records``: all its nodes."""
        if not records:
            return ""
        health = self._health(records)
        if health.verdict is Verdict.TOO_LARGE:
            await self._look_at_others(records[0].model_revision)
        return advice(health, self._others)

    def _health(self, records: Sequence[NodeRecord]) -> ModelHealth:
        nodes = placed_nodes(records, now_unix_s=self._clock.unix_s())
        first = records[0]
        return model_health(first.model_name, block_vectors(nodes, first.number_of_blocks))

    async def _look_at_others(self, own_revision: bytes) -> None:
        now_s = self._clock.monotonic_s()
        if self._looked_s is not None and now_s < self._looked_s + OTHERS_PERIOD_S:
            return
        self._looked_s = now_s
        try:
            models = await list_models(self._directory, self._clock)
            others = [model for model in models if model.model_revision != own_revision]
            found = []
            for model in others[:MOST_OTHERS]:
                records = await read_nodes(self._directory, model.model_revision, self._clock)
                if records:
                    found.append(self._health(records))
            self._others = found
        except NetworkError as error:
            log.info("cannot look at other models: %s", error)
