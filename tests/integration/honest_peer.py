"""A program for test_hivemind_network: a peer that reads the keys that it is told to read."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from swarm.hivemind_network import HivemindNetwork, NetworkSettings
from swarm.protocol.identity import Identity


async def main(folder: Path) -> None:
    Identity.load_or_create(folder / "key")
    settings = NetworkSettings(listen_addresses=("/ip4/127.0.0.1/tcp/0",))
    network = await HivemindNetwork.create(folder / "key", settings)
    try:
        print(f"{(await network.addresses())[0]}/p2p/{network.peer_id}", flush=True)
        while key := (await asyncio.to_thread(sys.stdin.readline)).strip():
            print(*sorted(await network.get(key)), flush=True)
    finally:
        await network.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
