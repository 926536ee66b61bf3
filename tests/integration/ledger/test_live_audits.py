"""Six honest and three evil nodes, real peers on loopback: who is out of the routes afterwards."""

from __future__ import annotations

import asyncio
import resource
from contextlib import AsyncExitStack
from pathlib import Path

from swarm.client.app import Network
from swarm.hivemind_network import HivemindNetwork, NetworkSettings
from swarm.ledger.reputation import Standing
from swarm.membership import read_nodes
from swarm.node.addresses import for_record
from swarm.protocol.identity import Identity
from swarm.simulation.evil import Behaviour
from tests.sim.evil_swarm import EvilSwarm, ask_until_trusted

SESSIONS = 10
MOST_GROWTH_KIB = 300 * 1024


class LiveSwarm(EvilSwarm):
    """The same swarm over libp2p."""

    def __init__(self, evil: tuple[Behaviour, ...], folder: Path) -> None:
        super().__init__(evil)
        self._folder = folder
        self._networks: list[HivemindNetwork] = []

    async def _join(self, stack: AsyncExitStack, own: Identity) -> Network:
        key = self._folder / f"{own.peer_id}.key"
        own.save(key)
        first = self._networks[0] if self._networks else None
        peers = (f"{(await first.addresses())[0]}/p2p/{first.peer_id}",) if first else ()
        network = await HivemindNetwork.create(
            key,
            NetworkSettings(listen_addresses=("/ip4/127.0.0.1/tcp/0",), initial_peers=peers),
        )
        stack.push_async_callback(network.close)
        self._networks.append(network)
        self._known = for_record(await network.addresses())
        return network

    def _addresses(self, peer: Network) -> tuple[str, ...]:
        return self._known

    async def _announced(self) -> None:
        found = 0
        async with asyncio.timeout(60):
            while found < 3 * len(self.spans):
                found = len(await read_nodes(self._networks[0], self.revision, self.clock))
                await asyncio.sleep(0)


async def test_evil_nodes_leave_the_routes_of_a_live_swarm(tmp_path: Path) -> None:
    swarm = LiveSwarm((Behaviour.SKIP, Behaviour.COARSE, Behaviour.LAZY), tmp_path)
    async with swarm.running() as client:
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answers = []
        for number in range(SESSIONS):
            outcomes = await ask_until_trusted(client, number)
            answers.append(outcomes[-1])
        assert all(answer.right for answer in answers if answer.is_trusted)
        assert sum(answer.is_trusted for answer in answers) >= SESSIONS - 1
        standings = {
            node.peer_id: client.auditor.reputations.standing(node.peer_id, swarm.clock.unix_s())
            for node in swarm.nodes
        }
        for node in swarm.nodes:
            is_usable = standings[node.peer_id] is Standing.USABLE
            assert is_usable == (node.behaviour is None), node.behaviour
        served = {peer for answer in answers[-3:] for peer in answer.peers}
        assert not served & swarm.evil
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
        assert grown_kib < MOST_GROWTH_KIB
