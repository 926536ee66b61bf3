"""The JSON of signed objects: one flat object of ASCII names, integers and strings, nothing else.

No floats (two programs would print them differently), no nesting, no null, no duplicates (two
programs would read different values), no unknown or missing fields (a signer must not be made to
sign what a verifier does not see). The bytes are signed as they are and never written anew, so
their order and white space do not matter.

Fields are declared in frozen dataclasses by :func:`unsigned`, :func:`hexadecimal`, :func:`text` and
:func:`choice`; see ``ledger_objects`` for their use. One of :func:`hexadecimal_or_absent` is left
out when it says nothing, and must not be there empty: a meaning has one form.
"""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NoReturn, TypeVar, cast

from swarm.protocol.errors import DecodeError, ErrorCode, UsageError

MAX_OBJECT_BYTES = 4096
MAX_INTEGER = (1 << 53) - 1
"""What every JSON reader can hold exactly."""
_MAX_DIGITS = len(str(MAX_INTEGER))
_PRINTABLE = re.compile("[ -~]*")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Unsigned:
    maximum: int

    def accepts(self, value: object) -> bool:
        return type(value) is int and 0 <= value <= self.maximum


@dataclass(frozen=True, slots=True)
class _Text:
    pattern: re.Pattern[str]

    def accepts(self, value: object) -> bool:
        return type(value) is str and self.pattern.fullmatch(value) is not None


def unsigned(maximum: int = MAX_INTEGER) -> Any:
    """Declare an integer field in ``0 .. maximum``."""
    return field(metadata={"json": _Unsigned(maximum)})


def hexadecimal(*sizes_bytes: int) -> Any:
    """Declare a text field: lower-case hexadecimal of exactly one of ``sizes_bytes``."""
    pattern = "|".join(f"[0-9a-f]{{{2 * size}}}" for size in sizes_bytes)
    return field(metadata={"json": _Text(re.compile(pattern))})


def hexadecimal_or_absent(size_bytes: int) -> Any:
    """Declare a text field as :func:`hexadecimal`, or "", which is not written."""
    pattern = re.compile(f"[0-9a-f]{{{2 * size_bytes}}}")
    return field(default="", metadata={"json": _Text(pattern)})


def text(maximum_length: int) -> Any:
    """Declare a field of printable ASCII, at most ``maximum_length`` characters."""
    return field(metadata={"json": _Text(re.compile(f"[ -~]{{0,{maximum_length}}}"))})


def choice(*values: str) -> Any:
    """Declare a text field that has one of ``values``."""
    return field(metadata={"json": _Text(re.compile("|".join(map(re.escape, values))))})


def dump(value: Any) -> bytes:
    """The bytes of an object as we write them. Raises UsageError for a field out of its bounds."""
    content: dict[str, object] = {}
    for declared in fields(value):
        item = getattr(value, declared.name)
        if declared.default is not MISSING and item == declared.default:
            continue
        if not declared.metadata["json"].accepts(item):
            raise UsageError(f"{type(value).__name__}.{declared.name}: {item!r} is not allowed")
        content[declared.name] = item
    data = json.dumps(content, separators=(",", ":")).encode("ascii")
    if len(data) > MAX_OBJECT_BYTES:
        raise UsageError(f"{type(value).__name__} has {len(data)} bytes")
    return data


def parse(kind: type[T], data: bytes) -> T:
    """Read bytes from a peer. Raises DecodeError(BAD_FIELD) for anything but a valid object."""
    content = parse_flat(data)
    declared = [
        each for each in fields(cast(Any, kind)) if each.default is MISSING or each.name in content
    ]
    if len(content) != len(declared):
        raise _refused(f"{len(content)} fields")
    for each in declared:
        if each.name not in content:
            raise _refused(f"{each.name} is missing")
        if not each.metadata["json"].accepts(content[each.name]):
            raise _refused(f"{each.name} is out of bounds")
    return kind(**content)


def parse_flat(data: bytes) -> dict[str, Any]:
    """A flat JSON object of whatever fields, strictly. Raises DecodeError(BAD_FIELD)."""
    if len(data) > MAX_OBJECT_BYTES:
        raise _refused("too long")
    try:
        content = json.loads(
            data.decode("ascii"),
            object_pairs_hook=_pairs,
            parse_int=_integer,
            parse_float=_no_float,
            parse_constant=_no_float,
        )
    except (ValueError, RecursionError) as error:
        raise _refused("no strict JSON") from error
    if type(content) is not dict:
        raise _refused("no object")
    return content


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice")
    for value in content.values():
        if type(value) is str:
            if _PRINTABLE.fullmatch(value) is None:
                raise ValueError("text that is not printable ASCII")
        elif type(value) is not int:
            raise ValueError("neither an integer nor a text")
    return content


def _integer(digits: str) -> int:
    if digits.startswith("-") or len(digits) > _MAX_DIGITS or int(digits) > MAX_INTEGER:
        raise ValueError("an integer out of bounds")
    return int(digits)


def _no_float(written: str) -> NoReturn:
    raise ValueError(f"{written[:16]} is no integer")


def _refused(detail: str) -> DecodeError:
    return DecodeError(ErrorCode.BAD_FIELD, f"signed object: {detail}")
