"""A node's way: enrolled, on probation, vetted; or caught, frozen, and its escrow given back."""

from __future__ import annotations

import pytest

from swarm.operator.nodes import ACTIVE, QUARANTINED, REVOKED
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.ledger_objects import MAX_ALLOWANCE_S, Revocation, Rotation, sign
from tests.unit.operator.parties import TOKEN, Client, World, identity, key, peer, public

DAY = 24 * 3600
EARNED = 1000 * TOKEN * 97 // 100


def world(*organisations: str) -> World:
    w = World()
    w.fund("alice", 10**9)
    for name in organisations:
        w.organisation(name, may_validate=True)
    return w


def earn(w: World, node: str) -> Client:
    client = w.request("alice", units=10**8, lifetime_s=MAX_ALLOWANCE_S)
    w.settle(node, client.voucher(node, 1000))
    return client


def spendable(w: World, account: str) -> int:
    return w.books.journal.balance(f"user:{peer(account)}")


def waiting(w: World, node: str) -> int:
    return w.books.journal.balance(f"escrow:{peer(node)}")


def clean_audits(w: World, node: str) -> int:
    return int(w.books.node(peer(node))["clean_audits"])


def test_a_volunteer_waits_for_its_record_and_then_for_three_days() -> None:
    w = world("lab")
    w.enrol("node", payout="donor")
    earn(w, "node")
    assert (spendable(w, "donor"), waiting(w, "node")) == (0, EARNED)
    w.now += 8 * DAY
    assert w.books.vest(w.now) == 0
    for segment in range(100):
        assert w.verdict("node", "passed", segment, "lab") == ACTIVE
        w.verdict("node", "passed", segment, "lab")  # the same segment counts once
    assert w.books.vest(w.now) == 1
    assert (spendable(w, "donor"), waiting(w, "node")) == (EARNED, 0)
    earn(w, "node")
    assert spendable(w, "donor") == EARNED + EARNED // 2
    w.now += 3 * DAY - 1
    assert w.books.vest(w.now) == 0
    w.now += 1
    assert w.books.vest(w.now) == 1
    assert (spendable(w, "donor"), waiting(w, "node")) == (2 * EARNED, 0)


def test_an_organisation_vouches_while_its_certificate_lasts() -> None:
    w = world()
    w.organisation("uni")
    with pytest.raises(ProtocolError):
        w.enrol("node", organisation="unknown")
    w.enrol("node", organisation="uni")
    earn(w, "node")
    assert waiting(w, "node") == EARNED - EARNED // 2
    w.now += 91 * DAY
    earn(w, "node")
    assert waiting(w, "node") == EARNED - EARNED // 2 + EARNED
    assert w.books.vest(w.now) == 0


def test_two_failed_segments_freeze_and_two_validators_take() -> None:
    w = world("lab", "telco")
    w.enrol("node")
    earn(w, "node")
    before = spendable(w, "alice")
    assert w.verdict("node", "failed", 1, "lab") == ACTIVE
    assert w.verdict("node", "failed", 1, "lab") == ACTIVE  # the same one again is no second
    assert w.verdict("node", "failed", 2, "lab") == QUARANTINED
    w.now += 30 * DAY
    assert w.books.vest(w.now) == 0
    assert waiting(w, "node") == EARNED
    assert w.verdict("node", "failed", 2, "telco") == REVOKED
    assert waiting(w, "node") == 0
    assert spendable(w, "alice") == before + EARNED
    with pytest.raises(ProtocolError) as error:
        earn(w, "node")
    assert error.value.code is ErrorCode.FOREIGN_OBJECT
    with pytest.raises(ProtocolError):
        w.enrol("node", sequence=2)


def test_a_second_organisation_confirms_by_challenges_of_its_own() -> None:
    w = world("lab", "telco")
    w.enrol("node")
    earn(w, "node")
    before = spendable(w, "alice")
    w.verdict("node", "failed", 1, "lab")
    assert w.books.quarantined("") == []
    assert w.verdict("node", "failed", 2, "lab") == QUARANTINED
    (listed,) = w.books.quarantined("")
    assert listed == {"node": peer("node"), "organisation": "", "accused_by": ["lab"]}
    assert w.books.quarantined(peer("node")) == []
    # as much as it likes, one organisation takes nothing
    assert w.verdict("node", "failed", 3, "lab") == QUARANTINED
    # one odd segment of another is no confirmation
    assert w.verdict("node", "failed", 4, "telco") == QUARANTINED
    assert waiting(w, "node") == EARNED
    assert w.verdict("node", "failed", 5, "telco") == REVOKED
    assert spendable(w, "alice") == before + EARNED
    assert w.books.quarantined("") == []


def test_whose_verdicts_no_longer_count_confirms_nothing() -> None:
    w = world("lab", "telco")
    w.enrol("node")
    earn(w, "node")
    for segment in (1, 2):
        w.verdict("node", "failed", segment, "lab")
    assert [each["organisation"] for each in w.books.validators()] == ["lab", "telco"]
    w.now += 1
    w.organisation("lab", may_validate=False)
    assert w.books.validators() == [{"organisation": "telco", "key": public("telco").hex()}]
    for segment in (3, 4):
        assert w.verdict("node", "failed", segment, "telco") == QUARANTINED
    assert waiting(w, "node") == EARNED


def test_what_two_organisations_cannot_reproduce_costs_the_record_only() -> None:
    w = world("liar", "lab", "telco")
    w.enrol("node")
    earn(w, "node")
    for segment in (1, 2):
        w.verdict("node", "failed", segment, "liar")
    assert w.verdict("node", "passed", 3, "lab") == QUARANTINED
    assert w.verdict("node", "not_reproduced", 4, "lab") == QUARANTINED
    assert w.verdict("node", "not_reproduced", 5, "lab") == QUARANTINED  # the same one again
    assert [each["node"] for each in w.books.quarantined("")] == [peer("node")]
    assert w.verdict("node", "not_reproduced", 6, "telco") == ACTIVE
    assert w.books.quarantined("") == []
    assert (waiting(w, "node"), clean_audits(w, "node")) == (EARNED, 0)
    # What was said of it then is over: posted again by whoever read the log, and as a first word.
    for segment in (1, 2):
        assert w.verdict("node", "failed", segment, "liar") == ACTIVE
    assert w.verdict("node", "failed", 7, "liar") == ACTIVE
    assert w.verdict("node", "failed", 8, "liar") == QUARANTINED
    assert w.verdict("node", "not_reproduced", 4, "lab") == QUARANTINED
    assert w.verdict("node", "not_reproduced", 9, "telco") == QUARANTINED
    assert w.verdict("node", "not_reproduced", 10, "lab") == ACTIVE


def test_one_organisation_does_not_free_its_friend() -> None:
    w = world("lab", "telco", "friend")
    w.enrol("node")
    earn(w, "node")
    # Said before there is anything to be said, it takes nothing back and does not count later.
    w.verdict("node", "failed", 1, "lab")
    assert w.verdict("node", "not_reproduced", 2, "friend", "telco") == ACTIVE
    assert w.verdict("node", "failed", 3, "lab") == QUARANTINED
    for segment in range(4, 20):
        assert w.verdict("node", "not_reproduced", segment, "friend") == QUARANTINED
    # Nor does one of whom the operator does not hear any more.
    w.now += 1
    w.organisation("friend", may_validate=False)
    assert w.verdict("node", "not_reproduced", 20, "lab") == QUARANTINED
    assert waiting(w, "node") == EARNED
    for segment in (21, 22):
        w.verdict("node", "failed", segment, "telco")
    assert w.books.node(peer("node"))["state"] == REVOKED


def test_what_is_not_reproduced_of_a_node_that_is_not_kept_out_changes_nothing() -> None:
    w = world("lab", "friend")
    w.enrol("node")
    for segment in range(5):
        w.verdict("node", "passed", segment, "lab")
    assert w.verdict("node", "not_reproduced", 6, "friend") == ACTIVE
    assert clean_audits(w, "node") == 5


def test_only_validators_judge_and_not_their_own() -> None:
    w = world("lab")
    w.organisation("uni")
    w.enrol("node")
    w.enrol("of-lab", organisation="lab")
    for node, signer in (("node", "uni"), ("node", "mallory"), ("of-lab", "lab"), ("none", "lab")):
        with pytest.raises(ProtocolError) as error:
            w.verdict(node, "failed", 1, signer)
        assert error.value.code is ErrorCode.FOREIGN_OBJECT


def test_enrolments_follow_each_other() -> None:
    w = world()
    assert w.enrol("node", sequence=5) is not None
    assert w.enrol("node", sequence=5) is None
    for sequence, payout, code in (
        (4, "donor", ErrorCode.ROLLED_BACK),
        (5, "donor", ErrorCode.EQUIVOCATION),
    ):
        with pytest.raises(ProtocolError) as error:
            w.enrol("node", payout=payout, sequence=sequence)
        assert error.value.code is code
    assert w.enrol("node", payout="donor", sequence=6) is not None


def test_a_revoked_node_settles_no_more() -> None:
    w = world()
    w.enrol("node")
    client = earn(w, "node")
    revocation = Revocation(public("node").hex(), "compromised", 0, w.now)
    with pytest.raises(ProtocolError) as error:
        w.books.revoke(sign(revocation, key("mallory")), w.now)
    assert error.value.code is ErrorCode.BAD_SIGNATURE
    w.books.revoke(sign(revocation, key("node")), w.now)
    with pytest.raises(ProtocolError):
        w.settle("node", client.voucher("node", 2000, 2))


def test_a_new_key_takes_escrow_and_record_along() -> None:
    w = world()
    w.enrol("node", payout="donor")
    earn(w, "node")
    rotation = Rotation(public("node").hex(), public("node-2").hex(), 0, w.now)
    with pytest.raises(ProtocolError):
        w.books.rotate(sign(rotation, key("node-2")), w.now)
    w.books.rotate(sign(rotation, key("node"), key("node-2")), w.now)
    assert (waiting(w, "node"), waiting(w, "node-2")) == (0, EARNED)
    earn(w, "node-2")
    assert waiting(w, "node-2") == 2 * EARNED
    assert w.books.node(identity("node-2").peer_id)["payout"] == peer("donor")


def test_credit_that_nobody_spends_returns_after_a_year() -> None:
    w = world()
    w.now += 200 * DAY
    w.fund("alice", 5)
    w.now += 166 * DAY
    public_before = w.books.journal.balance("budget:public")
    assert w.books.expire_credits(w.now) == 10**9
    assert w.books.expire_credits(w.now) == 0
    assert spendable(w, "alice") == 5
    assert w.books.journal.balance("budget:public") == public_before + 10**9
