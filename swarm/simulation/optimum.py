"""Yardsticks: what a placement could carry at best, and how short its chains can be."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from swarm.block_vectors import PlacedNode

PRECISION = 0.002


def best_throughput(nodes: Iterable[PlacedNode], number_of_blocks: int) -> float:
    """All speed / all blocks: what no placement exceeds. Tokens per second."""
    return sum(node.speed for node in nodes) / number_of_blocks


def weakest_stretch(nodes: Sequence[PlacedNode], number_of_blocks: int) -> float:
    """The throughput that every block can have at once, if routing splits work ideally.

    Relative to :func:`best_throughput`, 0 to 1. For a given throughput the nodes are intervals
    with a capacity and blocks are served in order by whoever ends first, which is optimal.
    """
    capacity: dict[tuple[int, int], float] = {}
    for node in nodes:
        span = (node.first_block, node.end_block)
        capacity[span] = capacity.get(span, 0.0) + node.speed
    starting: list[list[tuple[int, float]]] = [[] for _ in range(number_of_blocks)]
    for (first, end), speed in capacity.items():
        starting[first].append((end, speed))
    best = best_throughput(nodes, number_of_blocks)
    low, high = 0.0, 1.0
    while high - low > PRECISION:
        middle = (low + high) / 2
        if _can_carry(starting, middle * best):
            low = middle
        else:
            high = middle
    return low


def _can_carry(starting: Sequence[Sequence[tuple[int, float]]], throughput: float) -> bool:
    available: list[tuple[int, float]] = []
    for block, spans in enumerate(starting):
        for span in spans:
            heapq.heappush(available, span)
        missing = throughput
        while missing > 0.0:
            if not available:
                return False
            end, speed = heapq.heappop(available)
            if end <= block:
                continue
            if speed > missing:
                heapq.heappush(available, (end, speed - missing))
            missing -= speed
    return True


def fewest_hops(nodes: Iterable[PlacedNode], number_of_blocks: int) -> int:
    """Hops of the shortest chain; 0 when no chain covers the model."""
    reach = [0] * number_of_blocks
    for node in nodes:
        reach[node.first_block] = max(reach[node.first_block], node.end_block)
    hops = block = farthest = 0
    for start in range(number_of_blocks):
        farthest = max(farthest, reach[start])
        if start == block:
            if farthest <= start:
                return 0
            hops, block = hops + 1, farthest
    return hops
