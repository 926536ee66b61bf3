"""The log as files: enough for anybody to compute every root and every leaf."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.ledger.merkle_tree import MerkleTree
from swarm.ledger.notes import Note
from swarm.ledger.tiles import TileFiles, decode_bundle, encode_bundle, split_tile, tile_path
from swarm.protocol.errors import ProtocolError
from swarm.protocol.merkle import leaf_hash, root_of

LEAVES = [b"leaf %d" % number for number in range(70_000)]
TREE = MerkleTree(leaf_hash(leaf) for leaf in LEAVES)
NOTE = Note("text\n", ())


def leaves(start: int, end: int) -> list[bytes]:
    return LEAVES[start:end]


def test_paths_of_the_specification() -> None:
    assert tile_path(0, 1234067) == "tile/0/x001/x234/067"
    assert tile_path(2, 0, 1) == "tile/2/000.p/1"
    assert tile_path("entries", 999) == "tile/entries/999"


def test_the_tiles_of_70_000_leaves(tmp_path: Path) -> None:
    """The example in the specification, counted there."""
    TileFiles(tmp_path).publish(TREE, leaves, 70_000, NOTE)
    level_0 = sorted(path for path in (tmp_path / "tile/0").rglob("*") if path.is_file())
    assert len(level_0) == 274
    assert (tmp_path / tile_path(0, 273, 112)).stat().st_size == 112 * 32
    assert (tmp_path / tile_path(1, 0)).stat().st_size == 8192
    assert (tmp_path / tile_path(1, 1, 17)).stat().st_size == 17 * 32
    assert (tmp_path / tile_path(2, 0, 1)).stat().st_size == 32
    assert not (tmp_path / "tile/3").exists()
    hashes = [
        *split_tile((tmp_path / tile_path(1, 0)).read_bytes()),
        *split_tile((tmp_path / tile_path(1, 1, 17)).read_bytes()),
        root_of(split_tile((tmp_path / tile_path(0, 273, 112)).read_bytes())),
    ]
    # complete tiles are complete subtrees, so their roots combine like leaves
    assert root_of(hashes) == TREE.root()


def test_growing_leaves_whole_files_and_no_old_parts(tmp_path: Path) -> None:
    files = TileFiles(tmp_path)
    for size in (0, 1, 5, 255, 256, 257, 600):
        files.publish(TREE, leaves, size, NOTE)
    restarted = TileFiles(tmp_path)
    restarted.publish(TREE, leaves, 600, NOTE)
    assert not (tmp_path / "tile/0/000.p").exists()
    assert not (tmp_path / "tile/0/001.p").exists()
    assert (tmp_path / tile_path(0, 2, 88)).exists()
    bundles = [tile_path("entries", 0), tile_path("entries", 1), tile_path("entries", 2, 88)]
    read = [leaf for path in bundles for leaf in decode_bundle((tmp_path / path).read_bytes())]
    assert read == LEAVES[:600]
    assert (tmp_path / "checkpoint").read_text() == str(NOTE)
    assert not list(tmp_path.rglob("*.draft"))


def test_malformed_bundles_and_tiles() -> None:
    assert decode_bundle(encode_bundle([b"", b"a"])) == [b"", b"a"]
    for bundle in (b"\0", b"\0\2a", b"\0\0" * 257):
        with pytest.raises(ProtocolError):
            decode_bundle(bundle)
    for tile in (b"", b"a" * 33, b"a" * 32 * 257):
        with pytest.raises(ProtocolError):
            split_tile(tile)
