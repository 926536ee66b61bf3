"""The hash chain over what a node handled in a session; receipts carry its head.

``H_0 = SHA256(session id || policy)``, the policy as the session was opened with it, so that a
receipt also says which policy was kept; each step and each replay adds a link
``H = SHA256(H || step || position || tokens || SHA256(input) || SHA256(output))`` with numbers of 8
bytes, big endian; a replay has step 0. Input and output are the tensors' bytes as they travel
without compression. A node that keeps its links can show later what it was given and what it
answered, and cannot show anything else.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.messages import LINK_BYTES
from swarm.protocol.tensors import WireTensor

_NUMBERS = struct.Struct(">QQQ")
LINKS_KEPT = 2048


def tensor_hash(tensor: WireTensor) -> bytes:
    """SHA-256 of the elements, little endian, without compression."""
    return hashlib.sha256(tensor.data).digest()


@dataclass(frozen=True, slots=True)
class Link:
    """One step (or, with number 0, one replay) of a session on one node."""

    step: int
    position: int
    tokens: int
    input_hash: bytes
    output_hash: bytes

    def to_bytes(self) -> bytes:
        numbers = _NUMBERS.pack(self.step, self.position, self.tokens)
        return numbers + self.input_hash + self.output_hash

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises ProtocolError(BAD_FIELD) for another size."""
        if len(data) != LINK_BYTES:
            raise ProtocolError(ErrorCode.BAD_FIELD, "size of a link")
        step, position, tokens = _NUMBERS.unpack_from(data)
        return cls(step, position, tokens, data[-64:-32], data[-32:])


def first_head(session_id: bytes, policy: bytes = b"") -> bytes:
    """Where a session's transcript begins; ``policy`` is that of its OpenSession."""
    return hashlib.sha256(session_id + policy).digest()


def next_head(head: bytes, link: Link) -> bytes:
    return hashlib.sha256(head + link.to_bytes()).digest()


def head_of(start: bytes, links: Iterable[Link]) -> bytes:
    """Where ``links`` lead from ``start``."""
    head = start
    for link in links:
        head = next_head(head, link)
    return head


class Transcript:
    """A node's chain of one session; keeps the latest links, bounded."""

    def __init__(self, session_id: bytes, policy: bytes = b"") -> None:
        self.head = first_head(session_id, policy)
        self.length = 0
        self._links: deque[Link] = deque()
        self._kept_from = self.head

    def add(self, *, step: int, position: int, given: WireTensor, answered: WireTensor) -> None:
        """Note what was computed: uncompressed input and output."""
        link = Link(step, position, given.shape[1], tensor_hash(given), tensor_hash(answered))
        self.head = next_head(self.head, link)
        self.length += 1
        self._links.append(link)
        if len(self._links) > LINKS_KEPT:
            self._kept_from = next_head(self._kept_from, self._links.popleft())

    def read(self) -> tuple[bytes, tuple[Link, ...]]:
        """The head before the first link that is kept, and the links."""
        return self._kept_from, tuple(self._links)
