"""Merkle trees as in RFC 6962: roots, inclusion and consistency, checked without the leaves.

Whoever keeps a large tree keeps it elsewhere; this is what both sides of a proof must agree on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from swarm.protocol.errors import ErrorCode, ProtocolError

EMPTY_ROOT = hashlib.sha256(b"").digest()


def leaf_hash(leaf: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def root_of(leaf_hashes: Sequence[bytes]) -> bytes:
    """The root over hashes of leaves, in one pass."""
    if not leaf_hashes:
        return EMPTY_ROOT
    level = list(leaf_hashes)
    while len(level) > 1:
        paired = [
            node_hash(level[index], level[index + 1]) for index in range(0, len(level) - 1, 2)
        ]
        if len(level) % 2:
            paired.append(level[-1])
        level = paired
    return level[0]


def root_from_inclusion(index: int, size: int, leaf: bytes, proof: Sequence[bytes]) -> bytes:
    """The root that a proof leads to (RFC 9162, 2.1.3.2); ``leaf`` is a leaf's hash.

    Raises ProtocolError(BAD_PROOF) for a proof of the wrong length.
    """
    if not 0 <= index < size:
        raise ProtocolError(ErrorCode.BAD_PROOF, f"leaf {index} of {size}")
    position, last, node = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            raise ProtocolError(ErrorCode.BAD_PROOF, "the proof is too long")
        if position % 2 or position == last:
            node = node_hash(sibling, node)
            while position % 2 == 0 and position:
                position, last = position >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        position, last = position >> 1, last >> 1
    if last:
        raise ProtocolError(ErrorCode.BAD_PROOF, "the proof is too short")
    return node


def check_inclusion(
    index: int, size: int, leaf: bytes, proof: Sequence[bytes], root: bytes
) -> None:
    """Raise ProtocolError(BAD_PROOF) unless ``leaf`` (a hash) is at ``index`` of the tree."""
    if root_from_inclusion(index, size, leaf, proof) != root:
        raise ProtocolError(ErrorCode.BAD_PROOF, "the proof leads to another root")


def check_consistency(
    old_size: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]
) -> None:
    """Raise ProtocolError(BAD_PROOF) unless the tree only grew (RFC 9162, 2.1.4.2)."""
    if not 0 <= old_size <= size:
        raise ProtocolError(ErrorCode.BAD_PROOF, f"from {old_size} to {size}")
    if old_size in (0, size):
        if proof or (old_size == size and old_root != root):
            raise ProtocolError(ErrorCode.BAD_PROOF, "the trees differ")
        return
    path = list(proof)
    if old_size & (old_size - 1) == 0:
        path.insert(0, old_root)
    if not path:
        raise ProtocolError(ErrorCode.BAD_PROOF, "the proof is too short")
    first, second = old_size - 1, size - 1
    while first % 2:
        first, second = first >> 1, second >> 1
    old = new = path[0]
    for sibling in path[1:]:
        if second == 0:
            raise ProtocolError(ErrorCode.BAD_PROOF, "the proof is too long")
        if first % 2 or first == second:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while first % 2 == 0 and first:
                first, second = first >> 1, second >> 1
        else:
            new = node_hash(new, sibling)
        first, second = first >> 1, second >> 1
    if second or old != old_root or new != root:
        raise ProtocolError(ErrorCode.BAD_PROOF, "the log is not what it was with more behind it")
