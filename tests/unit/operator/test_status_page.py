"""What an operator has settled ranks donors on the status page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from swarm.client.status_page import OperatorLedger
from swarm.operator.books import Books
from swarm.protocol.errors import ProtocolError
from swarm.protocol.ledger_objects import MAX_ALLOWANCE_S
from swarm.protocol.prices import UNITS_PER_CREDIT
from swarm.status.leaderboard import leaderboard
from tests.unit.operator.parties import TOKEN, World, peer
from tests.unit.status.conftest import Watched


class Asked:
    """``OperatorClient`` without the way in between."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self._answer = answer

    async def totals(self) -> dict[str, Any]:
        return self._answer


def settled_books() -> Books:
    world = World()
    world.fund("alice", 10**9)
    for node in ("busy", "lazy"):
        world.enrol(node)
        client = world.request("alice", units=10**8, lifetime_s=MAX_ALLOWANCE_S)
        world.settle(node, client.voucher(node, 1000 if node == "busy" else 10))
    return world.books


async def test_settled_credits_come_from_the_operators_totals() -> None:
    ledger = OperatorLedger(Asked(settled_books().totals()))  # type: ignore[arg-type]
    credits_of = await ledger.credits()
    assert set(credits_of) == {peer("busy"), peer("lazy")}
    assert credits_of[peer("busy")] == pytest.approx(1000 * TOKEN / UNITS_PER_CREDIT, rel=0.1)


@pytest.mark.parametrize("answer", [{"leaders": [{"node": "x"}]}, {"leaders": [3]}, {"leaders": 3}])
async def test_an_operator_that_says_nonsense_is_a_protocol_error(answer: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        await OperatorLedger(Asked(answer)).credits()  # type: ignore[arg-type]


def test_settled_work_ranks_before_what_nodes_announce(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    boaster = watched.add(0, 30, display_name="boaster", organisation="B")
    worker = watched.add(0, 30, display_name="worker", organisation="W")
    watched.look()
    watched.change(boaster, decode_block_tokens=300_000)
    watched.change(worker, decode_block_tokens=3_000)
    nodes = watched.look().nodes
    watched.database.close()
    announced = leaderboard(nodes)
    assert not announced.settled
    assert [row.name for row in announced.nodes] == ["boaster", "worker"]
    settled = leaderboard(nodes, {worker.peer_id: 7.5})
    assert settled.settled
    assert [row.name for row in settled.nodes] == ["worker"]
    assert [(row.name, row.share) for row in settled.organisations] == [("W", 1.0)]
