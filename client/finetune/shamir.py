"""Shamir's secret sharing (1979): any ``threshold`` shares give the secret, fewer say nothing."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

PRIME = 2**521 - 1
SHARE_BYTES = 66
SECRET_BYTES = 32


def split_secret(secret: bytes, holders: int, threshold: int) -> dict[int, bytes]:
    """One share for each of the holders ``1 .. holders``. ``secret`` has 32 bytes."""
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= holders:
        raise ValueError("a secret of 32 bytes, and no more than all holders are needed")
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    return {
        holder: _evaluate(coefficients, holder).to_bytes(SHARE_BYTES, "big")
        for holder in range(1, holders + 1)
    }


def join_secret(shares: Mapping[int, bytes]) -> bytes:
    """The secret out of the shares of so many holders as are needed; nonsense out of fewer.

    Raises ValueError when the shares cannot be of one secret.
    """
    secret = 0
    for holder, share in shares.items():
        numerator = denominator = 1
        for other in shares:
            if other != holder:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - holder) % PRIME
        value = int.from_bytes(share, "big")
        secret = (secret + value * numerator * pow(denominator, -1, PRIME)) % PRIME
    try:
        return secret.to_bytes(SECRET_BYTES, "big")
    except OverflowError:
        raise ValueError("the shares are not of one secret") from None


def _evaluate(coefficients: list[int], at: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * at + coefficient) % PRIME
    return value
