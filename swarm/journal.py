"""What was sent on in a session, kept so that whoever it was sent to can be replaced.

A hop keeps its outputs, the client its inputs: activations by position, as they went over the wire.
A journal follows the session's cache: a step below its length cuts it first, a step with a row
order permutes the rows of all that came before.
"""

from __future__ import annotations

from collections.abc import Sequence

from swarm.protocol.tensors import ITEM_BYTES, DType, WireTensor

DEFAULT_BUDGET_BYTES = 256 * 1024 * 1024


class JournalBudget:
    """Memory that all journals of one process share."""

    def __init__(self, maximum_bytes: int = DEFAULT_BUDGET_BYTES) -> None:
        self.maximum_bytes = maximum_bytes
        self.used_bytes = 0

    def take(self, size_bytes: int) -> bool:
        """Reserve memory; False when there is not so much left. Negative sizes give back."""
        if self.used_bytes + size_bytes > self.maximum_bytes:
            return False
        self.used_bytes += size_bytes
        return True


class Journal:
    """Activations ``[rows, length, hidden]`` of one session.

    A journal that does not fit the budget any more is dropped as a whole and says so by
    :attr:`is_gone`; a step at position 0 begins it anew.
    """

    def __init__(self, *, rows: int, hidden_size: int, dtype: DType, budget: JournalBudget) -> None:
        self._rows = [bytearray() for _ in range(rows)]
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._token_bytes = hidden_size * ITEM_BYTES[dtype]
        self._budget = budget
        # Rows are not moved when they are permuted, which beam search does in every step. Instead
        # each position knows how many permutations there were before it.
        self._orders: list[Sequence[int]] = []
        self._orders_before: list[int] = []
        self._is_gone = False

    @property
    def length(self) -> int:
        """Positions kept."""
        return len(self._orders_before)

    @property
    def is_gone(self) -> bool:
        """Whether it was dropped for want of memory."""
        return self._is_gone

    def append(self, position: int, activations: WireTensor, row_order: Sequence[int] = ()) -> None:
        """Cut at ``position``, permute the rows, then add ``[rows, tokens, hidden]``."""
        if self._is_gone and position > 0:
            return
        self._is_gone = False
        self.cut(position)
        if position != self.length:
            raise ValueError(f"position {position} leaves a gap after {self.length}")
        if row_order and self.length:
            self._orders.append(tuple(row_order))
        tokens = activations.shape[1]
        row_bytes = tokens * self._token_bytes
        if not self._budget.take(row_bytes * len(self._rows)):
            self.drop()
            return
        view = memoryview(activations.data)
        for index, row in enumerate(self._rows):
            row += view[index * row_bytes : (index + 1) * row_bytes]
        self._orders_before += [len(self._orders)] * tokens

    def cut(self, position: int) -> None:
        """Forget everything from ``position`` on."""
        dropped = self.length - position
        if dropped <= 0:
            return
        for row in self._rows:
            del row[position * self._token_bytes :]
        del self._orders_before[position:]
        if not position:
            self._orders.clear()
        self._budget.take(-dropped * self._token_bytes * len(self._rows))

    def read(self, first: int, end: int) -> WireTensor:
        """Positions ``first .. end``, at most as many as there are, rows in their present order."""
        end = min(end, self.length)
        size = self._token_bytes
        data = bytearray()
        for row in range(len(self._rows)):
            for start, stop, sources in self._stretches(first, end):
                data += memoryview(self._rows[sources[row]])[start * size : stop * size]
        shape = (len(self._rows), end - first, self._hidden_size)
        return WireTensor(self._dtype, shape, data)

    def _stretches(self, first: int, end: int) -> list[tuple[int, int, Sequence[int]]]:
        """Positions that went through the same permutations, and where each row's are found."""
        stretches = []
        stop = end
        sources: Sequence[int] = range(len(self._rows))
        orders = len(self._orders)
        while stop > first:
            born = self._orders_before[stop - 1]
            while orders > born:
                orders -= 1
                order = self._orders[orders]
                sources = tuple(order[source] for source in sources)
            start = stop
            while start > first and self._orders_before[start - 1] == born:
                start -= 1
            stretches.append((start, stop, sources))
            stop = start
        return stretches[::-1]

    def drop(self) -> None:
        """Give the memory back; what was kept is gone."""
        self.cut(0)
        self._is_gone = True
