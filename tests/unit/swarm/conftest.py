"""Records to choose among."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType

MakeRecord = Callable[..., NodeRecord]


@pytest.fixture
def make_record() -> MakeRecord:
    """A record ``(first_block, end_block, **changes)``; peers are called ``0``, ``1``, ..."""
    count = 0

    def make(first_block: int, end_block: int, **changes: Any) -> NodeRecord:
        nonlocal count
        record = NodeRecord(
            peer_id=PeerId(str(count)),
            model_name="model",
            model_revision=b"r" * 32,
            number_of_blocks=30,
            shards=1,
            first_block=first_block,
            end_block=end_block,
            state=NodeState.ONLINE,
            dtype=DType.FLOAT32,
            minimum_version=1,
            maximum_version=1,
            sequence=1,
            expires_unix_s=1060,
            decode_tokens_per_s=1000,
            cache_tokens_total=1000,
            cache_tokens_free=1000,
        )
        count += 1
        return replace(record, **changes)

    return make


@pytest.fixture(scope="session")
def identities() -> list[Identity]:
    return [Identity.generate() for _ in range(3)]
