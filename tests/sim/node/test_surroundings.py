"""Three nodes that announce themselves often know each other all the time, and miss a dead one."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from swarm.buddies import Buddies
from swarm.connection import Connection
from swarm.membership import Announcer
from swarm.memory_network import LinkSettings, MemoryNetwork, MemorySettings
from swarm.node.surroundings import view_settings
from swarm.nodes_view import NodesView
from swarm.ports import Stream
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.messages import Ping, Pong
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType
from swarm.protocol.version import STREAM_PROTOCOL
from swarm.virtual_time import LoopClock, run

CLOCK = LoopClock()
ANNOUNCE_PERIOD_S = 10.0
RECORD = NodeRecord(
    peer_id=PeerId(""),
    model_name="model",
    model_revision=b"r" * 32,
    number_of_blocks=30,
    shards=1,
    first_block=0,
    end_block=10,
    state=NodeState.ONLINE,
    dtype=DType.FLOAT32,
    minimum_version=1,
    maximum_version=1,
    sequence=1,
    expires_unix_s=0,
    organisation="University of Nairobi",
)


async def answer_pings(stream: Stream) -> None:
    try:
        async with Connection(stream) as connection:
            await connection.answer_hello(5.0)
            while True:
                ping = await connection.receive_only(Ping)
                await connection.send(Pong(nonce=ping.nonce))
    except NetworkError:
        return


class Node:
    """Announces itself and looks around, as the application does it."""

    def __init__(self, network: MemoryNetwork) -> None:
        identity = Identity.generate()
        self.peer_id = identity.peer_id
        self._peer = network.join(identity)
        self._announcer = Announcer(
            identity,
            self._peer,
            CLOCK,
            replace(RECORD, peer_id=identity.peer_id),
            hidden_size=576,
            announce_period_s=ANNOUNCE_PERIOD_S,
        )
        self.view = NodesView(
            self._peer,
            CLOCK,
            RECORD.model_revision,
            settings=view_settings(ANNOUNCE_PERIOD_S),
            own=identity.peer_id,
            on_accused=self._announcer.announce_now,
        )
        self._buddies = Buddies(
            identity,
            self._peer,
            self._peer,
            CLOCK,
            self.view,
            model_revision=RECORD.model_revision,
        )

    async def live(self) -> None:
        await self._peer.serve(STREAM_PROTOCOL, answer_pings)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._announcer.run())
            group.create_task(self.view.run())
            group.create_task(self._buddies.run())

    @property
    def known(self) -> int:
        return len(self.view.records())

    @property
    def lost(self) -> set[PeerId]:
        return set(self.view.lost)


@pytest.mark.parametrize("killed_after_s", [61.0, 72.5, 84.0])
def test_in_a_swarm_of_three(killed_after_s: float) -> None:
    async def main() -> None:
        link = LinkSettings(latency_s=0.03, jitter_s=0.01)
        network = MemoryNetwork(1, MemorySettings(link=link))
        for _ in range(5):  # who keeps the directory must outlive the one that dies
            network.join(Identity.generate())
        nodes = [Node(network) for _ in range(3)]
        living = [asyncio.create_task(node.live()) for node in nodes]
        await asyncio.sleep(40)
        while CLOCK.monotonic_s() < killed_after_s:
            assert [node.known for node in nodes] == [3, 3, 3]
            await asyncio.sleep(0.5)
        victim = nodes[1]
        network.crash(victim.peer_id)
        living[1].cancel()
        # A round of pings, two pings, and two looks at what the other one says.
        await asyncio.sleep(16)
        assert [node.lost for node in (nodes[0], nodes[2])] == [{victim.peer_id}] * 2
        for task in living:
            task.cancel()
        await asyncio.wait(living)

    run(main())
