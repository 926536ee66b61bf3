from __future__ import annotations

import pytest

from swarm.clock_offset import ClockOffsets, CorrectedClock, describe_offset
from swarm.protocol.identity import PeerId


class StoppedClock:
    def monotonic_s(self) -> float:
        return 7.0

    def unix_s(self) -> float:
        return 1_000_000.0

    async def sleep(self, duration_s: float) -> None: ...


def offsets(*said_s: float) -> ClockOffsets:
    known = ClockOffsets(StoppedClock())
    for number, offset_s in enumerate(said_s):
        known.observe(PeerId(str(number)), 1_000_000.0 + offset_s - 0.5, round_trip_s=1.0)
    return known


@pytest.mark.parametrize(
    ("said_s", "offset_s"),
    [
        ((), 0.0),
        ((600.0, 600.0), 0.0),  # too few
        ((600.0, 601.0, 599.0), 600.0),
        ((0.1, 600.0, 600.0, 600.0), 600.0),
        ((0.0, 0.1, 1e9), 0.0),  # one that lies moves nothing
        ((1.5, 1.5, 1.5), 0.0),  # small ones do no harm
    ],
)
def test_the_median_of_enough_peers_counts(said_s: tuple[float, ...], offset_s: float) -> None:
    assert offsets(*said_s).offset_s == pytest.approx(offset_s, abs=0.01)
    clock = CorrectedClock(StoppedClock(), offsets(*said_s))
    assert clock.unix_s() == pytest.approx(1_000_000.0 + offset_s, abs=0.01)
    assert clock.monotonic_s() == 7.0


def test_named_peers_are_believed_until_enough_others_are_heard() -> None:
    known = offsets(0.0, 0.0)
    known.believe(-600.0)
    assert known.offset_s == -600.0
    known.observe(PeerId("third"), 1_000_000.0, 0.0)
    assert known.offset_s == 0.0


def test_memory_is_bounded_and_the_newest_word_of_a_peer_counts() -> None:
    known = offsets(*[600.0] * 500)
    for number in range(436, 500):
        known.observe(PeerId(str(number)), 1_000_000.0 - 60, 0.0)
    assert known.offset_s == -60.0


@pytest.mark.parametrize(
    ("offset_s", "text"),
    [
        (0.0, ""),
        (42.0, "this computer's clock is 42 s slow"),
        (-605.0, "this computer's clock is 10 min 5 s fast"),
    ],
)
def test_words(offset_s: float, text: str) -> None:
    assert describe_offset(offset_s) == text
