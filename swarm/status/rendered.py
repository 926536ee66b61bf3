"""Answers made once and sent often: bytes, their compressed form and their tag."""

from __future__ import annotations

import gzip
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass

MOST_ANSWERS = 256
SMALLEST_COMPRESSED = 600
COMPRESSION_LEVEL = 5


@dataclass(frozen=True, slots=True)
class Rendered:
    """One answer."""

    body: bytes
    compressed: bytes | None
    content_type: str
    tag: str

    @classmethod
    def of(cls, body: bytes, content_type: str) -> Rendered:
        worth_it = len(body) >= SMALLEST_COMPRESSED
        return cls(
            body,
            gzip.compress(body, COMPRESSION_LEVEL, mtime=0) if worth_it else None,
            content_type,
            f'"{hashlib.sha256(body).hexdigest()[:24]}"',
        )


class RenderedAnswers:
    """Those of the latest snapshot, the most recently used ones."""

    def __init__(self) -> None:
        self._version: Hashable = None
        self._answers: OrderedDict[Hashable, Rendered] = OrderedDict()

    async def get(
        self, version: Hashable, key: Hashable, make: Callable[[], Awaitable[Rendered]]
    ) -> Rendered:
        """The answer for ``key``, made now if there is none of this version."""
        if version != self._version:
            self._version = version
            self._answers.clear()
        known = self._answers.get(key)
        if known is not None:
            self._answers.move_to_end(key)
            return known
        made = await make()
        if version == self._version:
            self._answers[key] = made
            if len(self._answers) > MOST_ANSWERS:
                self._answers.popitem(last=False)
        return made
