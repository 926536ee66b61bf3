"""Splits lose and invent nothing; draws are fair; nobody lives from cycles of parents."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.ledger.rules import (
    AdapterTerms,
    escrow_part,
    expired_credit,
    fee,
    is_eligible,
    is_vetted,
    pair_limit,
    route_seed,
    royalties,
    split_back,
)

AMOUNTS = st.integers(0, 2**53 - 1)


@given(AMOUNTS)
def test_fee_and_royalty_leave_the_node_something(amount: int) -> None:
    terms = {"a": AdapterTerms(200, (("x", 3_333), ("y", 6_667)))}
    paid = royalties(amount, "a", terms.get)
    assert sum(paid.values()) <= amount // 5
    assert amount - fee(amount, 30) - sum(paid.values()) >= amount * 7 // 10


def test_parents_get_their_share_to_the_third_generation() -> None:
    terms = {
        "child": AdapterTerms(100, (("author", 10_000),), (("parent", 5_000),)),
        "parent": AdapterTerms(0, (("p", 10_000),), (("grandparent", 5_000),)),
        "grandparent": AdapterTerms(0, (("g", 10_000),), (("great", 5_000),)),
        "great": AdapterTerms(0, (("gg", 10_000),), (("too-far", 5_000),)),
        "too-far": AdapterTerms(0, (("ggg", 10_000),)),
    }
    assert royalties(160_000, "child", terms.get) == {
        "author": 8_000,
        "p": 4_000,
        "g": 2_000,
        "gg": 2_000,
    }


def test_circles_and_unknown_parents_get_nothing() -> None:
    terms = {
        "a": AdapterTerms(200, (("x", 10_000),), (("b", 2_500), ("unknown", 2_500))),
        "b": AdapterTerms(200, (("y", 10_000),), (("a", 5_000),)),
    }
    assert royalties(1_000, "a", terms.get) == {"x": 150, "y": 50}
    assert royalties(1_000, "unknown", terms.get) == {}


@pytest.mark.parametrize(
    "terms",
    [
        AdapterTerms(201, (("x", 10_000),)),
        AdapterTerms(50, ()),
        AdapterTerms(50, (("x", 9_999),)),
        AdapterTerms(50, (("x", 5_000), ("x", 5_000))),
        AdapterTerms(50, (*tuple((f"p{n}", 1250) for n in range(7)), ("z", 1249), ("y", 1))),
        AdapterTerms(50, (("x", 10_000),), (("p", 5_001),)),
        AdapterTerms(50, (("x", 10_000),), (("p", 0),)),
    ],
)
def test_terms_that_do_not_add_up(terms: AdapterTerms) -> None:
    assert not terms.is_acceptable()
    assert AdapterTerms(200, (("x", 4_000), ("y", 6_000)), (("p", 5_000),)).is_acceptable()


@given(
    st.dictionaries(st.text(max_size=4), st.integers(1, 2**50), min_size=1, max_size=9), st.data()
)
def test_what_is_split_back_is_all_of_it(sources: dict[str, int], data: st.DataObject) -> None:
    amount = data.draw(st.integers(0, sum(sources.values())))
    parts = split_back(amount, sources)
    assert sum(parts.values()) == amount
    assert all(0 < parts[name] <= sources[name] for name in parts)


def test_a_draw_leaves_about_as_many_nodes_as_wanted() -> None:
    nodes = [f"node-{number}" for number in range(100)]
    counts = []
    for serial in range(200):
        seed = route_seed(b"beacon", f"{serial:032x}", 100)
        counts.append(sum(is_eligible(seed, node) for node in nodes))
    assert 7 < sum(counts) / len(counts) < 9
    for few in (0, 1, 8):
        seed = route_seed(b"beacon", "00" * 16, few)
        assert all(is_eligible(seed, node) for node in nodes)


def test_probation_ends_by_record_or_by_certificate() -> None:
    day = 24 * 3600
    assert is_vetted(certified=True, clean_audits=0, registered_for_s=0)
    assert is_vetted(certified=False, clean_audits=100, registered_for_s=7 * day)
    assert not is_vetted(certified=False, clean_audits=99, registered_for_s=70 * day)
    assert not is_vetted(certified=False, clean_audits=1000, registered_for_s=6 * day)
    assert escrow_part(1001, vetted=True) == 501
    assert escrow_part(1001, vetted=False) == 1001


def test_old_credit_is_spent_first_and_then_expires() -> None:
    assert expired_credit(balance=100, earned_lately=60) == 40
    assert expired_credit(balance=50, earned_lately=60) == 0
    assert pair_limit(1_000_000, 10) == 50_000
    assert pair_limit(0, 10) == 10
