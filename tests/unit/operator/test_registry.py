"""Orders to the books: by whom, once, and for this log only."""

from __future__ import annotations

import pytest

from swarm.ledger.replay import replay
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.operator_objects import (
    AdapterTermsEntry,
    Compensation,
    MemberEntry,
    MintOrder,
    ModelPrice,
    OrganisationEntry,
)
from tests.unit.operator.parties import MODEL, ORIGIN, START, World, peer, public

ORDER = MintOrder("ab" * 16, ORIGIN, "public", 1000, "because", START)


def code_of(w: World, order: object, *signers: str) -> ErrorCode:
    with pytest.raises(ProtocolError) as error:
        w.order(order, *signers)
    return error.value.code


@pytest.mark.parametrize(
    "signers",
    [
        ("mint-0",),
        ("mint-0", "mint-0"),
        ("mint-0", "operator"),
        ("operator",),
        ("x", "y", "mint-2"),
    ],
)
def test_two_of_three_make_money(signers: tuple[str, ...]) -> None:
    w = World()
    assert code_of(w, ORDER, *signers) is ErrorCode.BAD_SIGNATURE
    assert w.books.journal.balance("mint") == 0
    w.order(ORDER, "mint-2", "mint-1")
    assert w.books.journal.balance("budget:public") == 1000
    assert code_of(w, ORDER, "mint-0", "mint-1") is ErrorCode.EQUIVOCATION


def test_orders_are_for_one_log_and_one_day() -> None:
    w = World()
    foreign = MintOrder("ab" * 16, "other.example/log", "public", 1000, "", START)
    assert code_of(w, foreign, "mint-0", "mint-1") is ErrorCode.FOREIGN_OBJECT
    for age in (-301, 24 * 3600 + 1):
        w.now = START + age
        assert code_of(w, ORDER, "mint-0", "mint-1") is ErrorCode.NOT_VALID_NOW
    w.now = START
    for budget in ("", "UPPER", "a b", "x" * 32):
        wrong = MintOrder("cd" * 16, ORIGIN, budget, 0 if len(budget) > 9 else 5, "", START)
        assert code_of(w, wrong, "mint-0", "mint-1") is ErrorCode.BAD_FIELD


def test_a_repair_moves_money_between_accounts_and_names_what_it_repairs() -> None:
    w = World()
    w.mint("public", 500)
    event = w.books.journal.db.execute("SELECT id FROM event WHERE idx = 1").fetchone()[0]
    alice = f"user:{peer('alice')}"
    w.compensate(event, "budget:public", alice, 200)
    assert w.books.journal.balance(alice) == 200
    for source, target, units, signers, code in (
        (alice, "budget:public", 201, ("mint-0", "mint-1"), ErrorCode.OVER_LIMIT),
        (alice, "budget:public", 1, ("mint-0",), ErrorCode.BAD_SIGNATURE),
        ("mint", alice, 1, ("mint-0", "mint-1"), ErrorCode.BAD_FIELD),
        ("holds", alice, 1, ("mint-0", "mint-1"), ErrorCode.BAD_FIELD),
        (alice, f"escrow:{peer('n')}", 1, ("mint-0", "mint-1"), ErrorCode.BAD_FIELD),
        (alice, alice, 1, ("mint-0", "mint-1"), ErrorCode.BAD_FIELD),
        (alice, "user:0", 1, ("mint-0", "mint-1"), ErrorCode.BAD_FIELD),
        (alice, "fee", 0, ("mint-0", "mint-1"), ErrorCode.BAD_FIELD),
    ):
        with pytest.raises(ProtocolError) as error:
            w.compensate(event, source, target, units, *signers)
        assert error.value.code is code, (source, target)
    order = Compensation("00" * 16, ORIGIN, "no event", alice, "fee", 1, "", START)
    assert code_of(w, order, "mint-0", "mint-1") is ErrorCode.FOREIGN_OBJECT
    assert replay(w.books.journal.leaves(0, 99), w.books.policy.mint_keys).minted == 500


def test_entries_are_the_operators_and_count_once() -> None:
    w = World()
    organisation = OrganisationEntry("uni", public("uni").hex(), 1, START)
    member = MemberEntry(peer("bob"), "public", 5, "", START)
    for entry in (organisation, member, ModelPrice(MODEL, 3, 4, START)):
        assert code_of(w, entry, "mint-0", "mint-1") is ErrorCode.BAD_SIGNATURE
        w.order(entry, "operator")
        assert code_of(w, entry, "operator") is ErrorCode.EQUIVOCATION
    small_order = OrganisationEntry("evil", "01" + "00" * 31, 1, START)
    assert code_of(w, small_order, "operator") is ErrorCode.BAD_FIELD
    assert code_of(w, ModelPrice(MODEL, 0, 4, START), "operator") is ErrorCode.BAD_FIELD
    assert code_of(w, MemberEntry("nobody", "public", 5, "", START), "operator") is (
        ErrorCode.BAD_FIELD
    )


def test_terms_of_an_adapter_are_its_authors_and_final() -> None:
    w = World()
    terms = AdapterTermsEntry("aa" * 32, peer("ada"), 50, f"{peer('ada')}:10000", "", START)
    assert code_of(w, terms, "mallory") is ErrorCode.BAD_SIGNATURE
    w.order(terms, "ada")
    changed = AdapterTermsEntry("aa" * 32, peer("eve"), 200, f"{peer('eve')}:10000", "", START)
    assert code_of(w, changed, "eve") is ErrorCode.EQUIVOCATION
    for payees in ("", "x", "x:y", f"{peer('ada')}:9999", "someone:10000"):
        wrong = AdapterTermsEntry("bb" * 32, peer("ada"), 50, payees, "", START)
        assert code_of(w, wrong, "ada") is ErrorCode.BAD_FIELD
