"""With which values an adapter begins: the same on every node, known to whoever has the seed."""

from __future__ import annotations

import hashlib
import math

import torch


def initial_a(shape: tuple[int, ...], seed: int, name: str) -> torch.Tensor:
    """PEFT's distribution (Kaiming uniform), with values that depend on seed and name only."""
    bound = 1 / math.sqrt(shape[1])
    generator = torch.Generator().manual_seed(hash64(seed, name))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def hash64(*parts: object) -> int:
    """A seed out of whatever decides values."""
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
