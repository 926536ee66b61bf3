"""A small swarm as the directory would show it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from swarm.membership import ModelSummary
from swarm.protocol.identity import Identity
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType
from swarm.status.carbon import GridFactors
from swarm.status.database import Database
from swarm.status.observatory import Observatory
from swarm.status.snapshot import Crawl, Snapshot

PERIOD_S = 30.0
START_UNIX_S = 1_790_000_000.0
MODEL = ModelSummary("tiny", b"\xab" * 32, 30, 64, 1)


@dataclass
class Watched:
    """An observatory, a clock, and what the next look will find."""

    folder: Path
    now_unix_s: float = START_UNIX_S
    heard_ago_s: float = 0.0
    records: list[NodeRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._open()

    def restart(self) -> None:
        """As when the page is started again on the same file."""
        self.database.close()
        self._open()

    def _open(self) -> None:
        self.database = Database(self.folder / "status.sqlite")
        self.observatory = Observatory(self.database, GridFactors.read(), period_s=PERIOD_S)

    def add(self, first_block: int, end_block: int, **declared: object) -> NodeRecord:
        record = NodeRecord(
            peer_id=Identity.generate().peer_id,
            model_name=MODEL.model_name,
            model_revision=MODEL.model_revision,
            number_of_blocks=MODEL.number_of_blocks,
            shards=1,
            first_block=first_block,
            end_block=end_block,
            state=NodeState.ONLINE,
            dtype=DType.FLOAT32,
            minimum_version=1,
            maximum_version=1,
            sequence=1,
            expires_unix_s=1,
            decode_tokens_per_s=3000,
            batched_tokens_per_s=30000,
            started_unix_s=int(START_UNIX_S) - 100,
        )
        record = replace(record, **declared)  # type: ignore[arg-type]
        self.records.append(record)
        return record

    def change(self, record: NodeRecord, **changes: object) -> NodeRecord:
        changed = replace(record, **changes)  # type: ignore[arg-type]
        self.records[self.records.index(record)] = changed
        return changed

    def look(self, after_s: float = PERIOD_S) -> Snapshot:
        self.now_unix_s += after_s
        return self.observatory.observe(
            Crawl(
                self.now_unix_s,
                self.now_unix_s - self.heard_ago_s,
                3 * PERIOD_S,
                ((MODEL, tuple(self.records)),),
            )
        )


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(tmp_path)
    yield watched
    watched.database.close()
