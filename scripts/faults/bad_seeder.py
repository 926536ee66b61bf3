"""A peer that offers weights and does harm: ``liar`` changes a byte of every chunk, ``staller``
accepts requests and sends nothing.

    python -m scripts.faults.bad_seeder liar MODEL_FOLDER ADDRESS_OF_A_PEER
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.chunk_service import ChunkService
from swarm.catalogue.description import describe_model, model_holding
from swarm.catalogue.directory import CatalogueAnnouncer
from swarm.catalogue.holdings import PlainDirectory
from swarm.hivemind_network import HivemindNetwork, NetworkSettings
from swarm.protocol.identity import Identity
from swarm.protocol.version import WEIGHTS_PROTOCOL
from swarm.virtual_time import LoopClock

FOREVER_S = 24 * 3600


class Liar(PlainDirectory):
    """Holds everything, and sends none of it as it is."""

    def read_chunk(self, chunk: int) -> bytes:
        content = bytearray(super().read_chunk(chunk))
        content[len(content) // 2] ^= 1
        return bytes(content)


async def serve(kind: str, folder: Path, peer: str) -> None:
    checkpoint = Checkpoint.open(folder)
    manifest = describe_model(checkpoint)
    plain = model_holding(checkpoint, manifest)
    holding = Liar(folder, manifest, (), checkpoint.tensors.__getitem__)

    async def never(*_: Any) -> None:
        await asyncio.sleep(FOREVER_S)

    with tempfile.TemporaryDirectory() as temporary:
        key = Path(temporary) / "identity.key"
        identity = Identity.load_or_create(key)
        network = await HivemindNetwork.create(
            key, NetworkSettings(listen_addresses=("/ip4/0.0.0.0/tcp/0",), initial_peers=(peer,))
        )
        held = {manifest.digest: holding if kind == "liar" else plain}
        service = ChunkService(
            lambda: held,
            clock=LoopClock(),
            in_thread=asyncio.to_thread if kind == "liar" else never,
        )
        await network.serve(WEIGHTS_PROTOCOL, service.serve_stream)
        addresses = tuple(await network.addresses())
        announcer = CatalogueAnnouncer(
            identity, network, LoopClock(), lambda: held, addresses=lambda: addresses
        )
        await announcer.announce()
        print("ready", flush=True)
        while True:
            await asyncio.sleep(5)
            print(f"sent {service.sent.chunks} chunks to {len(service.sent.by_peer)}", flush=True)
            await announcer.announce()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
