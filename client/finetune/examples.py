"""Training data: lines of JSON to token ids, and the order in which they are learned.

Examples stay on this computer. The order follows from the seed alone, so that a training that goes
on after a crash sees what the undisturbed one would have seen. Free of torch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Protocol

from swarm.protocol.errors import UsageError

MAXIMUM_LINE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence; tokens from ``first_learned`` on are learned, those before are given."""

    token_ids: tuple[int, ...]
    first_learned: int

    @property
    def learned(self) -> int:
        """How many tokens it teaches; the first of a text has nothing before it."""
        return len(self.token_ids) - max(self.first_learned, 1)


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference: two answers to one prompt (DPO)."""

    chosen: Example
    rejected: Example


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def text(self, text: str) -> list[int]:
        """Plain text, with what the model wants before it."""

    def chat(self, messages: Sequence[dict[str, str]], *, asks: bool) -> list[int]:
        """A conversation; with ``asks`` up to where the answer begins."""

    @property
    def end_token_id(self) -> int | None: ...


class TokenizerEncoder:
    """A transformers tokenizer."""

    def __init__(self, tokenizer: Any, *, raw: bool = False) -> None:
        """``raw``: no chat template, prompt and completion are just joined."""
        self._tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None)) and not raw

    def text(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def chat(self, messages: Sequence[dict[str, str]], *, asks: bool) -> list[int]:
        if not self.has_template:
            joined = "".join(message["content"] for message in messages)
            return self.text(joined)
        text = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=asks
        )
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def end_token_id(self) -> int | None:
        end = self._tokenizer.eos_token_id
        return None if end is None else int(end)


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSON-lines file. Raises UsageError."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if len(line) > MAXIMUM_LINE_BYTES:
                    raise UsageError(f"{path}:{number}: a line of more than 4 MiB")
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    raise UsageError(f"{path}:{number}: not valid JSON") from None
                if not isinstance(value, dict):
                    raise UsageError(f"{path}:{number}: not a JSON object")
                yield number, value
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def read_examples(path: Path, encoder: Encoder, *, max_length: int) -> list[Example]:
    """``{"prompt", "completion"}``, ``{"messages": [...]}`` or ``{"text"}`` per line.

    Of the first two only the answer is learned. Examples that are cut to nothing are left out.
    Raises UsageError with the line.
    """
    examples = []
    for number, value in read_lines(path):
        try:
            example = _example(value, encoder)
        except (KeyError, TypeError, IndexError):
            raise UsageError(
                f"{path}:{number}: expected prompt and completion, messages, or text"
            ) from None
        examples.append(_cut(example, max_length))
    examples = [example for example in examples if example.learned > 0]
    if not examples:
        raise UsageError(f"{path} has no example that fits into {max_length} tokens")
    return examples


def read_pairs(path: Path, encoder: Encoder, *, max_length: int) -> list[Pair]:
    """``{"prompt", "chosen", "rejected"}`` per line. Raises UsageError with the line."""
    pairs = []
    for number, value in read_lines(path):
        try:
            prompt = _text(value["prompt"])
            chosen, rejected = (
                _cut(_answer(prompt, _text(value[key]), encoder), max_length)
                for key in ("chosen", "rejected")
            )
        except (KeyError, TypeError):
            raise UsageError(f"{path}:{number}: expected prompt, chosen and rejected") from None
        if chosen.learned > 0 and rejected.learned > 0:
            pairs.append(Pair(chosen, rejected))
    if not pairs:
        raise UsageError(f"{path} has no pair that fits into {max_length} tokens")
    return pairs


def _example(value: dict[str, Any], encoder: Encoder) -> Example:
    if "messages" in value:
        messages = [
            {"role": _text(message["role"]), "content": _text(message["content"])}
            for message in value["messages"]
        ]
        if messages[-1]["role"] != "assistant":
            raise KeyError("the last message must be the answer")
        return _conversation(messages, encoder)
    if "text" in value:
        token_ids = encoder.text(_text(value["text"]))
        return Example((*token_ids, *_end(encoder)), 0)
    return _answer(_text(value["prompt"]), _text(value["completion"]), encoder)


def _answer(prompt: str, completion: str, encoder: Encoder) -> Example:
    return _conversation(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}],
        encoder,
    )


def _conversation(messages: list[dict[str, str]], encoder: Encoder) -> Example:
    asked = encoder.chat(messages[:-1], asks=True)
    whole = encoder.chat(messages, asks=False)
    common = 0
    for one, other in zip(asked, whole, strict=False):
        if one != other:
            break  # the tokenizer joins the prompt's end and the answer's begin
        common += 1
    end = encoder.end_token_id
    if end is not None and end in whole[common:]:
        # What a template puts behind the answer's end is never generated, so not learned either.
        whole = whole[: len(whole) - whole[::-1].index(end)]
    else:
        whole = [*whole, *_end(encoder)]
    return Example(tuple(whole), common)


def _end(encoder: Encoder) -> tuple[int, ...]:
    return () if encoder.end_token_id is None else (encoder.end_token_id,)


def _cut(example: Example, max_length: int) -> Example:
    return Example(example.token_ids[:max_length], example.first_learned)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("expected text")
    return value


class Order:
    """Which examples make up which step: every epoch in an order of its own."""

    def __init__(self, examples: int, *, batch_size: int, seed: int) -> None:
        self._examples = examples
        self._batch_size = min(batch_size, examples)
        self._seed = seed
        self._shuffled: tuple[int, list[int]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        return ceil(self._examples / self._batch_size)

    def batch(self, step: int) -> list[int]:
        """Indices of step ``step``, 1 and following; the last of an epoch may be smaller."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        if self._shuffled[0] != epoch:
            order = list(range(self._examples))
            random.Random(f"{self._seed}:{epoch}").shuffle(order)  # noqa: S311 (no secret)
            self._shuffled = (epoch, order)
        first = index * self._batch_size
        return self._shuffled[1][first : first + self._batch_size]


def pack(sizes: Sequence[int], maximum: int) -> list[list[int]]:
    """Indices in groups of at most ``maximum`` together (one alone may be larger), in few groups.

    First fit by decreasing size; groups are in the order of their first index.
    """
    groups: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(sizes)), key=lambda at: (-sizes[at], at)):
        for place, (taken, members) in enumerate(groups):
            if taken + sizes[index] <= maximum and len(members) < 128:
                groups[place] = (taken + sizes[index], [*members, index])
                break
        else:
            groups.append((sizes[index], [index]))
    return sorted(sorted(members) for _, members in groups)
