"""Sketches of hidden states: what a client keeps of outputs when it does not keep the tensors.

A token's state is multiplied with random signs, drawn from a seed that only the client knows: 64
numbers of half precision, from which the audit rule estimates the same errors. With a seed that the
node knew it could add any change that the projection does not see.
"""

from __future__ import annotations

import secrets

import numpy as np

from swarm.ledger.audit_rule import Floats

NUMBERS = 64
SEED_BYTES = 16
_SCALE = 2.0**-6
"""Keeps sums of large states within half precision."""


class Sketcher:
    """Projects states of one width by one secret seed."""

    def __init__(self, hidden_size: int, seed: bytes | None = None) -> None:
        entropy = int.from_bytes(seed or secrets.token_bytes(SEED_BYTES), "big")
        signs = np.random.default_rng(entropy).integers(0, 2, (hidden_size, NUMBERS))
        self._signs = (signs * 2 - 1).astype(np.float32) * np.float32(_SCALE)

    def sketch(self, states: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
        """``[..., hidden]`` to ``[..., 64]``; what does not fit half precision becomes infinite."""
        with np.errstate(all="ignore"):
            return (states @ self._signs).astype(np.float16)

    def project(self, states: Floats) -> Floats:
        """The same in single precision, for what is sketched at the time of the audit."""
        with np.errstate(all="ignore"):
            projected: Floats = states @ self._signs
        return projected
