"""A hop that speaks falsely to its neighbours, or about them: who is avoided for it, who is not."""

from __future__ import annotations

import pytest

from swarm import virtual_time
from swarm.client.hops import SessionRequest
from swarm.client.quarrels import LONGEST_SUSPICION_S
from swarm.protocol.tensors import DType
from swarm.simulation.evil import Behaviour
from swarm.simulation.evil_frames import Foul
from swarm.simulation.numeric_engine import NUMERIC_HIDDEN
from tests.sim.evil_swarm import BLOCKS, REVISION, EvilSwarm, converse

SESSIONS = 10
PAUSE_S = 20.0
"""Between two sessions, so that what keeps a node out is more than a suspicion."""
MOST_SPOILT = 3
WHOLE_CHAIN = (Foul.SHIFTED, Foul.AHEAD)
"""Any hop may have done it, so that it takes more to find who it was."""


@pytest.mark.parametrize(
    ("foul", "span"),
    [
        *((foul, 0) for foul in (*Foul, Behaviour.NOT_A_NUMBER) if foul is not Foul.SLANDER),
        *((foul, 1) for foul in (Foul.SLANDER, Foul.SHIFTED, Foul.BEYOND_THE_END)),
    ],
    ids=str,
)
def test_one_evil_hop_spoils_no_answer_and_is_out_soon(foul: Foul | Behaviour, span: int) -> None:
    """Among honest ones, of which none is avoided for longer than a moment."""

    async def run() -> None:
        evil: list[Foul | Behaviour | None] = [None, None, None]
        evil[span] = foul
        swarm = EvilSwarm(evil)
        request = SessionRequest(REVISION, NUMERIC_HIDDEN, 1, 64, DType.FLOAT32)
        async with swarm.running(audits=False) as client:
            spoilt = []
            for number in range(SESSIONS):
                begun_s = swarm.clock.monotonic_s()
                chain = await client.open_chain(request, number_of_blocks=BLOCKS)
                assert await converse(chain, number, prompt=6, tokens=8), "a wrong answer"
                await chain.close()
                known = client._known[REVISION]
                if any(each.latest_s >= begun_s for each in known.quarrels._quarrels.values()):
                    spoilt.append(number)
                await swarm.clock.sleep(PAUSE_S)
            assert 1 <= len(spoilt) <= MOST_SPOILT
            await swarm.clock.sleep(LONGEST_SUSPICION_S)
            now_s = swarm.clock.monotonic_s()
            for node in swarm.nodes:
                if node.behaviour is None:
                    assert not known.is_banned(node.peer_id)
                else:
                    is_guilty = known.quarrels.explains_quarrels(node.peer_id, now_s)
                    assert is_guilty or len(spoilt) == 1 or foul in WHOLE_CHAIN

    virtual_time.run(run())


def test_a_last_hop_that_sends_no_numbers_is_replaced_before_anybody_uses_them() -> None:
    async def is_met(seed: int) -> bool:
        swarm = EvilSwarm([None, None, Behaviour.NOT_A_NUMBER], seed)
        request = SessionRequest(REVISION, NUMERIC_HIDDEN, 1, 64, DType.FLOAT32)
        async with swarm.running(audits=False) as client:
            chain = await client.open_chain(request, number_of_blocks=BLOCKS)
            opened_with = {hop.peer_id for hop in chain.plan.hops}
            assert await converse(chain, seed, prompt=6, tokens=8), "a wrong answer"
            served_by = {hop.peer_id for hop in chain.plan.hops}
            await chain.close()
            assert not swarm.evil & served_by
            known = client._known[REVISION]
            banned = {node.peer_id for node in swarm.nodes if known.is_banned(node.peer_id)}
            assert banned == swarm.evil & opened_with
            return bool(banned)

    assert sum(virtual_time.run(is_met(seed)) for seed in range(8)) >= 1
