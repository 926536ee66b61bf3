"""How often each block of a model is served, which are weakest, and what would help; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from swarm.model_health import HEALTHY_COPIES
from swarm.status.plain_text import is_command_word

MOST_WEAK_SPANS = 3
MOST_CELLS = 192
"""Of models with more blocks, neighbours with equal replicas share a cell."""
PEERS_VARIABLE = "$SWARM_PEERS"
"""Stands for a seed's address, which the page does not publish."""


@dataclass(frozen=True, slots=True)
class BlockCell:
    """Blocks ``[first_block, end_block)`` that equally many nodes serve."""

    first_block: int
    end_block: int
    replicas: int

    @property
    def level(self) -> int:
        """0 (nobody) to 5 (safe): the step on the colour scale."""
        return min(self.replicas, int(HEALTHY_COPIES))

    @property
    def last_block(self) -> int:
        return self.end_block - 1


@dataclass(frozen=True, slots=True)
class WeakSpan:
    """Blocks ``[first_block, end_block)`` that are served least, and the command that helps."""

    first_block: int
    end_block: int
    replicas: int
    command: str

    @property
    def last_block(self) -> int:
        return self.end_block - 1


def block_cells(replicas: Sequence[int]) -> tuple[BlockCell, ...]:
    """The cells of a block map: one for each block, or for runs of equal ones in large models."""
    if len(replicas) <= MOST_CELLS:
        return tuple(BlockCell(block, block + 1, count) for block, count in enumerate(replicas))
    return tuple(BlockCell(first, end, count) for first, end, count in _runs(replicas))


def weak_spans(
    model_name: str, replicas: Sequence[int], *, peers: str = PEERS_VARIABLE
) -> tuple[WeakSpan, ...]:
    """Runs of the blocks with the fewest replicas, longest first; none where all are safe."""
    least = min(replicas, default=0)
    if not replicas or least >= HEALTHY_COPIES:
        return ()
    weakest = [run for run in _runs(replicas) if run[2] == least]
    weakest.sort(key=lambda run: (run[0] - run[1], run[0]))
    return tuple(
        WeakSpan(first, end, count, join_command(model_name, first, end, peers=peers))
        for first, end, count in weakest[:MOST_WEAK_SPANS]
    )


def join_command(model_name: str, first_block: int, end_block: int, *, peers: str) -> str:
    """The line that hosts these blocks. A model's name that a shell could misread is left out."""
    model = model_name if is_command_word(model_name) else "MODEL"
    return f'swarm-node join {model} --blocks {first_block}:{end_block} --peers "{peers}"'


def _runs(replicas: Sequence[int]) -> list[tuple[int, int, int]]:
    runs = []
    first = 0
    for count, group in groupby(replicas):
        end = first + sum(1 for _ in group)
        runs.append((first, end, count))
        first = end
    return runs
