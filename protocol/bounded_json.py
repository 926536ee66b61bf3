"""JSON of strangers: bounded in size and depth before it is parsed; no repeated keys, no NaN."""

from __future__ import annotations

import json
import re
from typing import Any

from swarm.protocol.errors import DecodeError, ErrorCode

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_MAX_DIGITS = 20


def parse_json(data: bytes, *, maximum_bytes: int, maximum_depth: int) -> Any:
    """The value of ``data``. Raises DecodeError(TOO_LARGE or BAD_FIELD), whatever the bytes."""
    if len(data) > maximum_bytes:
        raise DecodeError(
            ErrorCode.TOO_LARGE, f"{len(data)} bytes of JSON, {maximum_bytes} at most"
        )
    if depth(data) > maximum_depth:
        raise DecodeError(ErrorCode.BAD_FIELD, f"JSON nested deeper than {maximum_depth}")
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_without_repetition,
            parse_constant=_refuse_constant,
            parse_int=_short_int,
        )
    except (ValueError, RecursionError) as error:
        raise DecodeError(ErrorCode.BAD_FIELD, f"no valid JSON: {error}") from None


def depth(data: bytes) -> int:
    """How deep arrays and objects are nested; linear in the size, whatever the bytes."""
    deepest = level = 0
    for byte in _STRING.sub(b"", data):
        if byte in b"[{":
            level += 1
            deepest = max(deepest, level)
        elif byte in b"]}":
            level -= 1
    return deepest


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _short_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError("a number is too long")
    return int(text)
