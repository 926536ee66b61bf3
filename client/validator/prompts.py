"""A validator's own texts, cut into pieces that are used once: pure.

What was used is remembered by hashes of sentences and not by places in a file, so that texts may be
added, moved and given again without any sentence being sent twice.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from swarm.protocol.errors import UsageError

DIGEST_BYTES = 16
LONGEST_SENTENCE = 1000
"""Characters; what is longer is cut."""
LEAST_LETTERS = 12
"""Shorter sentences are left out: others may have said them as well."""
_ENDS = re.compile(r"(?<=[.!?\u2026\u0964\u061f])\s+|(?<=[\u3002\uff01\uff1f])|\n\s*\n")


@dataclass(frozen=True, slots=True)
class Piece:
    """Some sentences that follow on each other, and their hashes."""

    text: str
    digests: tuple[bytes, ...]


class PrivateTexts:
    """Sentences that were not used yet."""

    def __init__(self, texts: Iterable[str], used: Collection[bytes]) -> None:
        """Raises UsageError when nothing is left."""
        self._sentences: list[tuple[bytes, str]] = []
        seen = set(used)
        known = 0
        for text in texts:
            for sentence in _sentences(text):
                known += 1
                digest = _digest(sentence)
                if digest not in seen:
                    seen.add(digest)
                    self._sentences.append((digest, sentence))
        if not self._sentences:
            raise UsageError(
                "all sentences of these texts were used; add more text to --prompts"
                if known
                else "there is no text in --prompts: give files with some pages that only you have"
            )

    @property
    def sentences_left(self) -> int:
        return len(self._sentences)

    def take(self, characters: int, dice: random.Random) -> Piece:
        """About so many characters from a place by lot; they are gone from here then.

        Raises UsageError when nothing is left.
        """
        if not self._sentences:
            raise UsageError("all sentences of the texts were used; add more text to --prompts")
        start = end = dice.randrange(len(self._sentences))
        length = 0
        while end < len(self._sentences) and (end == start or length < characters):
            length += len(self._sentences[end][1]) + 1
            end += 1
        taken = self._sentences[start:end]
        del self._sentences[start:end]
        text = " ".join(sentence for _, sentence in taken)
        return Piece(text, tuple(digest for digest, _ in taken))


def _sentences(text: str) -> Iterable[str]:
    for sentence in _ENDS.split(text):
        plain = " ".join(sentence.split())
        for start in range(0, len(plain), LONGEST_SENTENCE):
            part = plain[start : start + LONGEST_SENTENCE].strip()
            if sum(map(str.isalpha, part)) >= LEAST_LETTERS:
                yield part


def _digest(sentence: str) -> bytes:
    """The same for the same words, however they are written."""
    plain = "".join(filter(str.isalnum, sentence.casefold()))
    return hashlib.sha256(plain.encode()).digest()[:DIGEST_BYTES]
