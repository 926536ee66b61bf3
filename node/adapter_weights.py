"""Adapters from the swarm's catalogue: a node fetches the parts of its blocks from peers.

What comes is a stranger's file, read by ``swarm.catalogue.checked_safetensors``; the engine
compares each tensor with the index that the session's client has sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from swarm.catalogue.adapter import TENSOR_NAME
from swarm.catalogue.checked_safetensors import SafetensorsFile, StoredTensor
from swarm.catalogue.library import Library
from swarm.catalogue.store import StoredRevision
from swarm.protocol.adapter_index import ModuleSpec, size_bytes
from swarm.protocol.errors import AdapterError, SwarmError
from swarm.protocol.manifest import Part

log = logging.getLogger(__name__)

FETCH_S = 20.0
"""After so long the client that wants the adapter brings it itself."""

ReadModule = Callable[[ModuleSpec], Awaitable[list[bytes]]]


class CatalogueAdapters:
    """Adapters for one model."""

    def __init__(self, library: Library, model_revision: bytes) -> None:
        self._library = library
        self._model_revision = model_revision

    async def fetch(self, name: str, modules: Sequence[ModuleSpec]) -> ReadModule | None:
        """How to read these modules of ``NAME@REVISION``; None when they are not to be had.

        Never takes more of the disk than the modules themselves have.
        """
        blocks = [module.block for module in modules]
        if not blocks:
            return None
        try:
            async with asyncio.timeout(FETCH_S):
                stored = await self._library.locate(name, "adapter")
                if stored is None or stored.manifest.base_revision != self._model_revision:
                    return None
                parts = stored.manifest.parts_of_blocks(min(blocks), max(blocks) + 1)
                if sum(part.size_bytes for part in parts) > size_bytes(tuple(modules)):
                    return None
                await self._library.fetch(stored, parts)
            return await asyncio.to_thread(_reader, stored, parts)
        except (TimeoutError, SwarmError) as error:
            log.info("the adapter %s cannot be fetched: %s", name, error)
            return None


def _reader(stored: StoredRevision, parts: Sequence[Part]) -> ReadModule:
    """Raises AdapterError for files that are not what an adapter's are."""
    tensors: dict[tuple[int, str], dict[str, tuple[SafetensorsFile, StoredTensor]]] = {}
    for part in parts:
        file = SafetensorsFile.open(stored.folder / part.name, TENSOR_NAME)
        for name, tensor in file.tensors.items():
            match = TENSOR_NAME.fullmatch(name)
            if match is not None:
                place = (int(match["block"]), match["module"])
                kind = match["part"].removesuffix(".weight")
                tensors.setdefault(place, {})[kind] = (file, tensor)

    def read_now(module: ModuleSpec) -> list[bytes]:
        found = tensors.get((module.block, module.name), {})
        kinds = ("lora_A", "lora_B", "lora_magnitude_vector")[: len(module.tensors)]
        if any(kind not in found for kind in kinds):
            raise AdapterError(f"block {module.block}, {module.name}: not in the catalogue's files")
        return [file.read(tensor) for file, tensor in (found[kind] for kind in kinds)]

    async def read(module: ModuleSpec) -> list[bytes]:
        return await asyncio.to_thread(read_now, module)

    return read
