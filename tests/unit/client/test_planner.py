from __future__ import annotations

import pytest

from swarm.client.planner import FixedPlanner
from swarm.protocol.errors import NoRouteError
from swarm.protocol.identity import PeerId
from swarm.routing import ChainPlan, Hop

PLAN = ChainPlan(tuple(Hop(PeerId(str(at)), "", (), 10 * at, 10 * at + 10) for at in range(3)), 0.1)


async def test_a_fixed_plan_is_cut_to_the_blocks_asked_for() -> None:
    planner = FixedPlanner(PLAN)
    assert await planner.plan(0, 30) == PLAN
    part = await planner.plan(5, 20, excluded={PeerId("2")})
    spans = [(hop.peer_id, hop.first_block, hop.end_block) for hop in part.hops]
    assert spans == [("0", 5, 10), ("1", 10, 20)]


async def test_a_fixed_plan_has_no_replacement() -> None:
    with pytest.raises(NoRouteError) as caught:
        await FixedPlanner(PLAN).plan(5, 40, excluded={PeerId("1")})
    assert caught.value.missing_blocks == (*range(10, 20), *range(30, 40))
