"""Small models on disk, and peers in memory that hold, fetch, lie, stall and die."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.chunk_service import ChunkService
from swarm.catalogue.description import describe_model, model_holding
from swarm.catalogue.download import Download, DownloadLimits, Mirror, Source
from swarm.catalogue.holdings import Holding
from swarm.catalogue.rate import RateLimit
from swarm.catalogue.safetensors_file import header_for
from swarm.catalogue.store import Store, StoredRevision
from swarm.memory_network import MemoryNetwork, MemoryPeer, MemorySettings
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.manifest import Manifest, Part, Tensor
from swarm.protocol.version import WEIGHTS_PROTOCOL
from swarm.virtual_time import LoopClock

MIB = 1024 * 1024


async def at_once(function: Callable[..., Any], *arguments: Any) -> Any:
    """In place of a thread, which virtual time does not wait for."""
    return function(*arguments)


def write_model(folder: Path, *, blocks: int = 4, block_mib: float = 3.5, seed: int = 0) -> Path:
    """A checkpoint directory with random bytes for weights."""
    dice = random.Random(seed)
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "num_hidden_layers": blocks, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"words": []}')
    rows = int(block_mib * MIB / 16)
    tensors = [Tensor("model.embed_tokens.weight", "float32", (5, 8))]
    for block in range(blocks):
        name = f"model.layers.{block}.mlp.up_proj.weight"
        tensors.append(Tensor(name, "bfloat16", (rows, 8)))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header_for(tuple(tensors)))
        for tensor in tensors:
            file.write(dice.randbytes(tensor.size_bytes))
    return folder


@dataclass
class Fetcher:
    """A peer that fetches into a store of its own, and serves what it has."""

    peer: MemoryPeer
    stored: StoredRevision
    service: ChunkService
    download: Download


@dataclass
class Lab:
    """Peers that hold or fetch one manifest; all of them know of each other."""

    manifest: Manifest
    directory: Path
    folder: Path
    rate_bytes_per_s: float | None = None
    seed: int = 1
    limits: DownloadLimits = field(default_factory=DownloadLimits)

    def __post_init__(self) -> None:
        self.network = MemoryNetwork(self.seed, MemorySettings())
        self.clock = LoopClock()
        self.sources: list[PeerId] = []
        self._stores = 0

    def join(self) -> MemoryPeer:
        peer = self.network.join(Identity.generate())
        self.sources.append(peer.peer_id)
        return peer

    async def holder(self, holding: Holding | None = None) -> tuple[MemoryPeer, ChunkService]:
        """A peer that holds everything, as a plain directory."""
        whole = holding or model_holding(Checkpoint.open(self.directory), self.manifest)
        peer = self.join()
        return peer, await self.serve(peer, whole)

    async def serve(self, peer: MemoryPeer, holding: Holding) -> ChunkService:
        service = ChunkService(
            lambda: {self.manifest.digest: holding},
            clock=self.clock,
            upload=RateLimit(self.rate_bytes_per_s, self.clock),
            in_thread=at_once,
        )
        await peer.serve(WEIGHTS_PROTOCOL, service.serve_stream)
        return service

    async def fetcher(
        self,
        parts: tuple[Part, ...] | None = None,
        *,
        store: Store | None = None,
        mirrors: tuple[Mirror, ...] = (),
    ) -> Fetcher:
        """A peer that is about to fetch; ``download.run()`` does it."""
        self._stores += 1
        store = store or Store(self.folder / f"store-{self._stores}")
        stored = store.create(self.manifest)
        peer = self.join()

        async def find() -> list[Source]:
            return [Source(source) for source in self.sources]

        wanted = self.manifest.parts if parts is None else parts
        stored.recover(wanted)
        download = Download(
            stored,
            wanted,
            transport=peer,
            clock=self.clock,
            find_sources=find,
            rate=RateLimit(self.rate_bytes_per_s, self.clock),
            limits=self.limits,
            mirrors=mirrors,
            in_thread=at_once,
        )
        return Fetcher(peer, stored, await self.serve(peer, stored), download)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny-random")


@pytest.fixture(scope="session")
def manifest(model_directory: Path) -> Manifest:
    return describe_model(Checkpoint.open(model_directory), licence="Apache-2.0")


@pytest.fixture
def make_lab(manifest: Manifest, model_directory: Path, tmp_path: Path) -> Callable[..., Lab]:
    """``make_lab(rate_bytes_per_s=...)``; call it inside of ``virtual_time.run``."""

    def make(**settings: Any) -> Lab:
        return Lab(manifest, model_directory, tmp_path, **settings)

    return make


@pytest.fixture
def all_run() -> Callable[..., Any]:
    """Runs coroutines at the same time; the first error ends the test."""

    async def run(*coroutines: Any) -> None:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)

    return run
