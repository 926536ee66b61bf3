"""Between dataclasses with numbered, bounded fields and msgpack maps ``{field number: value}``.

Used for messages (``codec``) and for directory records (``records``). The bounds of each field
stand in its declaration (``messages.wire``) and are checked in both directions: what a peer sends
raises DecodeError, what our own code would send raises UsageError.

The Python type of a field may narrow a ``Uint``: ``bool`` (0 or 1 on the wire) or an ``IntEnum``.
A tensor's bytes are not part of the map; its header passes through here as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from enum import IntEnum
from typing import Any, Generic, TypeVar, get_type_hints

import msgpack

from swarm.protocol.errors import DecodeError, ErrorCode, UsageError
from swarm.protocol.messages import (
    Array,
    BlobField,
    Bytes,
    Real,
    Spec,
    TensorField,
    Text,
    Uint,
    WireField,
)

MAX_ARRAY_LENGTH = 256
MAX_MAP_LENGTH = 64
MAX_ITEM_BYTES = 4096
"""Longest text or byte string in a header."""
MAX_DEPTH = 8
"""Nesting that is tolerated inside of fields that we do not know."""

FORBIDDEN_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters, line separators and overrides of the writing direction: these texts are shown
in terminals, logs and on web pages."""

T = TypeVar("T")
Pairs = tuple[tuple[object, object], ...]
Check = Callable[[Any], bool]
Convert = Callable[[Any], object]


def is_clean_text(text: str) -> bool:
    """Free of control characters and of characters that change how other text is displayed."""
    return (text.isascii() and text.isprintable()) or FORBIDDEN_CHARACTERS.search(text) is None


def unpack(data: bytes | memoryview) -> object:
    """Decode one msgpack value; maps become tuples of pairs, so that no key is ever hashed.

    Raises DecodeError(BAD_FIELD) for everything but exactly one value within the bounds.
    """
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            use_list=True,
            strict_map_key=False,
            object_pairs_hook=tuple,
            ext_hook=_refuse_extension,
            max_str_len=MAX_ITEM_BYTES,
            max_bin_len=MAX_ITEM_BYTES,
            max_array_len=MAX_ARRAY_LENGTH,
            max_map_len=MAX_MAP_LENGTH,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise DecodeError(ErrorCode.BAD_FIELD, "malformed msgpack") from error


def _refuse_extension(code: int, data: bytes) -> object:
    raise ValueError("extension types are not allowed")


def _is_shallow(value: object, depth: int = MAX_DEPTH) -> bool:
    if not isinstance(value, list | tuple):
        return True
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in value)


class Schema(Generic[T]):
    """The numbered fields of one dataclass, compiled once."""

    def __init__(self, owner: type[T]) -> None:
        self.owner = owner
        self.tensor_index: int | None = None
        self.blob_index: int | None = None
        self._defaults: list[Any] = []
        self._writers: list[tuple[str, int, Check, Any]] = []
        self._readers: dict[int, tuple[int, Check, Convert | None]] = {}
        types = get_type_hints(owner)
        for index, declared in enumerate(fields(owner)):  # type: ignore[arg-type]
            wire: WireField = declared.metadata["wire"]
            if wire.number in self._readers:
                raise TypeError(f"{owner.__name__}: field number {wire.number} is used twice")
            # ``unpack`` makes arrays lists and maps tuples, so the two cannot be confused
            check_received = _check_for(wire.spec, types[declared.name], list)
            check_own = _check_for(wire.spec, types[declared.name], tuple)
            convert = _convert_for(wire.spec, types[declared.name])
            self._defaults.append(declared.default)
            self._readers[wire.number] = (index, check_received, convert)
            if isinstance(wire.spec, TensorField):
                self.tensor_index = index
                self.tensor_number = wire.number
                self.tensor_name = declared.name
            elif isinstance(wire.spec, BlobField):
                self.blob_index = index
                self.blob_number = wire.number
                self.blob_name = declared.name
                self.blob_maximum_bytes = wire.spec.maximum_bytes
            else:
                self._writers.append((declared.name, wire.number, check_own, declared.default))

    @property
    def has_payload(self) -> bool:
        """Whether such messages carry bytes behind their header."""
        return self.tensor_index is not None or self.blob_index is not None

    def to_map(self, value: T) -> dict[int, object]:
        """Field numbers and values, without the tensor and without values that are the default.

        Raises UsageError for a value out of bounds.
        """
        result: dict[int, object] = {}
        for name, number, check, default in self._writers:
            item = getattr(value, name)
            if item == default:
                continue
            if isinstance(item, int) and type(item) is not int:  # bool or IntEnum
                item = int(item)
            if not check(item):
                raise UsageError(f"{self.owner.__name__}.{name} is out of its bounds")
            result[number] = item
        return result

    def read_fields(self, pairs: object) -> list[Any]:
        """Values in the order of the dataclass. Raises DecodeError(BAD_FIELD)."""
        if type(pairs) is not tuple:
            raise DecodeError(ErrorCode.BAD_FIELD, f"{self.owner.__name__}: not a map")
        values = self._defaults.copy()
        seen = 0
        for number, value in pairs:
            if type(number) is not int:
                raise DecodeError(ErrorCode.BAD_FIELD, f"{self.owner.__name__}: key is no integer")
            reader = self._readers.get(number)
            if reader is None:
                if not _is_shallow(value):
                    raise DecodeError(ErrorCode.BAD_FIELD, "an unknown field is nested too deeply")
                continue
            index, check, convert = reader
            if seen >> index & 1 or not check(value):
                raise self._bad_field(index)
            seen |= 1 << index
            values[index] = value if convert is None else convert(value)
        if MISSING in values:
            raise self._bad_field(values.index(MISSING))
        return values

    def from_map(self, pairs: object) -> T:
        """Inverse of ``to_map`` for a dataclass without a tensor. Raises DecodeError(BAD_FIELD)."""
        return self.owner(*self.read_fields(pairs))

    def _bad_field(self, index: int) -> DecodeError:
        name = fields(self.owner)[index].name  # type: ignore[arg-type]
        return DecodeError(
            ErrorCode.BAD_FIELD,
            f"{self.owner.__name__}.{name} is missing, repeated, of a wrong type or out of bounds",
        )


def _convert_for(spec: Spec, python_type: Any) -> Convert | None:
    if isinstance(spec, Array):
        return tuple
    if isinstance(python_type, type) and issubclass(python_type, bool | IntEnum):
        return python_type
    return None


def _check_for(spec: Spec, python_type: Any, array_type: type[Sequence[Any]]) -> Check:
    """``type(x) is int`` and not ``isinstance``: ``True`` is no number."""
    match spec:
        case Uint(maximum):
            if isinstance(python_type, type) and issubclass(python_type, IntEnum):
                allowed = frozenset(int(member) for member in python_type)
                return lambda value: type(value) is int and value in allowed
            if python_type is bool:
                maximum = 1
            return lambda value: type(value) is int and 0 <= value <= maximum
        case Real(least, most):
            # Comparisons with NaN are false.
            return lambda value: type(value) is float and least <= value <= most
        case Bytes(minimum, maximum):
            return lambda value: type(value) is bytes and minimum <= len(value) <= maximum
        case Text(maximum_bytes):
            return lambda value: _is_bounded_text(value, maximum_bytes)
        case Array(item, maximum_length):
            check_item = _check_for(item, None, array_type)
            return lambda value: (
                type(value) is array_type
                and len(value) <= maximum_length
                and all(map(check_item, value))
            )
        case TensorField():
            return lambda value: type(value) is list and len(value) == 3
        case BlobField(maximum_bytes):  # in the header only its size
            return lambda value: type(value) is int and 0 < value <= maximum_bytes


def _is_bounded_text(value: object, maximum_bytes: int) -> bool:
    if type(value) is not str or len(value) > maximum_bytes:
        return False
    if value.isascii():
        return value.isprintable()
    try:
        return len(value.encode()) <= maximum_bytes and is_clean_text(value)
    except UnicodeEncodeError:
        return False  # a lone surrogate of ours; msgpack refuses those of peers
