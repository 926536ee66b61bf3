"""``--adapter NAME``: what a client takes from the catalogue, and with which reason it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swarm import record_validation
from swarm.catalogue.adapter import WEIGHTS_NAME, AdapterFiles
from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.description import adapter_holding, describe_adapter
from swarm.catalogue.download import DownloadLimits
from swarm.catalogue.library import Library, LibrarySettings
from swarm.client.adapters import ADAPTER_ID, LANGUAGES, FoundAdapter, find_adapter
from swarm.memory_network import MemoryNetwork, MemorySettings
from swarm.protocol.errors import AdapterError, NetworkError, ProtocolError
from swarm.protocol.identity import Identity
from swarm.protocol.manifest import ManifestSignature, sign_manifest
from swarm.virtual_time import LoopClock
from tests.adapter_making import make_adapter

NAME = "swahili"


def tiny(folder: Path, hidden_size: int = 32) -> tuple[Any, Checkpoint]:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=hidden_size,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    model.save_pretrained(folder)
    return model, Checkpoint.open(folder)


@dataclass
class Lab:
    """A model, an adapter for it, a publisher and a client in one memory network."""

    folder: Path
    checkpoint: Checkpoint
    adapter: Path
    library: Library
    publish: Callable[..., Any]

    async def find(self, name: str = NAME, **settings: Any) -> FoundAdapter:
        return await find_adapter(name, self.checkpoint, self.library, **settings)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    model, checkpoint = tiny(tmp_path / "model")
    adapter = tmp_path / "adapter"
    make_adapter(model, adapter)
    network = MemoryNetwork(1, MemorySettings())
    author = Identity.generate()
    publisher, client = network.join(author), network.join(Identity.generate())
    clock = LoopClock()

    async def publish(
        *,
        base_revision: bytes = checkpoint.revision,
        signature: ManifestSignature | None = None,
        **attributes: str,
    ) -> None:
        manifest = describe_adapter(
            adapter, name=NAME, base_revision=base_revision, attributes=attributes
        )
        library = Library(publisher, publisher, clock, LibrarySettings(tmp_path / "publisher"))
        announcer = await library.serve(author, lambda: ())
        signatures = (signature or sign_manifest(author, manifest),)
        library.hold(adapter_holding(adapter, manifest, signatures))
        await announcer.announce()

    library = Library(
        client,
        client,
        clock,
        LibrarySettings(tmp_path / "client"),
        limits=DownloadLimits(give_up_s=1.0),
    )
    return Lab(tmp_path, checkpoint, adapter, library, publish)


async def test_found_by_name_and_by_language(lab: Lab) -> None:
    adapter_id = AdapterFiles.open(lab.adapter).adapter_id
    await lab.publish(**{ADAPTER_ID: adapter_id.hex(), LANGUAGES: "sw"})
    found = await lab.find()
    assert isinstance(found.files, AdapterFiles)
    assert found.files.adapter_id == adapter_id
    assert found.files.catalogue_name.startswith(f"{NAME}@")
    prompt = "Habari za asubuhi, naomba unisaidie kuandika barua."
    picked = await lab.find("auto", prompt=prompt)
    assert (picked.name, picked.files and picked.files.adapter_id) == (NAME, adapter_id)
    assert (await lab.find("auto", prompt="Where is the nearest post office?")).files is None


async def test_for_another_model(lab: Lab) -> None:
    await lab.publish(base_revision=bytes(32))
    with pytest.raises(AdapterError, match="for another model, or another revision"):
        await lab.find()


async def test_shapes_of_another_model_under_the_right_revision(lab: Lab) -> None:
    """Whoever signs may still be wrong."""
    wide, _ = tiny(lab.folder / "wide", hidden_size=64)
    make_adapter(wide, lab.adapter)
    await lab.publish()
    with pytest.raises(AdapterError, match="made for a layer"):
        await lab.find()


async def test_a_manifest_of_another_adapter(lab: Lab) -> None:
    await lab.publish(**{ADAPTER_ID: bytes(32).hex()})
    with pytest.raises(AdapterError, match="the manifest is of another adapter"):
        await lab.find()


async def test_a_forged_signature(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody believes a record whose publisher has not signed."""
    forged = ManifestSignature(Identity.generate().peer_id, bytes(64))
    with pytest.raises(ProtocolError):
        forged.check(bytes(32))
    with monkeypatch.context() as careless:
        careless.setattr("swarm.protocol.records._problem", lambda record: "")
        await lab.publish(signature=forged)
    record_validation._verified.cache_clear()  # it was careless too
    with pytest.raises(AdapterError, match="neither a folder nor in the catalogue"):
        await lab.find()


async def test_a_publisher_who_is_not_trusted(lab: Lab) -> None:
    await lab.publish()
    trusted = frozenset([Identity.generate().peer_id])
    settings = LibrarySettings(lab.folder / "careful", trusted=trusted)
    careful = Library(lab.library._transport, lab.library._directory, LoopClock(), settings)
    with pytest.raises(AdapterError, match="neither a folder nor in the catalogue"):
        await find_adapter(NAME, lab.checkpoint, careful)


async def test_a_corrupted_chunk(lab: Lab) -> None:
    """The file has changed since it was signed: its chunks are not those of the manifest."""
    await lab.publish()
    file = lab.adapter / WEIGHTS_NAME
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(NetworkError):
        await lab.find()


async def test_a_file_that_is_no_adapter(lab: Lab) -> None:
    """Signed and complete, and refused all the same."""
    config = lab.adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"bias": "none"', '"bias": "all"'))
    await lab.publish()
    with pytest.raises(AdapterError, match="bias"):
        await lab.find()
