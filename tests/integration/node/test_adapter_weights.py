"""A node gets an adapter of the catalogue from peers: only the parts of its blocks, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swarm.catalogue.adapter import AdapterFiles
from swarm.catalogue.description import adapter_holding, describe_adapter
from swarm.catalogue.library import Library, LibrarySettings
from swarm.memory_network import MemoryNetwork, MemorySettings
from swarm.node.adapter_weights import CatalogueAdapters
from swarm.protocol.identity import Identity
from swarm.protocol.manifest import sign_manifest
from swarm.virtual_time import LoopClock
from tests.adapter_making import make_adapter

REVISION = bytes(range(32))


@dataclass
class Lab:
    """An adapter with its publisher, and the library of a node that has nothing yet."""

    files: AdapterFiles
    name: str
    library: Library


@pytest.fixture
async def lab(tmp_path: Path) -> Lab:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
        )
    )
    make_adapter(model, tmp_path / "adapter", use_dora=True)
    network = MemoryNetwork(1, MemorySettings())
    identity = Identity.generate()
    publisher, node = network.join(identity), network.join(Identity.generate())
    clock = LoopClock()
    manifest = describe_adapter(tmp_path / "adapter", name="swahili", base_revision=REVISION)
    library = Library(publisher, publisher, clock, LibrarySettings(tmp_path / "publisher"))
    announcer = await library.serve(identity, lambda: ())
    signatures = (sign_manifest(identity, manifest),)
    library.hold(adapter_holding(tmp_path / "adapter", manifest, signatures))
    await announcer.announce()
    return Lab(
        AdapterFiles.open(tmp_path / "adapter"),
        f"swahili@{manifest.revision.hex()}",
        Library(node, node, clock, LibrarySettings(tmp_path / "node")),
    )


async def test_only_the_parts_of_its_blocks(lab: Lab) -> None:
    modules = lab.files.index.of_blocks(1, 3)
    read = await CatalogueAdapters(lab.library, REVISION).fetch(lab.name, modules)
    assert read is not None
    for module in modules:
        assert await read(module) == lab.files.read(module)
    (stored,) = lab.library.store.revisions()
    parts = stored.manifest.parts
    assert {part.first_block for part in parts if stored.has([part])} == {1, 2}


async def test_what_is_not_to_be_had(lab: Lab) -> None:
    modules = lab.files.index.of_blocks(0, 4)
    adapters = CatalogueAdapters(lab.library, REVISION)
    assert await adapters.fetch("unknown@00", modules) is None
    assert await adapters.fetch(lab.name, ()) is None
    # More than the index says that these modules have.
    assert await adapters.fetch(lab.name, modules[:-1]) is None
    assert await CatalogueAdapters(lab.library, bytes(32)).fetch(lab.name, modules) is None
    assert not any(stored.held.any() for stored in lab.library.store.revisions())
