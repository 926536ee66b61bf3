"""Which adapters a validator's challenges use: of the catalogue, of whom it believes."""

from __future__ import annotations

import random
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.library import Library, LibrarySettings
from swarm.client.validator.adapters import draw_adapter
from swarm.memory_network import MemoryNetwork
from swarm.protocol.identity import Identity, PeerId
from swarm.virtual_time import LoopClock
from tests.adapter_making import make_adapter
from tests.adapter_publisher import Publisher


@pytest.fixture
def checkpoint(make_whole_model: Callable[..., Any], tmp_path: Path) -> Checkpoint:
    """With adapters beside it."""
    whole = make_whole_model("llama", 3)
    whole.save_pretrained(tmp_path / "model")
    for seed, name in enumerate(("kiswahili", "law", "strange")):
        make_adapter(whole, tmp_path / name, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PromptTuningConfig, get_peft_model

        tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        get_peft_model(whole, tuning).save_pretrained(str(tmp_path / "prompt"))
    return Checkpoint.open(tmp_path / "model")


class Catalogue:
    """Two publishers, of whom one is known to nobody."""

    def __init__(self, folder: Path, revision: bytes) -> None:
        self._folder = folder
        names = ("kiswahili", "law", "prompt")
        self.known = Publisher([folder / name for name in names], revision)
        self.stranger = Publisher([folder / "strange"], revision)
        self._network = MemoryNetwork(1, clock=LoopClock())
        self._peer = self._network.join(Identity.generate())

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        folder, clock = self._folder / "theirs", LoopClock()
        async with (
            self.known.serving(self._network, clock, folder),
            self.stranger.serving(self._network, clock, folder),
        ):
            yield

    def library(self, trusted: frozenset[PeerId] | None) -> Library:
        settings = LibrarySettings(self._folder / "ours", trusted=trusted)
        return Library(self._peer, self._peer, LoopClock(), settings)


async def test_what_is_announced_and_signed_by_whom_we_believe(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    catalogue = Catalogue(tmp_path, checkpoint.revision)
    believed = frozenset((catalogue.known.identity.peer_id,))
    hints = catalogue.known.hints
    everything = {*hints.values(), *catalogue.stranger.hints.values(), "ab" * 16}

    async def drawn(
        announced: set[str], trusted: frozenset[PeerId] | None = believed, *, or_any: bool = False
    ) -> set[str]:
        found = set()
        for seed in range(10):
            library = catalogue.library(trusted)
            dice = random.Random(seed)
            files = await draw_adapter(announced, checkpoint, library, dice, or_any=or_any)
            if files is None:
                return set()
            found.add(files.catalogue_name)
        return found

    kiswahili, law = (catalogue.known.reference(name) for name in ("kiswahili", "law"))
    async with catalogue.served():
        # Both that nodes compute with; prompt adapters are the client's affair.
        assert await drawn(everything) == {kiswahili, law}
        assert await drawn({hints["law"]}) == {law}
        assert await drawn({hints["law"]}, or_any=True) == {law}
        # A suspect may have stopped to announce what it was found with.
        assert await drawn(set(), or_any=True) == {kiswahili, law}
        assert await drawn(set()) == set()
        assert await drawn(set(catalogue.stranger.hints.values())) == set()
        # Without anybody to believe, whoever publishes could choose what honest nodes fail with.
        assert await drawn(everything, None) == set()
