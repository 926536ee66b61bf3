"""Each kind of wrong voucher has its code, and none is paid."""

from __future__ import annotations

from dataclasses import replace

import pytest

from swarm.operator.books import Books
from swarm.operator.journal import Journal
from swarm.operator.settlement import MAX_VOUCHERS, Outcome
from swarm.protocol.envelope import Envelope, Signature, parse_envelope
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.ledger_objects import ANONYMOUS, MEMBER, Voucher, parse, sign
from swarm.protocol.operator_objects import AdapterTermsEntry
from tests.unit.operator.parties import (
    BLOCKS,
    MODEL,
    TOKEN,
    World,
    identity,
    key,
    peer,
    policy,
    public,
    settlement,
)

DAY = 24 * 3600


def world() -> World:
    created = World()
    created.mint("public", 10**9)
    created.fund("alice", 10**8)
    created.enrol("node")
    created.enrol("other")
    return created


def refused(code: ErrorCode) -> list[Outcome]:
    return [Outcome(0, code)]


def test_the_last_voucher_pays_the_difference() -> None:
    w = world()
    client = w.request("alice")
    assert w.settle("node", client.voucher("node", 10)) == [Outcome(10 * TOKEN)]
    assert w.settle("node", client.voucher("node", 10)) == [Outcome(0)]
    assert w.settle("node", client.voucher("node", 25, sequence=2)) == [Outcome(15 * TOKEN)]
    # an older voucher that agrees with the newer one is no offence
    assert w.settle("node", client.voucher("node", 10)) == [Outcome(0)]
    balances = w.books.journal.balances()
    assert balances[f"escrow:{peer('node')}"] + balances["fee"] == 25 * TOKEN
    assert w.books.evidence(peer("node")) == []


def test_several_of_one_channel_in_one_settlement() -> None:
    w = world()
    client = w.request("alice")
    vouchers = [client.voucher("node", 5 * n, sequence=n) for n in (3, 1, 2)]
    assert w.settle("node", *vouchers) == [Outcome(15 * TOKEN), Outcome(0), Outcome(0)]


def test_forged_and_altered() -> None:
    w = world()
    client = w.request("alice")
    genuine = client.voucher("node", 10)
    forged = sign(parse(Voucher, genuine), key("mallory"))
    altered = replace(genuine, payload=genuine.payload.replace(b'_tokens":10', b'_tokens":99'))
    claimed = replace(
        forged,
        signatures=(Signature(genuine.signatures[0].public_key, forged.signatures[0].signature),),
    )
    for wrong in (forged, altered, claimed):
        assert w.settle("node", wrong) == refused(ErrorCode.BAD_SIGNATURE)
    other_type = replace(genuine, payload_type="application/vnd.sovereign-swarm.receipt.v1+json")
    assert w.settle("node", other_type) == refused(ErrorCode.BAD_FIELD)


def test_stolen_foreign_and_unknown() -> None:
    w = world()
    client = w.request("alice")
    assert w.settle("other", client.voucher("node", 10)) == refused(ErrorCode.FOREIGN_OBJECT)
    foreign = client.voucher("node", 10, serial="ab" * 16)
    assert w.settle("node", foreign) == refused(ErrorCode.FOREIGN_OBJECT)
    unknown = client.voucher("node", 10, model="22" * 32)
    assert w.settle("node", unknown) == refused(ErrorCode.UNKNOWN_MODEL)
    for first, end in ((0, BLOCKS + 1), (5, 5), (6, 5)):
        beyond = client.voucher("node", 10, first_block=first, end_block=end)
        assert w.settle("node", beyond) == refused(ErrorCode.BAD_FIELD)


def test_a_session_keeps_its_blocks_and_adapter() -> None:
    w = world()
    client = w.request("alice")
    w.settle("node", client.voucher("node", 10))
    for change in ({"end_block": 20}, {"adapter": "aa" * 32}):
        moved = client.voucher("node", 20, sequence=2, **change)
        assert w.settle("node", moved) == refused(ErrorCode.FOREIGN_OBJECT)


@pytest.mark.parametrize("first_dearer", [True, False])
def test_equivocation_and_rollback_pay_the_dearer_in_any_order(first_dearer: bool) -> None:
    for sequence, code in ((2, ErrorCode.EQUIVOCATION), (1, ErrorCode.ROLLED_BACK)):
        w = world()
        client = w.request("alice")
        vouchers = [client.voucher("node", 9, sequence=2), client.voucher("node", 12, sequence)]
        outcomes = [w.settle("node", each)[0] for each in vouchers[:: -1 if first_dearer else 1]]
        assert sum(outcome.paid_units for outcome in outcomes) == 12 * TOKEN
        assert outcomes[1].code is code
        (kept,) = w.books.evidence(peer("node"))
        assert kept["kind"] == code.name
        # a third party needs nothing but the two envelopes
        both = [parse_envelope(kept[name]) for name in ("first", "second")]
        assert both[0].payload != both[1].payload
        assert both[0].signers() == both[1].signers()


def test_limits_of_allowance_and_node() -> None:
    w = world()
    client = w.request("alice", units=100 * TOKEN)
    outcomes = []
    for number in range(5):
        w.enrol(f"n{number}")
        outcomes += w.settle(f"n{number}", client.voucher(f"n{number}", 40))
    assert outcomes[:4] == [Outcome(25 * TOKEN, ErrorCode.OVER_LIMIT)] * 4
    assert outcomes[4] == Outcome(0, ErrorCode.OVER_LIMIT)
    # more sessions on one node share its part
    assert w.settle("n0", client.voucher("n0", 1, session=7))[0].paid_units == 0
    with pytest.raises(ProtocolError) as error:
        w.request("alice")
    assert error.value.code is ErrorCode.FOREIGN_OBJECT  # suspended: it signed for more than it had
    (kept,) = w.books.evidence(peer("n4"))
    assert kept["kind"] == "OVER_LIMIT"


def test_time() -> None:
    w = world()
    client = w.request("alice")
    late = client.voucher("node", 1, unix_s=client.allowance.expires_unix_s + 301)
    w.now = client.allowance.expires_unix_s + 400
    assert w.settle("node", late) == refused(ErrorCode.NOT_VALID_NOW)
    w.now = client.allowance.expires_unix_s + 48 * 3600
    assert w.settle("node", client.voucher("node", 1)) == [Outcome(TOKEN)]
    assert w.books.release_expired(w.now) == 0
    w.now += 1
    assert w.settle("node", client.voucher("node", 2, 2)) == refused(ErrorCode.NOT_VALID_NOW)
    assert w.books.release_expired(w.now) == 1
    assert w.books.release_expired(w.now) == 0
    balances = w.books.journal.balances()
    assert balances["holds"] == 0
    assert balances[f"user:{peer('alice')}"] == 10**8 - TOKEN


def test_settlements_that_are_not_what_was_signed() -> None:
    w = world()
    client = w.request("alice")
    one, two = client.voucher("node", 1), client.voucher("node", 2, 2)
    sealed = settlement("node", (one,), w.now)
    for vouchers, code in (([two], ErrorCode.BAD_PROOF), ([one, two], ErrorCode.BAD_PROOF)):
        with pytest.raises(ProtocolError) as error:
            w.books.settle(sealed, vouchers, w.now)
        assert error.value.code is code
    by_other = replace(sealed, signatures=sign(parse(Voucher, one), key("x")).signatures)
    with pytest.raises(ProtocolError) as error:
        w.books.settle(by_other, [one], w.now)
    assert error.value.code is ErrorCode.BAD_SIGNATURE
    with pytest.raises(ProtocolError) as error:
        w.settle("stranger", client.voucher("stranger", 1))
    assert error.value.code is ErrorCode.FOREIGN_OBJECT
    with pytest.raises(ProtocolError) as error:
        w.settle("node", *[one] * (MAX_VOUCHERS + 1))
    assert error.value.code is ErrorCode.TOO_LARGE
    with pytest.raises(ProtocolError) as error:
        w.books.settle(sealed, [one], w.now - 1000)
    assert error.value.code is ErrorCode.NOT_VALID_NOW


def test_one_bad_voucher_does_not_spoil_the_others() -> None:
    w = world()
    client = w.request("alice")
    outcomes = w.settle("node", client.voucher("other", 3), client.voucher("node", 3))
    assert outcomes == [Outcome(0, ErrorCode.FOREIGN_OBJECT), Outcome(3 * TOKEN)]


def test_royalties_go_to_authors_and_parents() -> None:
    w = world()
    for adapter, author, payees, parents in (
        ("aa" * 32, "ada", f"{peer('ada')}:10000", ""),
        ("bb" * 32, "bob", f"{peer('bob')}:7500,{peer('eve')}:2500", "aa" * 32 + ":5000"),
    ):
        entry = AdapterTermsEntry(adapter, peer(author), 100, payees, parents, w.now)
        w.books.take_order(sign(entry, key(author)), w.now)
    client = w.request("alice")
    w.settle("node", client.voucher("node", 100, adapter="bb" * 32))
    paid = 100 * TOKEN
    balances = w.books.journal.balances()
    assert balances[f"user:{peer('ada')}"] == paid * 50 // 1000
    assert balances[f"user:{peer('bob')}"] == paid * 50 // 1000 * 3 // 4
    assert balances[f"user:{peer('eve')}"] == paid * 50 // 1000 // 4


def test_public_money_is_for_drawn_nodes_of_some_age_and_of_others() -> None:
    w = World(Books(Journal.in_memory(), policy(pair_floor_units=10**9), key("operator")))
    w.mint("public", 10**12)
    w.organisation("uni")
    w.member("carol", "public", 10**11, organisation="uni")
    w.enrol("node")
    w.enrol("of-uni", organisation="uni")
    w.now += DAY
    w.enrol("young")
    anonymous = w.request(allowance_class=ANONYMOUS)
    member = w.request("carol", allowance_class=MEMBER, budget="public")
    assert len(bytes.fromhex(anonymous.allowance.route_seed)) == 32
    assert w.settle("young", anonymous.voucher("young", 1)) == refused(ErrorCode.FOREIGN_OBJECT)
    assert w.settle("of-uni", member.voucher("of-uni", 1)) == refused(ErrorCode.FOREIGN_OBJECT)
    assert w.settle("of-uni", anonymous.voucher("of-uni", 1)) == [Outcome(TOKEN)]
    assert w.settle("node", member.voucher("node", 1)) == [Outcome(TOKEN)]
    # with many nodes most are not drawn
    w.books.journal.db.execute(
        "UPDATE node SET span_millionths = 1000000000, settled_unix_s = ?, model = 'm'", (w.now,)
    )
    allowances = [w.request(allowance_class=ANONYMOUS, units=10**6) for _ in range(60)]
    outcomes = [w.settle("node", each.voucher("node", 1))[0] for each in allowances]
    drawn = sum(outcome.paid_units > 0 for outcome in outcomes)
    assert drawn < 6  # eight of a thousand on average
    assert {outcome.code for outcome in outcomes} >= {ErrorCode.FOREIGN_OBJECT}


def test_a_pair_gets_a_twentieth_of_public_income() -> None:
    floor = 10 * TOKEN
    w = World(
        Books(
            Journal.in_memory(),
            policy(pair_floor_units=floor, minimum_node_age_s=0),
            key("operator"),
        )
    )
    w.mint("public", 10**12)
    w.enrol("node")
    one = w.request(allowance_class=ANONYMOUS, units=10**6, networks=("net-1", "wide"))
    outcomes = w.settle("node", one.voucher("node", 50))
    assert outcomes == [Outcome(floor, ErrorCode.OVER_LIMIT)]
    for number in range(2, 60):
        each = w.request(allowance_class=ANONYMOUS, units=10**6, networks=(f"net-{number}", "wide"))
        assert w.settle("node", each.voucher("node", 10)) == [Outcome(10 * TOKEN)]
    # by now the first network may have a twentieth of 590 tokens
    assert w.settle("node", one.voucher("node", 50)) == [
        Outcome(590 * TOKEN // 20 - floor, ErrorCode.OVER_LIMIT)
    ]
    # thirty days later the same pair starts anew
    w.now += 31 * DAY
    again = w.request(allowance_class=ANONYMOUS, units=10**6, networks=("net-1", "wide"))
    assert w.settle("node", again.voucher("node", 5)) == [Outcome(5 * TOKEN)]


def test_leaves_do_not_link_sessions_and_accounts() -> None:
    w = world()
    client = w.request("alice")
    w.settle("node", client.voucher("node", 10))
    w.now += 4 * DAY
    w.books.release_expired(w.now)
    log = b"".join(w.books.journal.leaves(0, 10**6)).decode()
    assert client.allowance.serial not in log
    assert client.allowance.voucher_key not in log
    assert "network" not in log
    assert identity("alice").peer_id in log  # a pseudonym: whose account moved, not for what
    assert MODEL not in "".join(
        leaf.decode() for leaf in w.books.journal.leaves(0, 10**6) if b'"settlement"' in leaf
    )


def test_envelopes_carry_no_second_signature_unnoticed() -> None:
    w = world()
    client = w.request("alice")
    genuine = client.voucher("node", 10)
    wrong = Signature(public("x"), b"\0" * 64)
    spoiled = Envelope(genuine.payload_type, genuine.payload, (*genuine.signatures, wrong))
    assert w.settle("node", spoiled) == refused(ErrorCode.BAD_SIGNATURE)
