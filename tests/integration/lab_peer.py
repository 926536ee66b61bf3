"""A program for test_behind_routers: a peer without a model, behind a router.

Prints its peer id. ``addresses`` prints a JSON list; ``open PEER ADDRESSES`` dials another one,
sends it a byte and prints whether the answer came through a relay.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from swarm.hivemind_network import HivemindNetwork, NetworkSettings
from swarm.ports import Stream
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import Identity, PeerId


async def echo(stream: Stream) -> None:
    await stream.send(await stream.receive_exactly(1))
    await stream.receive_exactly(1)


async def main(key: Path, peers: list[str]) -> None:
    Identity.load_or_create(key)
    settings = NetworkSettings(initial_peers=tuple(peers), use_relays=True)
    network = await HivemindNetwork.create(key, settings)
    try:
        await network.serve("echo", echo)
        print(network.peer_id, flush=True)
        while words := (await asyncio.to_thread(sys.stdin.readline)).split():
            match words:
                case ["addresses"]:
                    print(json.dumps(list(await network.addresses())), flush=True)
                case ["open", peer, *addresses]:
                    try:
                        stream = await network.open(PeerId(peer), "echo", addresses)
                        await stream.send(b"x")
                        await stream.receive_exactly(1)
                        print(json.dumps(stream.relayed), flush=True)
                        await stream.close()
                    except NetworkError as error:
                        print(json.dumps(str(error)), flush=True)
    finally:
        await network.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2:]))
