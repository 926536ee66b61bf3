"""The status is put together from what metrics and engine count."""

from __future__ import annotations

from swarm.node.board import Board
from swarm.node.engine.api import EngineLoad
from swarm.node.metrics import NodeMetrics
from swarm.node.view import NodeStatus
from swarm.protocol.errors import ErrorCode


class BusyEngine:
    load = EngineLoad(
        cache_tokens_total=100, cache_tokens_free=40, queued_steps=3, busy_fraction=0.5
    )


def test_the_snapshot_is_complete() -> None:
    board = Board(NodeStatus(display_name="n", model="m"), NodeMetrics())
    assert board.snapshot().cache_tokens_total == 0
    board.engine = BusyEngine()
    board.update(state="online", first_block=2)
    board.metrics.session_opened()
    board.metrics.step_done(rows=1, tokens=7, blocks=3, queue_us=0, compute_us=0)
    board.metrics.refused(ErrorCode.GAP)
    status = board.snapshot()
    assert (status.state, status.display_name, status.first_block) == ("online", "n", 2)
    assert (status.sessions, status.tokens, status.refused) == (1, 7, 1)
    assert (status.cache_tokens_used, status.cache_tokens_total, status.queued_steps) == (
        60,
        100,
        3,
    )
    assert status.tokens_per_s > 0
    assert status.uptime_s > 0


def test_a_draining_node_counts_the_others_and_its_time() -> None:
    board = Board(NodeStatus(coverage=(1, 2, 3), first_block=1, end_block=3), NodeMetrics())
    board.drain(60.0)
    status = board.snapshot()
    assert (status.state, status.coverage) == ("draining", (1, 1, 2))
    assert status.drain_left_s is not None
    assert 59 < status.drain_left_s <= 60
    board.drain(0.0)
    assert board.snapshot().drain_left_s == 0


def test_a_resting_node_forgets_what_it_hosted() -> None:
    board = Board(NodeStatus(model="m", first_block=1, end_block=3, peer_id="p"), NodeMetrics())
    board.engine = BusyEngine()
    board.metrics.watch_engine(BusyEngine())
    board.forget_engine()
    board.rest()
    status = board.snapshot()
    assert (status.state, status.model, status.end_block) == ("resting", "m", 0)
    assert "swarm_node_cache_tokens_total 0.0" in board.metrics.text()
    assert (status.cache_tokens_total, status.peer_id) == (0, "")
