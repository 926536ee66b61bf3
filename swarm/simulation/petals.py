"""Petals' published rule for placement, for comparison.

After bigscience-workshop/petals, ``src/petals/server/block_selection.py`` (MIT licence). A server
joins where the sorted throughputs of a window are lexicographically smallest. Every 120 s on
average it simulates that everybody moves greedily until nobody wants to, and moves if the present
throughput of the weakest block is below 0.75 of the simulated one. It stops serving before it
downloads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from swarm.block_vectors import Counts, PlacedNode, Vector
from swarm.virtual_time import LoopClock

BALANCE_QUALITY = 0.75
MEAN_BALANCE_CHECK_S = 120.0
RECORD_S = (60.0, 120.0)
"""How long the record of a crashed server is still believed."""
EPSILON = 1e-3
MOST_ROUNDS = 6
"""The original goes on until nobody moves, which it may never reach; later rounds change little."""


def throughputs(nodes: Sequence[PlacedNode], number_of_blocks: int) -> Vector:
    """Of each block ``[number_of_blocks]``: a server's throughput falls with its blocks."""
    total = np.zeros(number_of_blocks)
    for node in nodes:
        total[node.first_block : node.end_block] += _throughput(node)
    return total


def choose_start(of_blocks: Vector, size: int) -> int:
    """The window whose sorted throughputs are lexicographically smallest."""
    windows = of_blocks[_windows(len(of_blocks), size)]
    smallest = windows.min(axis=1)
    candidates = np.flatnonzero(smallest == smallest.min())
    if len(candidates) == 1:
        return int(candidates[0])
    windows = np.sort(windows[candidates], axis=1)
    rows = np.arange(len(candidates))
    for column in range(size):
        if len(rows) == 1:
            break
        values = windows[rows, column]
        rows = rows[values == values.min()]
    return int(candidates[rows[0]])


@cache
def _windows(number_of_blocks: int, size: int) -> Counts:
    """The blocks of each window ``[number_of_blocks - size + 1, size]``."""
    first = np.arange(number_of_blocks - size + 1)
    return np.asarray(first[:, None] + np.arange(size), dtype=np.int64)


def wants_elsewhere(node: PlacedNode, nodes: Sequence[PlacedNode], number_of_blocks: int) -> bool:
    """Whether ``node`` would choose other blocks if it joined now, and nothing breaks by that."""
    of_blocks = throughputs(nodes, number_of_blocks)
    was_whole = of_blocks.min() > EPSILON
    span = slice(node.first_block, node.end_block)
    of_blocks[span] -= _throughput(node) * (1 + EPSILON)
    if was_whole and of_blocks.min() <= 0:
        return False
    return choose_start(of_blocks, node.end_block - node.first_block) != node.first_block


def balance(
    mover: PlacedNode | None,
    nodes: Sequence[PlacedNode],
    number_of_blocks: int,
    dice: np.random.Generator,
) -> float:
    """Present throughput of the weakest block / that after everybody moved greedily.

    ``mover``, if given, moves first, then all in random order, again and again.
    """
    of_blocks = throughputs(nodes, number_of_blocks)
    initial = float(of_blocks.min())
    starts = {node.peer_id: node.first_block for node in nodes}
    order = [mover] if mover is not None else list(nodes)
    for _ in range(MOST_ROUNDS):
        moved = False
        for node in order:
            size = node.end_block - node.first_block
            throughput, start = _throughput(node), starts[node.peer_id]
            of_blocks[start : start + size] -= throughput * (1 + EPSILON)
            new_start = choose_start(of_blocks, size)
            of_blocks[start : start + size] += throughput * EPSILON
            of_blocks[new_start : new_start + size] += throughput
            moved = moved or new_start != start
            starts[node.peer_id] = new_start
        if not moved and len(order) == len(nodes):
            break
        order = [nodes[index] for index in dice.permutation(len(nodes))]
    final = float(of_blocks.min())
    return initial / final if final >= max(initial, EPSILON) else 1.0


def is_unbalanced(balance: float) -> bool:
    return balance < BALANCE_QUALITY - EPSILON


class SharedBalances:
    """Petals' simulation of everybody, for large swarms: once a minute and after each move."""

    def __init__(self, number_of_blocks: int) -> None:
        self._number_of_blocks = number_of_blocks
        self._clock = LoopClock()
        self._balance = 1.0
        self._good_until_s = 0.0

    def of(self, nodes: Sequence[PlacedNode]) -> float:
        now_s = self._clock.monotonic_s()
        if now_s >= self._good_until_s:
            dice = np.random.default_rng(int(now_s))
            self._balance = balance(None, nodes, self._number_of_blocks, dice)
            self._good_until_s = now_s + max(60.0, 0.6 * len(nodes))
        return self._balance

    def somebody_moved(self) -> None:
        self._good_until_s = 0.0


def _throughput(node: PlacedNode) -> float:
    return node.speed / (node.end_block - node.first_block)
