"""How many threads: all when alone, fewer while others need the cores, all again afterwards."""

from __future__ import annotations

from pathlib import Path

from swarm.node.engine.contention import (
    FIRST_HOLD_S,
    LONGEST_HOLD_S,
    PAUSE_S,
    WINDOW_S,
    ContentionMeter,
    ThreadGovernor,
    read_waited_s,
)


def run(governor: ThreadGovernor, start_s: float, seconds: float, *, waiting: bool) -> list[int]:
    """Update each 0.5 s; with contention the threads wait only while there are several."""
    chosen = []
    for step in range(int(seconds * 2)):
        waited_s = 0.3 if waiting and governor.threads > 1 else 0.0
        chosen.append(governor.update(start_s + step / 2, 0.5, waited_s))
    return chosen


def test_alone_it_keeps_all_threads() -> None:
    assert set(run(ThreadGovernor(4), 0, 60, waiting=False)) == {4}


def test_under_contention_it_halves_down_to_one() -> None:
    governor = ThreadGovernor(8)
    assert [governor.update(step / 4, 0.25, 0.2) for step in range(4)] == [4, 2, 1, 1]


def test_lasting_contention_is_probed_less_and_less() -> None:
    chosen = run(ThreadGovernor(2), 0, 120, waiting=True)
    assert chosen.count(2) <= 4 + 120 / LONGEST_HOLD_S
    assert 2 in chosen[-int(4 * LONGEST_HOLD_S) :], "it must look again from time to time"


def test_all_threads_come_back_when_the_others_have_gone() -> None:
    governor = ThreadGovernor(4)
    run(governor, 0, 30, waiting=True)
    assert governor.threads <= 2
    assert run(governor, 30, 2 * LONGEST_HOLD_S, waiting=False)[-1] == 4
    # A quiet time makes it quick again.
    governor.update(100, 0.5, 0.4)
    assert governor.update(100 + 1.1 * FIRST_HOLD_S, 0.5, 0.0) == 4


def test_one_thread_is_the_least() -> None:
    assert set(run(ThreadGovernor(0), 0, 10, waiting=True)) == {1}


def test_the_meter_reads_once_a_window_and_reports_changes() -> None:
    waited = iter([10.0, 10.0, 10.5, 10.5])
    reads: list[float] = []
    changes: list[int] = []

    def read() -> float:
        reads.append(next(waited))
        return reads[-1]

    governor = ThreadGovernor(2)
    meter = ContentionMeter(governor, changes.append, read)
    for step in range(3):
        meter.computed(step * WINDOW_S, WINDOW_S / 4)
    assert len(reads) == 1
    meter.computed(1.0, WINDOW_S)
    assert (len(reads), changes) == (2, [])
    meter.computed(2.0, WINDOW_S)
    assert (changes, governor.threads) == ([1], 1)


def test_only_threads_that_compute_count_as_waiting(tmp_path: Path) -> None:
    """While one node of a chain computes, the event loops of the others wait for its cores."""
    for thread, waited_ns in ((1, 9_000_000_000), (2, 500_000_000), (3, 250_000_000)):
        (tmp_path / str(thread)).mkdir()
        (tmp_path / str(thread) / "schedstat").write_text(f"123 {waited_ns} 7\n")
    (tmp_path / "4").mkdir()  # it ended while this was read
    assert read_waited_s([2, 3, 4, 5], tmp_path) == 0.75
    assert read_waited_s([2], tmp_path / "missing") is None


def test_after_a_pause_all_threads_compute_again() -> None:
    """Eight sessions left a node with one thread; the prompt after them took twice as long."""
    changes: list[int] = []
    waited_s = [0.0]
    governor = ThreadGovernor(2)
    meter = ContentionMeter(governor, changes.append, lambda: waited_s[0])
    waited_s[0] = 1.0
    meter.computed(WINDOW_S, WINDOW_S)
    assert changes == [1]
    meter.begins(WINDOW_S + PAUSE_S / 2)
    meter.computed(2 * WINDOW_S + PAUSE_S / 2, WINDOW_S / 2)
    assert changes == [1], "no pause yet"
    waited_s[0] = 9.0  # by others, meanwhile
    meter.begins(2 * WINDOW_S + 2 * PAUSE_S)
    assert changes == [1, 2]
    meter.computed(3 * WINDOW_S + 2 * PAUSE_S, WINDOW_S)
    assert changes == [1, 2], "what threads waited during the pause does not count"


def test_a_pause_within_the_hold_changes_nothing() -> None:
    governor = ThreadGovernor(2)
    governor.update(100.0, 1.0, 1.0)
    assert governor.begin(100.0 + FIRST_HOLD_S / 2) == 1
    assert governor.begin(100.0 + FIRST_HOLD_S) == 2
