"""Audits in a swarm of six honest and three evil nodes: who is found, and that nobody else is."""

from __future__ import annotations

import pytest

from swarm import virtual_time
from swarm.ledger.reputation import Standing
from swarm.simulation.evil import Behaviour
from tests.sim.evil_swarm import EvilSwarm, ask, ask_until_trusted

B = Behaviour

SESSIONS = 14
"""More than enough for each node to have been chosen twice."""
LATE_S = 1.0
"""Of 20 steps that take 3 ms each."""


@pytest.mark.parametrize(
    "evil",
    [
        (B.IDENTITY, B.SKIP, B.COARSE),
        (B.LAZY, B.STALE, B.NOISE),
        (B.STEER, B.NOT_A_NUMBER, B.LAZY),
        (B.NOT_A_NUMBER, B.LAZY, B.SKIP),
    ],
    ids=lambda evil: "-".join(each.name for each in evil),
)
def test_evil_nodes_are_found_and_honest_ones_are_not(evil: tuple[Behaviour, ...]) -> None:
    async def run() -> None:
        swarm = EvilSwarm(evil)
        async with swarm.running() as client:
            last = []
            for number in range(SESSIONS):
                outcomes = await ask_until_trusted(client, number)
                last.append(outcomes[-1])
            reputations = client.auditor.reputations
            # What a client trusts is right, from the first answer on.
            assert all(outcome.right for outcome in last if outcome.is_trusted)
            assert sum(outcome.is_trusted for outcome in last) >= SESSIONS - 2
            wrong = {B.NOT_A_NUMBER}  # caught by hops and clients without any audit
            for node in swarm.nodes:
                standing = reputations.standing(node.peer_id, swarm.clock.unix_s())
                reputation = reputations.of(node.peer_id)
                if node.behaviour is None:
                    assert standing is Standing.USABLE
                elif node.behaviour not in wrong:
                    assert standing is not Standing.USABLE, node.behaviour
                    # Every session of a new node is looked at; a lazy one may be lucky for a while.
                    assert reputation.audits <= 12
            served = {peer for outcome in last[-4:] for peer in outcome.peers}
            assert not served & swarm.evil

    virtual_time.run(run())


@pytest.mark.parametrize(
    "evil",
    [
        (B.WRONG_SHAPE, B.SILENT, B.OVER_CLAIMED),
        (B.OVER_CLAIMED, B.WRONG_SHAPE, B.SLOW),
        (B.OVERSIZED, None, B.WRONG_SHAPE),
        (B.SILENT, B.OVERSIZED, None),
        (None, B.SLOW, B.OVERSIZED),
    ],
    ids=lambda evil: "-".join(each.name if each else "honest" for each in evil),
)
def test_nodes_that_break_the_protocol_or_are_late_cost_no_answer(
    evil: tuple[Behaviour | None, ...],
) -> None:
    async def run() -> None:
        swarm = EvilSwarm(evil)
        async with swarm.running() as client:
            outcomes, took_s = [], []
            for number in range(SESSIONS):
                began_s = swarm.clock.monotonic_s()
                outcomes.append(await ask(client, number))
                took_s.append(swarm.clock.monotonic_s() - began_s)
            # Right at once: nothing has to be asked again.
            assert all(outcome.right and outcome.is_trusted for outcome in outcomes)
            served = {peer for outcome in outcomes[-4:] for peer in outcome.peers}
            assert not served & swarm.evil
            # Who announces much or is late is chosen for a session or two, not again and again.
            chosen = sum(bool(set(outcome.peers) & swarm.evil) for outcome in outcomes)
            assert chosen <= 3
            assert max(took_s[-4:]) < LATE_S
            for node in swarm.nodes:
                standing = client.auditor.reputations.standing(node.peer_id, swarm.clock.unix_s())
                assert standing is Standing.USABLE or node.behaviour is not None

    virtual_time.run(run())
