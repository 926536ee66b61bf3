"""Which chunk to ask a peer for next: pure.

Rarest first: what few others hold is asked for first, so that a source that leaves takes as little
as possible with it. Where several are equally rare, each of those who fetch begins with chunks of
its own, drawn from its peer id: together they fetch a revision from its only source once, and the
rest from each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from swarm.catalogue.holdings import ChunkMask
from swarm.protocol.identity import PeerId

Priorities = NDArray[np.float64]
"""One number in ``[0, 1)`` for each chunk, ``[chunks]``."""


def priorities(peer: PeerId, chunks: int) -> Priorities:
    """The order in which a peer begins; the same wherever it is computed."""
    seed = int.from_bytes(hashlib.sha256(peer.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).random(chunks)


def own_chunks(peer: PeerId, fetching: Collection[PeerId], chunks: int) -> ChunkMask:
    """The chunks that ``peer`` begins with, when these others fetch the same revision now."""
    own = priorities(peer, chunks)
    mask: ChunkMask = np.ones(chunks, dtype=np.bool_)
    for other in fetching:
        if other != peer:
            mask &= own <= priorities(other, chunks)
    return mask


def holders(
    held: Sequence[ChunkMask], coming: Sequence[ChunkMask], chunks: int
) -> NDArray[np.int64]:
    """How many peers hold each chunk, or will soon, ``[chunks]``."""
    counts = np.zeros(chunks, dtype=np.int64)
    for mask in (*held, *coming):
        counts += mask
    return counts


def choose_chunk(
    eligible: ChunkMask, counts: NDArray[np.int64], own: ChunkMask, order: Priorities
) -> int | None:
    """The rarest of the eligible chunks; of equally rare ones our own first. None without any."""
    numbers = np.flatnonzero(eligible)
    if not len(numbers):
        return None
    score = 2 * counts[numbers] + ~own[numbers] + order[numbers]
    return int(numbers[np.argmin(score)])
