"""A program for test_memory_network: some minutes of a busy network, printed event by event."""

from __future__ import annotations

import asyncio
import random
import sys

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.memory_network import LinkSettings, MemoryNetwork, MemorySettings
from swarm.ports import Stream
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import Identity
from swarm.protocol.records import NodeRecord, NodeState, expected_key, sign_record
from swarm.protocol.tensors import DType
from swarm.virtual_time import LoopClock, run


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive_exactly(1000))


async def main(seed: int) -> None:
    events = []
    link = LinkSettings(latency_s=0.02, jitter_s=0.03, rate_bytes_per_s=1e6, loss=0.05)
    network = MemoryNetwork(
        seed,
        MemorySettings(link=link),
        on_event=lambda now_s, event: events.append(f"{now_s:.9f} {event}"),
    )
    dice = random.Random(seed)
    clock = LoopClock()
    identities = [
        Identity(Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big")))
        for number in range(1, 9)
    ]
    peers = [network.join(identity) for identity in identities]
    for peer in peers:
        await peer.serve("echo", echo)

    async def talk(number: int) -> None:
        for round_number in range(3):
            other = dice.choice(peers)
            try:
                stream = await peers[number].open(other.peer_id, "echo")
                for _ in range(3):
                    await stream.send(bytes(1000))
                    await stream.receive_exactly(1000)
                await stream.close()
            except NetworkError as error:
                events.append(f"{clock.monotonic_s():.9f} {number} {error}")
            record = NodeRecord(
                identities[number].peer_id,
                "model",
                b"r" * 32,
                30,
                1,
                0,
                10,
                NodeState.ONLINE,
                DType.FLOAT32,
                1,
                1,
                round_number,
                int(clock.unix_s()) + 60 + round_number,
            )
            value = sign_record(identities[number], record)
            await peers[number].store(expected_key(record), value, record.expires_unix_s)
            found = await peers[number].get(expected_key(record))
            events.append(f"{clock.monotonic_s():.9f} {number} found {len(found)}")

    async with asyncio.TaskGroup() as group:
        for number in range(len(peers)):
            group.create_task(talk(number))
        await clock.sleep(0.7)
        network.crash(peers[3].peer_id)
        network.cut(peers[0].peer_id, peers[1].peer_id)
        await clock.sleep(5)
        network.heal()
    for peer in peers:
        await peer.close()
    sys.stdout.write("\n".join(events) + "\n")


if __name__ == "__main__":
    run(main(int(sys.argv[1])))
