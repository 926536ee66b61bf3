"""Several adapters in one product, for batches of single tokens.

A product for each adapter and layer costs more in calls than in arithmetic when every session has
one row. So the matrices of all adapters of a batch are put side by side, every row is multiplied
with all of them, and what does not belong to a row is masked before B. The copies are kept while
the same adapters come together, batch after batch, and are bounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

_MOST_ROWS = 64
_MOST_BYTES = 128 * 1024 * 1024
_SETTLED_BATCHES = 4
"""So often in a row the same adapters must have met before copies are made of them."""

PlaceKey = tuple[int, str]


class SingleDelta(Protocol):
    """``adapted_layers.Delta`` is one."""

    @property
    def a_transposed(self) -> torch.Tensor: ...

    @property
    def b_transposed(self) -> torch.Tensor: ...

    @property
    def gain(self) -> torch.Tensor | None: ...


class Loaded(Protocol):
    """``adapted_layers.LoadedAdapter`` is one."""

    @property
    def adapter_id(self) -> bytes: ...

    @property
    def deltas(self) -> Mapping[PlaceKey, SingleDelta]: ...

    @property
    def size_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class _Joint:
    a: torch.Tensor
    """``[in, sum of ranks]``."""
    b: torch.Tensor
    """``[sum of ranks, out]``."""
    ranks: tuple[int, ...]
    """Of each adapter of the batch; 0 where it does nothing here."""


class JointDeltas:
    """The adapters of the batches of late. For the device thread."""

    def __init__(self) -> None:
        self._adapters: Sequence[Loaded] = ()
        self._ids: tuple[bytes, ...] = ()
        self._batches = 0
        self._joints: dict[PlaceKey, _Joint | None] = {}
        self._spans: Sequence[tuple[int, int]] = ()
        self._rows = 0
        self._masks: dict[tuple[int, ...], torch.Tensor] = {}
        self.used = 0
        """How many products of several adapters were made."""

    def begin(self, adapters: Sequence[Loaded], spans: Sequence[tuple[int, int]]) -> bool:
        """A batch with these adapters, each for its span of rows; whether :meth:`add` may help."""
        ids = tuple(adapter.adapter_id for adapter in adapters)
        if ids != self._ids:
            self.forget()
            self._ids, self._adapters = ids, adapters
        self._batches += 1
        rows = spans[-1][1]
        if len(adapters) < 2 or rows > _MOST_ROWS or self._batches <= _SETTLED_BATCHES:
            return False
        if sum(adapter.size_bytes for adapter in adapters) > _MOST_BYTES:
            return False
        if spans != self._spans:
            self._spans, self._rows = spans, rows
            self._masks.clear()
        return True

    def forget(self) -> None:
        """Let go of all copies."""
        self._adapters, self._ids, self._batches = (), (), 0
        self._joints.clear()
        self._masks.clear()
        self._spans = ()

    def add(self, place: PlaceKey, output: torch.Tensor, hidden: torch.Tensor) -> int:
        """Add all adapters to ``output`` ``[rows, out]``; how many that were, 0 if not possible."""
        if place not in self._joints:
            self._joints[place] = self._join(place)
        joint = self._joints[place]
        if joint is None:
            return 0
        mask = self._masks.get(joint.ranks)
        if mask is None:
            mask = self._masks[joint.ranks] = self._mask(joint)
        rows = self._rows
        output[:rows].addmm_((hidden[:rows] @ joint.a).mul_(mask), joint.b)
        self.used += 1
        return sum(rank > 0 for rank in joint.ranks)

    def _join(self, place: PlaceKey) -> _Joint | None:
        """None where an adapter also scales (DoRA), or fewer than two do anything."""
        deltas = [adapter.deltas.get(place) for adapter in self._adapters]
        present = [delta for delta in deltas if delta is not None]
        if len(present) < 2 or any(delta.gain is not None for delta in present):
            return None
        return _Joint(
            torch.cat([delta.a_transposed for delta in present], dim=1),
            torch.cat([delta.b_transposed for delta in present]),
            tuple(0 if delta is None else delta.a_transposed.shape[1] for delta in deltas),
        )

    def _mask(self, joint: _Joint) -> torch.Tensor:
        mask = joint.a.new_zeros(self._rows, joint.a.shape[1])
        column = 0
        for (start, end), rank in zip(self._spans, joint.ranks, strict=True):
            mask[start:end, column : column + rank] = 1
            column += rank
        return mask
