"""Answers that must be JSON: which tokens may come next, by llguidance.

A constraint follows one answer, token by token, and is torch work for the head's thread. What it
allows always leads to a whole document, so only the limit of tokens can cut one off.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from swarm.protocol.errors import UsageError

ANY_OBJECT = '{"type": "object"}'
"""The JSON schema of OpenAI's ``json_object``."""

WHITESPACE = r"[ \n]{0,16}"
"""Between JSON tokens. Without a bound small models end in endless blank lines."""


class Constraint(Protocol):
    """Allows tokens of one answer."""

    def allowed(self) -> torch.Tensor:
        """``[vocabulary]``, bool: what may come next. Never all False."""

    def add(self, token_id: int) -> None:
        """``token_id`` was chosen."""


class JsonConstraints:
    """Makes constraints for one tokenizer, whose vocabulary is compiled once, when first asked."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_token_ids = end_token_ids
        self._compiled: Any = None
        self._lock = threading.Lock()

    def follow(self, json_schema: str) -> Constraint:
        """For a new answer. Takes a second the first time. Raises UsageError for the schema."""
        with self._lock:
            if self._compiled is None:
                self._compiled = from_tokenizer(
                    self._tokenizer,
                    n_vocab=self._vocabulary,
                    eos_token=sorted(self._end_token_ids) or None,
                )
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                json_schema, overrides={"whitespace_pattern": WHITESPACE}
            )
        except ValueError as error:
            raise UsageError(f"the JSON schema cannot be used: {error}") from None
        matcher = LLMatcher(self._compiled, grammar, log_level=0)
        if matcher.is_error():
            raise UsageError(f"the JSON schema cannot be used: {_first_line(matcher.get_error())}")
        return _Followed(matcher)


class _Followed:
    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> torch.Tensor:
        bias = bytearray(self._matcher.compute_logit_bias())
        return torch.frombuffer(bias, dtype=torch.uint8) > 0

    def add(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise RuntimeError("a token was chosen that the constraint does not allow")


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else "unknown error"
