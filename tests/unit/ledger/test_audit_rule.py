"""The rule of audits on made-up states: what rounding may do, what a missing adapter may not."""

from __future__ import annotations

import numpy as np
import pytest

from swarm.ledger.audit_rule import (
    LEAST_ADAPTER_EFFECT,
    SIXTEEN_BIT,
    AdapterShare,
    Floats,
    adapter_share,
    compare,
)
from swarm.ledger.sketch import Sketcher
from swarm.protocol.errors import ProtocolError

TOKENS, HIDDEN = 127, 576


def drawn(seed: int, size: float) -> Floats:
    """Random states whose tokens have this length."""
    states = np.random.default_rng(seed).normal(size=(TOKENS, HIDDEN))
    states *= size / np.linalg.norm(states, axis=-1, keepdims=True)
    return states.astype(np.float32)


GIVEN = drawn(0, 10.0)
BARE = GIVEN + drawn(1, 1.0)
ROUNDING = 0.012
"""Of an honest bfloat16 node, relative to what the span adds."""


@pytest.mark.parametrize("effect", [0.015, 0.02, 0.2])
@pytest.mark.parametrize("sketched", [False, True])
def test_an_adapter_below_rounding_is_missed(effect: float, sketched: bool) -> None:
    adapted = BARE + drawn(2, effect)
    sketcher = Sketcher(HIDDEN, bytes(range(16)))

    def share(answered: Floats) -> AdapterShare:
        # the replica rounds as well, each time otherwise
        states = [GIVEN, answered, adapted + drawn(8, ROUNDING), BARE + drawn(9, ROUNDING)]
        return adapter_share(*(map(sketcher.project, states) if sketched else states))

    honest, dishonest = (share(right + drawn(7, ROUNDING)) for right in (adapted, BARE))
    assert honest.passes(SIXTEEN_BIT)
    assert not dishonest.passes(SIXTEEN_BIT)
    if effect < 0.02:  # which errors alone do not show
        assert compare(GIVEN, BARE + drawn(7, ROUNDING), adapted).passes(SIXTEEN_BIT)


def test_a_third_of_an_adapter_is_too_little() -> None:
    adapted = BARE + drawn(2, 0.02)
    for part, passes in ((1.0, True), (0.5, True), (0.3, False), (-1.0, False)):
        found = adapter_share(
            GIVEN, (BARE + part * (adapted - BARE)).astype(np.float32), adapted, BARE
        )
        assert found.share == pytest.approx(part, abs=0.01)
        assert found.passes(SIXTEEN_BIT) is passes


def test_an_adapter_that_does_nothing_here_accuses_nobody() -> None:
    found = adapter_share(GIVEN, BARE + drawn(7, ROUNDING), BARE, BARE)
    assert found.effect == 0.0
    assert found.passes(SIXTEEN_BIT)


@pytest.mark.parametrize("sketched", [False, True])
@pytest.mark.parametrize("tokens", [8, 32, TOKENS])
def test_an_adapter_that_drowns_in_rounding_accuses_nobody(tokens: int, sketched: bool) -> None:
    """Its share is a half for whoever has it and whoever has not, give or take the dice."""
    sketcher = Sketcher(HIDDEN, bytes(range(16)))
    for seed in range(100):
        states = [
            GIVEN,
            BARE + drawn(1000 + seed, ROUNDING),
            BARE + drawn(2000 + seed, ROUNDING),
            BARE + drawn(3000 + seed, ROUNDING),
        ]
        if sketched:
            states = [sketcher.project(each) for each in states]
        found = adapter_share(*(each[:tokens] for each in states))
        assert found.effect > LEAST_ADAPTER_EFFECT * SIXTEEN_BIT.median
        assert found.passes(SIXTEEN_BIT), (seed, found)


def test_not_a_number_is_no_share() -> None:
    adapted = BARE + drawn(2, 0.2)
    found = adapter_share(GIVEN, np.full_like(BARE, np.nan), adapted, BARE)
    assert not found.passes(SIXTEEN_BIT)


@pytest.mark.parametrize("shape", [(0, HIDDEN), (TOKENS, HIDDEN + 1)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ProtocolError):
        adapter_share(GIVEN, np.zeros(shape, np.float32), BARE, BARE)
    with pytest.raises(ProtocolError):
        empty = np.zeros((0, HIDDEN), np.float32)
        adapter_share(empty, empty, empty, empty)
