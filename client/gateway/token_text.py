"""Single tokens as text and bytes, for log probabilities: a token may be part of a character."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from swarm.client.text_stream import REPLACEMENT


class TokenTexts:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Any, end_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.end_token_ids = end_token_ids

    def describe(self, token_id: int, logprob: float) -> dict[str, Any]:
        """OpenAI's object: ``token``, ``logprob``, ``bytes``."""
        text = str(self._tokenizer.decode([token_id]))
        content = self._bytes(token_id) if REPLACEMENT in text else text.encode()
        return {
            "token": text,
            # JSON has no infinity; a token that was ruled out is as unlikely as can be said.
            "logprob": max(logprob, -9999.0),
            "bytes": None if content is None else list(content),
        }

    def _bytes(self, token_id: int) -> bytes | None:
        """Of a token that is no text by itself; None where the tokenizer hides them."""
        token = str(self._tokenizer.convert_ids_to_tokens(token_id))
        if token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:-1], 16)])
        try:
            return bytes(self._byte_letters[letter] for letter in token)
        except KeyError:
            return None

    @cached_property
    def _byte_letters(self) -> dict[str, int]:
        """How byte-level tokenizers write bytes: printable Latin-1 as itself, the rest from 256."""
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in plain]
        letters = {chr(byte): byte for byte in plain}
        return letters | {chr(256 + place): byte for place, byte in enumerate(others)}
