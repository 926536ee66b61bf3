"""What a node announces as its speed: measured on enough blocks, and without waits for a core."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swarm.node.engine import capacity
from swarm.node.engine.cache import CacheShape

BLOCKS = 10
BLOCK_S = 0.001
"""Of computing, for one pass through one block."""


class FakeMachine:
    """A span whose blocks take ``BLOCK_S``, on cores for which threads have to wait."""

    device = torch.device("cpu")
    dtype = torch.float32
    hidden_size = 8
    first_block = 20
    end_block = 20 + BLOCKS
    cache_shape = CacheShape(kv_heads=1, head_dim=4, dtype=torch.float32)

    def __init__(self, weight_bytes: int, waits_s: float, team_waits_s: float = 0.0) -> None:
        """In each run the measuring thread waits ``waits_s`` for a core, and a team of several
        threads ``team_waits_s`` for some of its own."""
        self.weight_bytes = weight_bytes
        self.now_s = 0.0
        self.waited_s = 0.0
        self.threads = 4
        self.runs: list[tuple[int, int, int]] = []
        self._waits_s = waits_s
        self._team_waits_s = team_waits_s

    def forward(
        self, hidden: torch.Tensor, batch: Any, first_block: int, end_block: int
    ) -> torch.Tensor:
        tokens = hidden.shape[1]
        self.runs.append((tokens, first_block, end_block))
        self.now_s += (end_block - first_block) * BLOCK_S + self._waits_s
        self.waited_s += self._waits_s
        if self.threads > 1:
            self.now_s += self._team_waits_s
        return hidden


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    def on(machine: FakeMachine) -> capacity.MeasuredSpeed:
        threads = SimpleNamespace(get_native_id=lambda: 7)
        monkeypatch.setattr(capacity, "threading", threads)
        clock = SimpleNamespace(perf_counter=lambda: machine.now_s)
        monkeypatch.setattr(capacity, "time", clock)
        monkeypatch.setattr(torch, "get_num_threads", lambda: machine.threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(machine, "threads", n))
        monkeypatch.setattr(
            capacity, "read_waited_s", lambda threads: machine.waited_s if threads == {7} else None
        )
        return capacity.measure_speed(machine)  # type: ignore[arg-type]

    return on


def test_waiting_for_a_core_is_no_slowness(on: Any) -> None:
    speed = on(FakeMachine(BLOCKS * 10**6, waits_s=0.02))
    assert speed.decode_tokens_per_s == pytest.approx(1 / BLOCK_S)
    assert speed.batched_tokens_per_s == pytest.approx(8 / BLOCK_S)
    assert speed.prefill_tokens_per_s == pytest.approx(256 / BLOCK_S)


def test_a_team_that_waits_for_some_of_its_threads_is_no_slower_than_one_thread(on: Any) -> None:
    machine = FakeMachine(BLOCKS * 10**6, waits_s=0.0, team_waits_s=0.5)
    assert on(machine).decode_tokens_per_s == pytest.approx(1 / BLOCK_S)
    assert machine.threads == 4, "as many as before"


def test_decoding_is_measured_on_more_weights_than_caches_keep(on: Any) -> None:
    small = FakeMachine(BLOCKS * 10**6, waits_s=0.0)
    on(small)
    assert {run[1:] for run in small.runs if run[0] < 256} == {(20, 30)}
    large = FakeMachine(BLOCKS * 10**9, waits_s=0.0)
    on(large)
    assert {run[1:] for run in large.runs} == {(20, 21)}, "that would take long"
    middle = FakeMachine(BLOCKS * 10**8, waits_s=0.0)
    on(middle)
    assert {run[1:] for run in middle.runs if run[0] < 256} == {(20, 22)}
