"""Weights from peers: what joins cost, and that they end well whatever peers do."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable
from typing import Any

import pytest

from swarm import virtual_time
from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.download import DownloadLimits
from swarm.catalogue.store import Store
from swarm.protocol.errors import NetworkError
from swarm.protocol.manifest import Manifest

RATE = 1024 * 1024.0


def check(fetcher: Any, manifest: Manifest) -> None:
    """Everything is complete, and right byte for byte."""
    assert fetcher.stored.has(manifest.parts)
    for chunk in range(manifest.number_of_chunks):
        content = fetcher.stored.read_chunk(chunk)
        assert hashlib.sha256(content).digest() == manifest.chunk_digest(chunk)
    assert Checkpoint.open(fetcher.stored.folder).revision == manifest.revision


def test_one_fetches_from_one(make_lab: Callable[..., Any], manifest: Manifest) -> None:
    async def scenario() -> None:
        lab = make_lab()
        await lab.holder()
        fetcher = await lab.fetcher()
        await fetcher.download.run()
        check(fetcher, manifest)
        assert fetcher.download.received_bytes == manifest.total_bytes

    virtual_time.run(scenario())


def test_four_joins_cost_the_source_less_than_twice_the_model(
    make_lab: Callable[..., Any], manifest: Manifest, all_run: Callable[..., Any]
) -> None:
    """Every peer sends and receives at the same rate, so one copy is the floor.

    With 18 chunks one more or less is much; larger models come closer (scripts.bench.weights).
    """

    async def scenario() -> None:
        lab = make_lab(rate_bytes_per_s=RATE)
        _, source = await lab.holder()
        fetchers = [await lab.fetcher() for _ in range(4)]
        started_s = lab.clock.monotonic_s()
        await all_run(*(fetcher.download.run() for fetcher in fetchers))
        took_s = lab.clock.monotonic_s() - started_s
        for fetcher in fetchers:
            check(fetcher, manifest)
        assert source.sent.bytes < 2 * manifest.total_bytes
        assert took_s <= 1.5 * manifest.total_bytes / RATE

    virtual_time.run(scenario())


def test_only_the_parts_that_are_wanted_travel(
    make_lab: Callable[..., Any], manifest: Manifest
) -> None:
    async def scenario() -> None:
        lab = make_lab()
        _, source = await lab.holder()
        wanted = (*manifest.files(), *manifest.parts_of_blocks(1, 3))
        fetcher = await lab.fetcher(wanted)
        await fetcher.download.run()
        assert source.sent.bytes == sum(part.size_bytes for part in wanted)
        assert fetcher.stored.has(wanted)
        assert not fetcher.stored.has(manifest.parts_of_blocks(0, 1))

    virtual_time.run(scenario())


class Liar:
    """Holds everything, and changes one byte of every chunk that it sends."""

    def __init__(self, truth: Any) -> None:
        self._truth = truth

    def __getattr__(self, name: str) -> Any:
        return getattr(self._truth, name)

    def read_chunk(self, chunk: int) -> bytes:
        content = bytearray(self._truth.read_chunk(chunk))
        content[len(content) // 2] ^= 1
        return bytes(content)


def test_a_liar_is_found_and_left(
    make_lab: Callable[..., Any], manifest: Manifest, all_run: Callable[..., Any]
) -> None:
    async def scenario() -> None:
        lab = make_lab(rate_bytes_per_s=RATE)
        _, service = await lab.holder()
        truth = service._holdings()[manifest.digest]
        liar, _ = await lab.holder(Liar(truth))
        fetchers = [await lab.fetcher() for _ in range(2)]
        await all_run(*(fetcher.download.run() for fetcher in fetchers))
        for fetcher in fetchers:
            check(fetcher, manifest)
            assert fetcher.download.liars == {liar.peer_id}

    virtual_time.run(scenario())


def test_a_peer_that_stalls_holds_nobody_up(
    make_lab: Callable[..., Any], manifest: Manifest
) -> None:
    async def scenario() -> None:
        lab = make_lab(rate_bytes_per_s=RATE)
        await lab.holder()
        _, service = await lab.holder()

        async def never(function: Any, *arguments: Any) -> None:
            await asyncio.sleep(24 * 3600)

        service._in_thread = never
        fetcher = await lab.fetcher()
        await fetcher.download.run()
        check(fetcher, manifest)
        assert lab.clock.monotonic_s() < 1.5 * manifest.total_bytes / RATE + 15

    virtual_time.run(scenario())


@pytest.mark.parametrize("seed", range(6))
def test_crashes_outages_and_liars_at_random_moments(
    make_lab: Callable[..., Any], manifest: Manifest, seed: int, all_run: Callable[..., Any]
) -> None:
    """A source dies, the joiner dies and starts again, all links are cut for 30 s."""

    async def scenario() -> None:
        dice = random.Random(seed)
        lab = make_lab(rate_bytes_per_s=RATE, seed=seed)
        first, service = await lab.holder()
        second, _ = await lab.holder()
        await lab.holder(Liar(service._holdings()[manifest.digest]))
        other = await lab.fetcher()
        joiner = await lab.fetcher()
        span_s = manifest.total_bytes / RATE

        async def trouble() -> None:
            await lab.clock.sleep(dice.uniform(0, span_s / 2))
            lab.network.crash(second.peer_id)
            await lab.clock.sleep(dice.uniform(0, span_s / 4))
            for peer in (first, other.peer):
                lab.network.cut(joiner.peer.peer_id, peer.peer_id)
            await lab.clock.sleep(30)
            lab.network.heal()

        async with asyncio.TaskGroup() as group:
            group.create_task(trouble())
            group.create_task(other.download.run())
            fetching = group.create_task(joiner.download.run())
            await lab.clock.sleep(dice.uniform(0, span_s))
            fetching.cancel()
            await asyncio.wait([fetching])
            held_before = int(joiner.stored.held.sum())
            lab.network.crash(joiner.peer.peer_id)
            again = await lab.fetcher(store=_store_of(joiner))
            assert int(again.stored.held.sum()) == held_before
            await again.download.run()
        check(other, manifest)
        check(again, manifest)

    virtual_time.run(scenario())


def _store_of(fetcher: Any) -> Store:
    return Store(fetcher.stored.folder.parent)


def test_without_a_source_it_says_so(make_lab: Callable[..., Any]) -> None:
    async def scenario() -> None:
        lab = make_lab(limits=DownloadLimits(give_up_s=60.0))
        fetcher = await lab.fetcher()
        with pytest.raises(NetworkError, match="could not be fetched"):
            await fetcher.download.run()
        assert 60 <= lab.clock.monotonic_s() < 70

    virtual_time.run(scenario())
