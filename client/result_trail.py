"""Sketches of the results that a session got, by position, for audits of its last hop."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from swarm.ledger.audit_rule import Floats, to_array
from swarm.ledger.sketch import NUMBERS, Sketcher
from swarm.protocol.tensors import WireTensor

MOST_POSITIONS = 4096


class ResultTrail:
    """Follows a session's cache, as journals do: rollbacks cut it, reordered rows end it."""

    def __init__(self, sketcher: Sketcher, rows: int) -> None:
        self.sketcher = sketcher
        self.is_reordered = False
        self._rows = rows
        self._sketches: dict[int, NDArray[np.float16]] = {}

    def cut(self, position: int) -> None:
        """A step begins at ``position``: what was from there on is no more."""
        for later in [kept for kept in self._sketches if kept >= position]:
            del self._sketches[later]

    def add(self, end_position: int, result: WireTensor) -> None:
        """``[rows, tokens, hidden]``, the last of them at ``end_position - 1``."""
        first = end_position - result.shape[1]
        if self.is_reordered or first >= MOST_POSITIONS:
            return
        sketches = self.sketcher.sketch(to_array(result))
        for index in range(result.shape[1]):
            if first + index < MOST_POSITIONS:
                self._sketches[first + index] = sketches[:, index]

    def before(self, length: int) -> tuple[NDArray[np.intp], Floats]:
        """Positions below ``length``, ascending, and their sketches ``[rows, positions, 64]``."""
        positions = sorted(kept for kept in self._sketches if kept < length)
        sketches = np.zeros((self._rows, len(positions), NUMBERS), dtype=np.float32)
        for index, position in enumerate(positions):
            sketches[:, index] = self._sketches[position]
        return np.array(positions, dtype=np.intp), sketches
