"""What a hop shows of a session, and whether it can have happened: checks without any computing.

A hop's receipt binds its transcript, the transcript binds what it was given and what it answered,
by hash. So a hop cannot show other outputs than those it sent on without contradicting its own
signature, or the next hop's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from swarm.ledger.transcript import LINKS_KEPT, Link, first_head, next_head
from swarm.protocol.ledger_objects import Receipt
from swarm.protocol.tensors import ITEM_BYTES, WireTensor


@dataclass(frozen=True, slots=True)
class ShownWork:
    """The answer to ReadTranscript. ``outputs`` is None where the hop keeps none."""

    start: bytes
    links: tuple[Link, ...]
    outputs: WireTensor | None


def bound_links(
    shown: ShownWork, receipt: Receipt, session_id: bytes, policy: bytes = b""
) -> tuple[Link, ...] | None:
    """The links up to the head that the hop has signed; None when they do not lead there.

    A node keeps so many links that a session of moderate length is shown from its beginning.
    """
    if receipt.steps <= LINKS_KEPT // 2 and shown.start != first_head(session_id, policy):
        return None
    head, wanted = shown.start, bytes.fromhex(receipt.transcript)
    for index, link in enumerate(shown.links):
        if head == wanted:
            return shown.links[:index]
        head = next_head(head, link)
    return shown.links if head == wanted else None


@dataclass(frozen=True, slots=True)
class Kept:
    """A link of which the first ``tokens`` positions are still in the cache."""

    link: Link
    tokens: int

    @property
    def end(self) -> int:
        return self.link.position + self.tokens

    @property
    def is_whole(self) -> bool:
        """Whether its hashes can be checked: after a rollback into it they cannot."""
        return self.tokens == self.link.tokens


def in_force(links: Sequence[Link]) -> list[Kept]:
    """What of the links was not rolled back, ascending by position."""
    standing: list[Kept] = []
    for link in links:
        while standing and standing[-1].end > link.position:
            cut = standing.pop()
            if cut.link.position < link.position:
                standing.append(Kept(cut.link, link.position - cut.link.position))
        standing.append(Kept(link, link.tokens))
    return standing


def covered_from(standing: Sequence[Kept], length: int) -> int:
    """The position from which on links in force cover everything up to ``length``."""
    first = length
    for kept in reversed(standing):
        if kept.end < first:
            break
        first = min(first, kept.link.position)
    return first


def slice_hash(tensor: WireTensor, first: int, end: int) -> bytes:
    """SHA-256 of positions ``first .. end`` of ``[rows, tokens, hidden]``."""
    rows, tokens, hidden = tensor.shape
    size = hidden * ITEM_BYTES[tensor.dtype]
    view = memoryview(tensor.data)
    digest = hashlib.sha256()
    for row in range(rows):
        start = row * tokens
        digest.update(view[(start + first) * size : (start + end) * size])
    return digest.digest()


def outputs_fit(standing: Iterable[Kept], outputs: WireTensor) -> bool:
    """Whether outputs are those of the links, as far as there are both."""
    return all(
        slice_hash(outputs, kept.link.position, kept.end) == kept.link.output_hash
        for kept in standing
        if kept.is_whole and kept.end <= outputs.shape[1]
    )


def inputs_fit(standing: Iterable[Kept], inputs: WireTensor) -> bool:
    """Whether inputs are those of the links, as far as there are both."""
    return all(
        slice_hash(inputs, kept.link.position, kept.end) == kept.link.input_hash
        for kept in standing
        if kept.is_whole and kept.end <= inputs.shape[1]
    )
