"""The little of protobuf that libp2p's own protocols need: delimited messages and their fields."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

MAX_MESSAGE_BYTES = 8 * 1024


def write_delimited(writer: asyncio.StreamWriter, message: bytes) -> None:
    """The message after its length."""
    writer.write(encode_varint(len(message)) + message)


async def read_delimited(reader: asyncio.StreamReader) -> bytes:
    """Raises ValueError when it is too long, EOFError and OSError when the stream ends."""
    size = shift = 0
    while True:
        (byte,) = await reader.readexactly(1)
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
        if shift > 28:
            raise ValueError("a length that does not end")
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes")
    return await reader.readexactly(size)


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field. Raises ValueError for what is no protobuf."""
    position = 0
    while position < len(message):
        key, position = decode_varint(message, position)
        match key & 7:
            case 0:
                value, position = decode_varint(message, position)
                yield key >> 3, value
            case 2:
                size, position = decode_varint(message, position)
                if size > len(message) - position:
                    raise ValueError("a field that ends in the middle")
                yield key >> 3, message[position : position + size]
                position += size
            case kind:
                raise ValueError(f"a field of kind {kind}")


def encode_field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return encode_varint(number << 3) + encode_varint(value)
    return encode_varint(number << 3 | 2) + encode_varint(len(value)) + value


def encode_varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*encoded, number))


def decode_varint(content: bytes, position: int) -> tuple[int, int]:
    """The number at ``position``, and the position after it. Raises ValueError."""
    number = 0
    for shift in range(0, 63, 7):
        if position >= len(content):
            break
        byte = content[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise ValueError("a number that ends in the middle or not at all")
