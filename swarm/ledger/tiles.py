"""The log as static files, for any web server: tiles of hashes, bundles of leaves, a checkpoint.

Paths and contents are those of C2SP tlog-tiles. Full tiles never change; partial ones are written
for each checkpoint, and removed when the full one is there. Files appear whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from swarm.ledger.merkle_tree import HASH_BYTES, MerkleTree
from swarm.ledger.notes import Note
from swarm.protocol.errors import ErrorCode, ProtocolError

TILE_HEIGHT = 8
TILE_WIDTH = 1 << TILE_HEIGHT
MAX_LEAF_BYTES = 65535

Leaves = Callable[[int, int], Sequence[bytes]]
"""From first and end index to the leaves between them."""


def tile_path(level: int | str, index: int, width: int = TILE_WIDTH) -> str:
    """Relative path of a tile; ``level`` is a number, or ``entries`` for bundles of leaves."""
    parts = [f"{index % 1000:03d}"]
    while index >= 1000:
        index //= 1000
        parts.insert(0, f"x{index % 1000:03d}")
    name = "/".join(parts)
    return f"tile/{level}/{name}" + (f".p/{width}" if width < TILE_WIDTH else "")


def tile_hashes(tree: MerkleTree, level: int, index: int, width: int = TILE_WIDTH) -> bytes:
    first = index * TILE_WIDTH
    return b"".join(
        tree.complete(level * TILE_HEIGHT, position) for position in range(first, first + width)
    )


def encode_bundle(leaves: Sequence[bytes]) -> bytes:
    return b"".join(len(leaf).to_bytes(2, "big") + leaf for leaf in leaves)


def decode_bundle(bundle: bytes) -> list[bytes]:
    """Raises ProtocolError(BAD_FIELD) for half an entry or too many."""
    leaves: list[bytes] = []
    position = 0
    while position < len(bundle):
        size = int.from_bytes(bundle[position : position + 2], "big")
        leaf = bundle[position + 2 : position + 2 + size]
        if position + 2 + size > len(bundle) or len(leaves) == TILE_WIDTH:
            raise ProtocolError(ErrorCode.BAD_FIELD, "the bundle of leaves is malformed")
        leaves.append(leaf)
        position += 2 + size
    return leaves


class TileFiles:
    """A folder that holds the log up to some size. Writing again what is there does nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._size = 0
        folder.mkdir(parents=True, exist_ok=True)

    def publish(self, tree: MerkleTree, leaves: Leaves, size: int, checkpoint: Note) -> None:
        """Write all tiles that a tree of ``size`` leaves has, and then the checkpoint."""
        for level in range(0, max(1, size.bit_length()), TILE_HEIGHT):
            count = size >> level
            done = self._size >> level
            for index in range(done // TILE_WIDTH, -(-count // TILE_WIDTH)):
                width = min(TILE_WIDTH, count - index * TILE_WIDTH)
                self._write_tile(level // TILE_HEIGHT, index, width, tree, leaves)
        self._write("checkpoint", str(checkpoint).encode())
        self._size = size

    def _write_tile(
        self, level: int, index: int, width: int, tree: MerkleTree, leaves: Leaves
    ) -> None:
        path = tile_path(level, index, width)
        if not (self._folder / path).exists():
            self._write(path, tile_hashes(tree, level, index, width))
            if width == TILE_WIDTH:
                self._remove_partial(level, index)
        if level == 0:
            path = tile_path("entries", index, width)
            if not (self._folder / path).exists():
                first = index * TILE_WIDTH
                self._write(path, encode_bundle(leaves(first, first + width)))
                if width == TILE_WIDTH:
                    self._remove_partial("entries", index)

    def _remove_partial(self, level: int | str, index: int) -> None:
        folder = (self._folder / tile_path(level, index, 1)).parent
        if folder.exists():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()

    def _write(self, path: str, content: bytes) -> None:
        target = self._folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(target.name + ".draft")
        draft.write_bytes(content)
        os.replace(draft, target)


def split_tile(tile: bytes) -> list[bytes]:
    """The hashes of a tile. Raises ProtocolError(BAD_FIELD)."""
    if not tile or len(tile) % HASH_BYTES or len(tile) > TILE_WIDTH * HASH_BYTES:
        raise ProtocolError(ErrorCode.BAD_FIELD, "the tile is malformed")
    return [tile[start : start + HASH_BYTES] for start in range(0, len(tile), HASH_BYTES)]
