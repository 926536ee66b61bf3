"""No search for garbage during a look, none among what was there before it, everything hourly."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator

import pytest

from swarm.status import undisturbed
from swarm.status.undisturbed import UndisturbedLooks


@pytest.fixture(autouse=True)
def leave_the_interpreter_as_it_was() -> Iterator[None]:
    interval_s = sys.getswitchinterval()
    yield
    gc.unfreeze()
    gc.enable()
    sys.setswitchinterval(interval_s)


class Knot:
    """Refers to itself: only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


def test_a_look_is_not_searched_and_what_it_leaves_is_left_out() -> None:
    looks = UndisturbedLooks()
    with looks:
        assert not gc.isenabled()
        kept = [Knot() for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(kept)
    assert not any(found is kept[0] for found in gc.get_objects())


def test_a_failed_look_leaves_the_collector_on() -> None:
    with pytest.raises(ZeroDivisionError), UndisturbedLooks():
        _ = 1 / 0
    assert gc.isenabled()


def test_everything_is_searched_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = UndisturbedLooks()
    with looks:
        knot = weakref.ref(Knot())
    gc.collect()
    assert knot() is not None, "left out"
    monkeypatch.setattr(undisturbed, "THAW_EACH_S", -1.0)
    with looks:
        pass
    assert knot() is None
