"""The daily sum for being there: who has a part of it, how much, and what identities change."""

from __future__ import annotations

from itertools import count

import pytest

from swarm.ledger.replay import replay
from swarm.operator.books import Books
from swarm.operator.journal import Journal
from tests.unit.operator.parties import World, key, peer, policy, public

DAY, HOUR = 24 * 3600, 3600
POT = 2400
SEGMENTS = count()


@pytest.fixture
def w() -> World:
    books = Books(Journal.in_memory(), policy(uptime_daily_units=POT), key("operator"))
    world = World(books)
    world.now += DAY - world.now % DAY  # midnight
    for name in ("lab", "telco", "uni"):
        world.organisation(name, may_validate=True)
    world.mint("uptime", 10 * POT)
    for name in ("a", "b", "c"):
        world.enrol(name)
    assert world.books.share_uptime(world.now) == 0
    return world


def seen(w: World, node: str, hours: int, *validators: str, outcome: str = "passed") -> None:
    """Challenged once in each of so many hours of the day, by each of these."""
    midnight = w.now
    for _ in range(hours):
        for validator in validators:
            w.verdict(node, outcome, next(SEGMENTS), validator)
        w.now += HOUR
    w.now = midnight


def waiting(w: World, node: str) -> int:
    return w.books.journal.balance(f"escrow:{peer(node)}")


def test_a_day_is_shared_by_hours_once_and_the_log_adds_up(w: World) -> None:
    seen(w, "a", 18, "lab", "telco")
    seen(w, "a", 18, "lab")  # more challenges in the same hours are no more hours
    seen(w, "b", 6, "uni", "telco")
    assert w.books.share_uptime(w.now + DAY - 1) == 0  # the day is not over
    w.now += DAY
    assert w.books.share_uptime(w.now) == POT
    assert (waiting(w, "a"), waiting(w, "b"), waiting(w, "c")) == (1800, 600, 0)
    assert w.books.share_uptime(w.now) == 0
    w.now += DAY
    assert w.books.share_uptime(w.now) == 0  # nobody was seen
    assert w.books.journal.balance("budget:uptime") == 9 * POT
    leaves = w.books.journal.leaves(0, w.books.journal.size)
    replayed = replay(leaves, [public(f"mint-{number}") for number in range(3)])
    assert replayed.balances[f"escrow:{peer('a')}"] == 1800
    assert replayed.root() == w.books.journal.tree.root()


def test_it_takes_two_organisations_that_agree(w: World) -> None:
    seen(w, "a", 24, "lab")
    seen(w, "b", 24, "lab")
    seen(w, "b", 4, "telco")
    seen(w, "c", 4, "uni", "telco", "lab")
    w.now += DAY
    w.books.share_uptime(w.now)
    assert (waiting(w, "a"), waiting(w, "b"), waiting(w, "c")) == (0, POT // 2, POT // 2)


def test_more_identities_share_the_sum_and_do_not_make_it_grow(w: World) -> None:
    for number in range(300):  # more than one event holds
        w.enrol(f"sybil-{number}")
        seen(w, f"sybil-{number}", 1, "lab", "telco")
    seen(w, "a", 12, "lab", "telco")
    w.now += DAY
    assert w.books.share_uptime(w.now) == POT
    assert w.books.journal.balance("budget:uptime") == 9 * POT
    everybody = ["a", *(f"sybil-{number}" for number in range(300))]
    assert sum(waiting(w, name) for name in everybody) == POT
    assert waiting(w, "a") == pytest.approx(POT * 12 / 312, abs=1)


def test_who_failed_has_no_part_and_a_cheat_gives_it_back(w: World) -> None:
    for name in ("a", "b"):
        seen(w, name, 6, "lab", "telco")
    w.verdict("a", "failed", next(SEGMENTS), "lab")
    w.now += DAY
    assert w.books.share_uptime(w.now) == POT
    assert (waiting(w, "a"), waiting(w, "b")) == (0, POT)
    for _ in range(2):
        w.verdict("b", "failed", next(SEGMENTS), "lab", "telco")
    assert waiting(w, "b") == 0
    assert w.books.journal.balance("budget:uptime") == 10 * POT


def test_an_empty_budget_pays_what_it_has(w: World) -> None:
    spent = w.books.journal.balance("budget:uptime") - 10
    w.compensate(_mint_event(w), "budget:uptime", "budget:public", spent)
    seen(w, "a", 2, "lab", "telco")
    w.now += DAY
    assert w.books.share_uptime(w.now) == 10
    assert waiting(w, "a") == 10


def _mint_event(w: World) -> str:
    row = w.books.journal.db.execute("SELECT id FROM event WHERE id LIKE 'mint:%'").fetchone()
    return str(row[0])
