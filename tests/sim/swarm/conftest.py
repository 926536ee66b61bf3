from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.protocol.identity import Identity
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType


@pytest.fixture
def identity() -> Callable[[int], Identity]:
    """The same peers in each run."""

    def make(number: int) -> Identity:
        return Identity(Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big")))

    return make


@pytest.fixture
def node_record() -> Callable[..., NodeRecord]:
    def make(of: Identity, **changes: Any) -> NodeRecord:
        fields: dict[str, Any] = {
            "peer_id": of.peer_id,
            "model_name": "model",
            "model_revision": b"r" * 32,
            "number_of_blocks": 30,
            "shards": 1,
            "first_block": 0,
            "end_block": 10,
            "state": NodeState.ONLINE,
            "dtype": DType.FLOAT32,
            "minimum_version": 1,
            "maximum_version": 1,
            "sequence": 1,
            "expires_unix_s": 0,
        }
        return NodeRecord(**(fields | changes))

    return make
