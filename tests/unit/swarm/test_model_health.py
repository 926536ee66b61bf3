"""What operators are told of a model that nodes cannot keep whole."""

from __future__ import annotations

import pytest

from swarm.block_vectors import PlacedNode, block_vectors
from swarm.model_health import ModelHealth, Verdict, advice, model_health
from swarm.protocol.identity import PeerId


def health(*spans: tuple[int, int], blocks: int = 10, name: str = "large") -> ModelHealth:
    nodes = [PlacedNode(PeerId(str(n)), *span, 100.0) for n, span in enumerate(spans)]
    return model_health(name, block_vectors(nodes, blocks))


@pytest.mark.parametrize(
    ("spans", "verdict"),
    [
        ([(0, 4), (6, 8)], Verdict.TOO_LARGE),
        ([(0, 8), (0, 8)], Verdict.BROKEN),
        ([(0, 10)], Verdict.FRAGILE),
        ([(0, 10), (0, 10), (0, 9)], Verdict.THIN),
        ([(0, 10), (0, 9), (0, 9)], Verdict.FRAGILE),
        ([(0, 10)] * 5, Verdict.HEALTHY),
    ],
)
def test_verdicts(spans: list[tuple[int, int]], verdict: Verdict) -> None:
    assert health(*spans).verdict is verdict


def test_the_operator_learns_what_is_missing_and_what_to_do() -> None:
    small = health((0, 10), (0, 10), name="small")
    text = advice(health((0, 4), (6, 8)), [small])
    assert text == (
        "large cannot be kept whole: its 2 nodes can hold 6 of 10 blocks; nobody serves blocks"
        " 4:6, 8:10: start a node there, as with --blocks 4:6; or serve small, which has 2.0 copies"
    )
    assert advice(health((0, 8), (0, 8))).endswith("or serve a smaller model")
    assert "only one node serves blocks 9:10" in advice(health((0, 10), (0, 9), (0, 9)))
    assert "2.9 copies" in advice(health((0, 10), (0, 10), (0, 9)))
    assert advice(health(*[(0, 10)] * 5)) == ""
