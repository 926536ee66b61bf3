"""Base58 in Bitcoin's alphabet: how libp2p writes peer ids. Knows nothing of their content."""

from __future__ import annotations

ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
DIGITS = {character: digit for digit, character in enumerate(ALPHABET)}
MAX_TEXT_LENGTH = 128
"""Decoding costs the square of the length, hence the bound."""


def encode(data: bytes) -> str:
    """Leading zero bytes become leading ``1`` characters."""
    number = int.from_bytes(data, "big")
    characters = []
    while number:
        number, digit = divmod(number, 58)
        characters.append(ALPHABET[digit])
    leading_zeros = len(data) - len(data.lstrip(b"\0"))
    return "1" * leading_zeros + "".join(reversed(characters))


def decode(text: str) -> bytes:
    """Inverse of ``encode``; there is one text for each byte string. Raises ValueError."""
    if len(text) > MAX_TEXT_LENGTH:
        raise ValueError("base58 text is too long")
    number = 0
    for character in text:
        digit = DIGITS.get(character)
        if digit is None:
            raise ValueError("not a base58 character")
        number = number * 58 + digit
    leading_zeros = len(text) - len(text.lstrip("1"))
    return bytes(leading_zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")
