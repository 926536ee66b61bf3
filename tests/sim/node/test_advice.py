"""Owners are told when their model cannot be kept whole, and what else they could host."""

from __future__ import annotations

import asyncio

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.membership import Announcer, read_nodes
from swarm.memory_network import MemoryNetwork
from swarm.node.advice import Adviser
from swarm.protocol.identity import Identity
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType
from swarm.virtual_time import LoopClock, run

LARGE, SMALL = b"l" * 32, b"s" * 32


def announcer(
    network: MemoryNetwork, number: int, revision: bytes, name: str, span: tuple[int, int]
) -> Announcer:
    owner = Identity(Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big")))
    record = NodeRecord(
        peer_id=owner.peer_id,
        model_name=name,
        model_revision=revision,
        number_of_blocks=80 if revision == LARGE else 4,
        shards=1,
        first_block=span[0],
        end_block=span[1],
        state=NodeState.ONLINE,
        dtype=DType.FLOAT32,
        minimum_version=1,
        maximum_version=1,
        sequence=0,
        expires_unix_s=0,
    )
    return Announcer(owner, network.join(owner), LoopClock(), record, hidden_size=8)


def test_a_model_that_is_too_large_names_a_smaller_one() -> None:
    async def main() -> None:
        network, clock = MemoryNetwork(1), LoopClock()
        announcers = [announcer(network, 1, LARGE, "large", (0, 20))]
        announcers += [announcer(network, 2 + n, SMALL, "small", (0, 4)) for n in range(6)]
        tasks = [asyncio.create_task(each.run()) for each in announcers]
        for each in announcers:
            await each.announced()
        reader = network.join(Identity(Ed25519PrivateKey.from_private_bytes(bytes([9] * 32))))
        adviser = Adviser(reader, clock)
        text = await adviser.advise(await read_nodes(reader, LARGE, clock))
        assert "large cannot be kept whole" in text
        assert "20 of 80 blocks" in text
        assert "small" in text
        assert await adviser.advise(await read_nodes(reader, SMALL, clock)) == ""
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    run(main())
