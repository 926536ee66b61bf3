"""Can a model be kept whole? In words, for the people who run nodes.

Simulated under churn, fewer than two copies of a model keep no model whole, five always do
(docs/simulation.md): nodes come and go, and what comes back has to load first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby

from swarm.block_vectors import BlockVectors

FRAGILE_COPIES = 2.0
HEALTHY_COPIES = 5.0


class Verdict(StrEnum):
    """How a model does."""

    TOO_LARGE = "cannot be kept whole"
    BROKEN = "has blocks that nobody serves"
    FRAGILE = "breaks when the wrong node leaves"
    THIN = "is whole, but has few nodes to spare"
    HEALTHY = "is healthy"


@dataclass(frozen=True, slots=True)
class ModelHealth:
    """One model as the directory shows it."""

    model_name: str
    number_of_blocks: int
    nodes: int
    copies: float
    """Blocks hosted / blocks of the model."""
    missing: tuple[int, ...]
    """Blocks that no node serves or loads."""
    single: tuple[int, ...]
    """Blocks on one node only."""

    @property
    def verdict(self) -> Verdict:
        if self.copies < 1:
            return Verdict.TOO_LARGE
        if self.missing:
            return Verdict.BROKEN
        if self.single or self.copies < FRAGILE_COPIES:
            return Verdict.FRAGILE
        return Verdict.THIN if self.copies < HEALTHY_COPIES else Verdict.HEALTHY


def model_health(model_name: str, vectors: BlockVectors) -> ModelHealth:
    """The health of a model, given all its nodes."""
    planned = vectors.planned.tolist()
    return ModelHealth(
        model_name=model_name,
        number_of_blocks=vectors.number_of_blocks,
        nodes=vectors.nodes,
        copies=vectors.redundancy,
        missing=tuple(block for block, nodes in enumerate(planned) if nodes == 0),
        single=tuple(block for block, nodes in enumerate(planned) if nodes == 1),
    )


def advice(health: ModelHealth, others: Sequence[ModelHealth] = ()) -> str:
    """What to tell an operator whose model is not well, and what to do; empty if it is healthy.

    ``others`` are further models of the swarm, one of which the same nodes could serve instead.
    """
    verdict = health.verdict
    if verdict is Verdict.HEALTHY:
        return ""
    sentences = [f"{health.model_name} {verdict}"]
    if verdict is Verdict.TOO_LARGE:
        hosted = round(health.copies * health.number_of_blocks)
        sentences[0] += (
            f": its {_nodes(health.nodes)} can hold {hosted} of {health.number_of_blocks} blocks"
        )
    wanted = health.missing or health.single
    if wanted:
        spans = list(_spans(wanted))
        named = ", ".join(f"{first}:{end}" for first, end in spans[:4])
        more = ", ..." if len(spans) > 4 else ""
        first, end = max(spans, key=lambda span: span[1] - span[0])
        lack = "nobody serves" if health.missing else "only one node serves"
        sentences.append(
            f"{lack} blocks {named}{more}: start a node there, as with --blocks {first}:{end}"
        )
    elif verdict is Verdict.THIN or verdict is Verdict.FRAGILE:
        sentences.append(
            f"there are {health.copies:.1f} copies of it, {HEALTHY_COPIES:.0f} are safe: more nodes"
            " help wherever they host"
        )
    if verdict in (Verdict.TOO_LARGE, Verdict.BROKEN):
        sentences += _instead(health, others)
    return "; ".join(sentences)


def _instead(health: ModelHealth, others: Iterable[ModelHealth]) -> list[str]:
    """The model that gains most from nodes that cannot keep theirs whole."""
    better = [other for other in others if other.copies >= 1 and other.copies > health.copies]
    if not better:
        return ["or serve a smaller model"]
    neediest = min(better, key=lambda other: (other.copies, other.model_name))
    return [f"or serve {neediest.model_name}, which has {neediest.copies:.1f} copies"]


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _spans(blocks: Iterable[int]) -> Iterable[tuple[int, int]]:
    for _, group in groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0]):
        members = [block for _, block in group]
        yield members[0], members[-1] + 1
