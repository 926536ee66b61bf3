"""Chunks on disk: put, checked, completed, found again after crashes, evicted."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.description import describe_model, model_holding
from swarm.catalogue.export import export_revision
from swarm.catalogue.holdings import PlainDirectory
from swarm.catalogue.mirror import FileMirror, write_mirror
from swarm.catalogue.store import Store, StoredRevision
from swarm.ledger.audit_rule import Limits, SpanLimits
from swarm.ledger.calibrated import FILE_NAME, read_limits, to_json
from swarm.protocol.errors import CapacityError, CheckpointError, UsageError
from swarm.protocol.identity import Identity
from swarm.protocol.manifest import Part, sign_manifest


@pytest.fixture
def source(model_directory: Path) -> PlainDirectory:
    checkpoint = Checkpoint.open(model_directory)
    manifest = describe_model(checkpoint, licence="MIT")
    return model_holding(checkpoint, manifest, (sign_manifest(Identity.generate(), manifest),))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def copy(source: PlainDirectory, stored: StoredRevision, parts: tuple[Part, ...]) -> None:
    for chunk in stored.manifest.chunks_of(parts):
        assert stored.put_chunk(chunk, source.read_chunk(chunk))
        stored.keep(chunk)


def test_plain_and_fetched_directories_agree(
    source: PlainDirectory, sharded_directory: Path, store: Store
) -> None:
    manifest = source.manifest
    stored = store.create(manifest, source.signatures)
    copy(source, stored, manifest.parts)
    fetched = Checkpoint.open(stored.folder)
    plain = Checkpoint.open(source.directory)
    assert fetched.revision == plain.revision == Checkpoint.open(sharded_directory).revision
    assert fetched.name == "tiny"
    for name, info in plain.tensors.items():
        left, right = bytearray(info.size_bytes), bytearray(info.size_bytes)
        plain.read_into(info, memoryview(left))
        fetched.read_into(fetched.tensors[name], memoryview(right))
        assert left == right
    assert [part.name for part in manifest.files()] == ["config.json", "tokenizer.json"]


def test_calibrated_limits_are_signed_and_travel_with_the_model(
    model_directory: Path, store: Store
) -> None:
    before = describe_model(Checkpoint.open(model_directory))
    limits = SpanLimits({"bfloat16": {2: Limits(0.01, 0.02), 10: Limits(0.012, 0.025)}})
    (model_directory / FILE_NAME).write_text(to_json(limits), encoding="ascii")
    checkpoint = Checkpoint.open(model_directory)
    manifest = describe_model(checkpoint)
    # Other limits are another manifest, which has to be signed again, of the same weights.
    assert manifest.revision == before.revision
    assert manifest.digest != before.digest
    source = model_holding(checkpoint, manifest)
    stored = store.create(manifest)
    copy(source, stored, manifest.files())
    assert read_limits(stored.folder) == limits
    (part,) = (part for part in manifest.files() if part.name == FILE_NAME)
    (chunk,) = manifest.chunks_of((part,))
    loosened = source.read_chunk(chunk).replace(b"10000", b"30000")
    assert loosened != source.read_chunk(chunk)
    assert not stored.put_chunk(chunk, loosened)


def test_a_part_of_a_model_can_be_opened(source: PlainDirectory, store: Store) -> None:
    manifest = source.manifest
    stored = store.create(manifest)
    copy(source, stored, (*manifest.files(), *manifest.parts_of_blocks(1, 2)))
    checkpoint = Checkpoint.open(stored.folder)
    assert checkpoint.revision == manifest.revision
    assert checkpoint.block_bytes(0) == checkpoint.block_bytes(1)
    info = checkpoint.block_tensors(1)["a.weight"]
    checkpoint.read_into(info, memoryview(bytearray(info.size_bytes)))
    missing = checkpoint.block_tensors(0)["a.weight"]
    with pytest.raises(CheckpointError):
        checkpoint.read_into(missing, memoryview(bytearray(missing.size_bytes)))


def test_wrong_chunks_are_not_kept(source: PlainDirectory, store: Store) -> None:
    stored = store.create(source.manifest)
    content = bytearray(source.read_chunk(3))
    content[7] ^= 1
    assert not stored.put_chunk(3, bytes(content))
    assert not stored.put_chunk(3, source.read_chunk(3)[:-1])
    assert not stored.held.any()


def test_what_survives_a_crash_is_found_by_hashing(source: PlainDirectory, store: Store) -> None:
    manifest = source.manifest
    blocks = manifest.parts_of_blocks(0, 2)
    stored = store.create(manifest)
    first, second, third, *_ = sorted(manifest.chunks_of(blocks))
    for chunk in (first, second, third):
        stored.put_chunk(chunk, source.read_chunk(chunk))
    again = store.open(manifest.digest)
    assert again is not None
    assert not again.held.any()
    assert again.recover(blocks) == 3
    assert [int(chunk) for chunk in again.held.nonzero()[0]] == [first, second, third]


def test_damage_on_the_disk_is_found_and_mended(source: PlainDirectory, store: Store) -> None:
    manifest = source.manifest
    stored = store.create(manifest)
    copy(source, stored, manifest.parts)
    (block,) = manifest.parts_of_blocks(0, 1)
    file = stored.folder / block.name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = store.open(manifest.digest)
    assert again is not None
    again.recover(manifest.parts)
    assert not again.has([block])
    assert int((~again.held).sum()) == 1
    copy(source, again, (block,))
    assert again.has(manifest.parts)


def test_signatures_are_kept_and_added(source: PlainDirectory, store: Store) -> None:
    store.create(source.manifest, source.signatures)
    second = sign_manifest(Identity.generate(), source.manifest)
    store.create(source.manifest, (second,))
    (found,) = store.revisions()
    assert set(found.signatures) == {*source.signatures, second}


def test_the_oldest_parts_give_way_unless_they_are_used(
    source: PlainDirectory, tmp_path: Path
) -> None:
    manifest = source.manifest
    store = Store(tmp_path / "small", limit_bytes=5 * 1024 * 1024)
    stored = store.create(manifest)
    copy(source, stored, manifest.parts)
    (block,) = manifest.parts_of_blocks(0, 1)
    with stored.in_use([block]):
        store.make_room(2 * 1024 * 1024)
        assert stored.has([block])
        assert not stored.has(manifest.parts)
        with pytest.raises(CapacityError):
            store.make_room(4 * 1024 * 1024)
    assert stored.has(manifest.files())
    store.make_room(4 * 1024 * 1024)
    assert not stored.has([block])


async def test_mirror(source: PlainDirectory, tmp_path: Path) -> None:
    folder = tmp_path / "mirror"
    write_mirror(folder, [source])
    write_mirror(folder, [source])
    mirror = FileMirror(str(folder))
    (entry,) = await mirror.entries()
    described = await mirror.manifest(entry.digest)
    assert described is not None
    assert described == (source.manifest, source.signatures)
    digest = source.manifest.chunk_digest(4)
    assert await mirror.chunk(digest, 1 << 20) == source.read_chunk(4)
    assert await mirror.chunk(bytes(32), 1 << 20) is None
    assert await FileMirror(str(tmp_path / "nowhere")).entries() == []
    source.held[0] = False
    with pytest.raises(UsageError, match="not complete"):
        write_mirror(folder, [source])


def test_export(source: PlainDirectory, store: Store, tmp_path: Path) -> None:
    stored = store.create(source.manifest, source.signatures)
    copy(source, stored, source.manifest.parts)
    stored.write_index()
    export_revision(stored, source.manifest.parts, tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").revision == source.manifest.revision
    (tmp_path / "out" / "manifest.json").unlink()
    assert Checkpoint.open(tmp_path / "out").revision == source.manifest.revision
