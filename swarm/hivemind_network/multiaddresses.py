"""Multiaddresses between text and the daemon's bytes.

hivemind's own class writes Ed25519 peer ids inside of addresses as the daemon does not read them,
and so it cannot express an address through a relay (``/ip4/.../p2p/RELAY/p2p-circuit``).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from swarm.hivemind_network.protobuf import decode_varint, encode_varint
from swarm.protocol import base58

MAX_TEXT_LENGTH = 512


@dataclass(frozen=True, slots=True)
class _Part:
    """One protocol of a multiaddress."""

    name: str
    code: int
    size_bytes: int | None
    """Of its value; 0 when there is none, None when a length goes before it."""


_PARTS = (
    _Part("ip4", 4, 4),
    _Part("ip6", 41, 16),
    _Part("dns", 53, None),
    _Part("dns4", 54, None),
    _Part("dns6", 55, None),
    _Part("tcp", 6, 2),
    _Part("udp", 273, 2),
    _Part("quic-v1", 461, 0),
    _Part("ws", 477, 0),
    _Part("p2p", 421, None),
    _Part("p2p-circuit", 290, 0),
)
_BY_NAME = {part.name: part for part in _PARTS}
_BY_CODE = {part.code: part for part in _PARTS}


def encode_address(text: str) -> bytes:
    """Raises ValueError for what is no multiaddress, or of a kind that the daemon does not dial."""
    words = text.split("/")
    if len(text) > MAX_TEXT_LENGTH or words[0] or len(words) < 2:
        raise ValueError(f"no multiaddress: {text[:80]!r}")
    remaining = iter(words[1:])
    encoded = bytearray()
    for name in remaining:
        part = _BY_NAME.get(name)
        if part is None:
            raise ValueError(f"{name[:80]!r} is not known in multiaddresses")
        encoded += encode_varint(part.code)
        if part.size_bytes == 0:
            continue
        value = _encode_value(part, next(remaining, ""))
        encoded += (encode_varint(len(value)) if part.size_bytes is None else b"") + value
    return bytes(encoded)


def decode_address(encoded: bytes) -> str:
    """Raises ValueError for what is no multiaddress or of another kind."""
    text = ""
    position = 0
    while position < len(encoded):
        code, position = decode_varint(encoded, position)
        part = _BY_CODE.get(code)
        if part is None:
            raise ValueError(f"protocol {code} is not known in multiaddresses")
        text += f"/{part.name}"
        size_bytes = part.size_bytes
        if size_bytes == 0:
            continue
        if size_bytes is None:
            size_bytes, position = decode_varint(encoded, position)
        if size_bytes > len(encoded) - position:
            raise ValueError("a multiaddress that ends in the middle")
        text += f"/{_decode_value(part, encoded[position : position + size_bytes])}"
        position += size_bytes
    return text


def _encode_value(part: _Part, text: str) -> bytes:
    match part.name:
        case "ip4":
            return ipaddress.IPv4Address(text).packed
        case "ip6":
            return ipaddress.IPv6Address(text).packed
        case "tcp" | "udp":
            if not text.isascii() or not text.isdigit() or int(text) > 0xFFFF:
                raise ValueError(f"{text[:80]!r} is no port")
            return int(text).to_bytes(2)
        case "p2p":
            return base58.decode(text)
        case _:
            if not text:
                raise ValueError(f"/{part.name} without a value")
            return text.encode()


def _decode_value(part: _Part, value: bytes) -> str:
    match part.name:
        case "ip4":
            return str(ipaddress.IPv4Address(value))
        case "ip6":
            return str(ipaddress.IPv6Address(value))
        case "tcp" | "udp":
            return str(int.from_bytes(value))
        case "p2p":
            return base58.encode(value)
        case _:
            return value.decode()
