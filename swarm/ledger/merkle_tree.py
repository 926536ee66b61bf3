"""The Merkle tree of RFC 6962 in memory: roots and proofs, of any earlier size too.

Every complete subtree is kept, 64 bytes a leaf: a million events are 64 MB. What a verifier needs
is in `protocol/merkle`.
"""

from __future__ import annotations

from collections.abc import Iterable

from swarm.protocol.merkle import EMPTY_ROOT, node_hash

HASH_BYTES = 32


class MerkleTree:
    """An append-only tree. Asks about earlier sizes are answered as well as about the newest."""

    def __init__(self, leaf_hashes: Iterable[bytes] = ()) -> None:
        self._levels = [bytearray()]
        """Level k has the hashes of the complete subtrees of 2^k leaves, one after the other."""
        for digest in leaf_hashes:
            self.append(digest)

    @property
    def size(self) -> int:
        return len(self._levels[0]) // HASH_BYTES

    def append(self, digest: bytes) -> int:
        """Add a leaf by its hash, and return its index."""
        added = index = self.size
        levels = self._levels
        levels[0] += digest
        level = 0
        while index & 1:
            start = (index - 1) * HASH_BYTES
            digest = node_hash(bytes(levels[level][start : start + HASH_BYTES]), digest)
            level += 1
            index >>= 1
            if level == len(levels):
                levels.append(bytearray())
            levels[level] += digest
        return added

    def complete(self, level: int, index: int) -> bytes:
        """The hash over leaves [index * 2^level, (index + 1) * 2^level), all of which exist."""
        digest = bytes(self._levels[level][index * HASH_BYTES : (index + 1) * HASH_BYTES])
        if len(digest) != HASH_BYTES:
            raise IndexError("this subtree is not complete yet")
        return digest

    def root(self, size: int | None = None) -> bytes:
        """The root over the first ``size`` leaves; of all of them by default."""
        size = self._checked_size(size)
        return EMPTY_ROOT if size == 0 else self._range_root(0, size)

    def inclusion_proof(self, index: int, size: int | None = None) -> list[bytes]:
        """Hashes from the leaf's sibling up to the root's child (RFC 6962, 2.1.1)."""
        size = self._checked_size(size)
        if not 0 <= index < size:
            raise IndexError("the tree has no such leaf")
        proof = []
        start, end = 0, size
        while end - start > 1:
            middle = start + _largest_power_below(end - start)
            if index < middle:
                proof.append(self._range_root(middle, end))
                end = middle
            else:
                proof.append(self._range_root(start, middle))
                start = middle
        return proof[::-1]

    def consistency_proof(self, old_size: int, size: int | None = None) -> list[bytes]:
        """Shows that the first ``old_size`` leaves have not changed (RFC 6962, 2.1.2)."""
        size = self._checked_size(size)
        if not 0 <= old_size <= size:
            raise IndexError("a tree is consistent with smaller ones only")
        if old_size in (0, size):
            return []
        proof = []
        start, end, known = 0, size, True
        while old_size != end:
            middle = start + _largest_power_below(end - start)
            if old_size <= middle:
                proof.append(self._range_root(middle, end))
                end = middle
            else:
                proof.append(self._range_root(start, middle))
                start, known = middle, False
        if not known:
            proof.append(self._range_root(start, end))
        return proof[::-1]

    def _checked_size(self, size: int | None) -> int:
        if size is None:
            return self.size
        if not 0 <= size <= self.size:
            raise IndexError("the tree has not so many leaves")
        return size

    def _range_root(self, start: int, end: int) -> bytes:
        """Over leaves [start, end); start is a multiple of a power of two that is not shorter."""
        complete = []
        while start < end:
            level = (end - start).bit_length() - 1
            complete.append(self.complete(level, start >> level))
            start += 1 << level
        root = complete[-1]
        for digest in reversed(complete[:-1]):
            root = node_hash(digest, root)
        return root


def _largest_power_below(count: int) -> int:
    """The largest power of two smaller than ``count`` >= 2."""
    return 1 << ((count - 1).bit_length() - 1)
