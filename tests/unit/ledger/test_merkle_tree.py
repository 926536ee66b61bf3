"""The tree against the definitions of RFC 6962, written down as they stand there."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.ledger.merkle_tree import MerkleTree
from swarm.protocol.errors import ProtocolError
from swarm.protocol.merkle import check_consistency, check_inclusion, leaf_hash, root_of

LEAVES = [leaf_hash(b"%d" % number) for number in range(300)]


def defined_root(leaves: list[bytes]) -> bytes:
    if len(leaves) <= 1:
        return leaves[0] if leaves else sha256(b"").digest()
    middle = 1
    while middle * 2 < len(leaves):
        middle *= 2
    return sha256(b"\1" + defined_root(leaves[:middle]) + defined_root(leaves[middle:])).digest()


def defined_path(index: int, leaves: list[bytes]) -> list[bytes]:
    if len(leaves) == 1:
        return []
    middle = 1
    while middle * 2 < len(leaves):
        middle *= 2
    if index < middle:
        return [*defined_path(index, leaves[:middle]), defined_root(leaves[middle:])]
    return [*defined_path(index - middle, leaves[middle:]), defined_root(leaves[:middle])]


def test_roots_of_all_sizes() -> None:
    tree = MerkleTree()
    for size in range(130):
        assert tree.root() == defined_root(LEAVES[:size]) == root_of(LEAVES[:size])
        tree.append(LEAVES[size])
    for size in range(130):
        assert tree.root(size) == defined_root(LEAVES[:size])


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))))
def test_inclusion_proofs(place: tuple[int, int]) -> None:
    index, size = place
    tree = MerkleTree(LEAVES)
    proof = tree.inclusion_proof(index, size)
    assert proof == defined_path(index, LEAVES[:size])
    check_inclusion(index, size, LEAVES[index], proof, tree.root(size))
    with pytest.raises(ProtocolError):
        check_inclusion(index, size, LEAVES[index - 1] + b"", [*proof, b"x"], tree.root(size))


@given(st.integers(0, 300), st.integers(0, 300))
def test_consistency_proofs(one: int, other: int) -> None:
    old_size, size = sorted((one, other))
    tree = MerkleTree(LEAVES)
    proof = tree.consistency_proof(old_size, size)
    check_consistency(old_size, tree.root(old_size), size, tree.root(size), proof)
    if 0 < old_size < size:
        with pytest.raises(ProtocolError):
            check_consistency(old_size, LEAVES[0], size, LEAVES[1], proof)


def test_there_is_nothing_beyond_its_size() -> None:
    tree = MerkleTree(LEAVES[:5])
    for call in (
        lambda: tree.root(6),
        lambda: tree.inclusion_proof(5),
        lambda: tree.inclusion_proof(-1),
        lambda: tree.consistency_proof(4, 3),
        lambda: tree.complete(1, 2),
    ):
        with pytest.raises(IndexError):
            call()
