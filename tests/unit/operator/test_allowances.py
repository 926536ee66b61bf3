"""Who gets an allowance, and who does not."""

from __future__ import annotations

import secrets
from dataclasses import replace

import pytest

from swarm.operator.networks import networks_of
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.ledger_objects import (
    ANONYMOUS,
    AUDIT,
    FUNDED,
    LOCAL,
    MAX_ALLOWANCE_S,
    MEMBER,
    sign,
)
from swarm.protocol.operator_objects import AllowanceRequest
from tests.unit.operator.parties import NETWORKS, World, key, peer

CREDIT = 10**9
DAY = 24 * 3600


def funded() -> World:
    w = World()
    w.mint("public", 10_000 * CREDIT)
    w.fund("alice", 10 * CREDIT)
    return w


def code_of(call: object, *arguments: object, **options: object) -> ErrorCode:
    with pytest.raises(ProtocolError) as error:
        call(*arguments, **options)  # type: ignore[operator]
    return error.value.code


def test_a_reservation_takes_the_money_at_once() -> None:
    w = funded()
    client = w.request("alice", units=4 * CREDIT)
    assert client.allowance.per_node_units == CREDIT
    assert w.books.journal.balance(f"user:{peer('alice')}") == 6 * CREDIT
    assert w.books.journal.balance("holds") == 4 * CREDIT
    assert code_of(w.request, "alice", units=6 * CREDIT + 1) is ErrorCode.OVER_LIMIT
    assert w.books.journal.balance("holds") == 4 * CREDIT


def test_a_repeated_request_gets_the_same_allowance() -> None:
    w = funded()
    client = w.request("alice")
    again = w.books.issue(client.request, NETWORKS, w.now + 1)
    assert again == client.issued
    assert w.books.journal.balance("holds") == client.allowance.maximum_units


def test_requests_are_signed_and_fresh() -> None:
    w = funded()
    request = AllowanceRequest(
        secrets.token_hex(16), peer("alice"), "11" * 32, FUNDED, "", CREDIT, 3600, w.now
    )
    for signer in ("mallory", "mint-0"):
        forged = sign(request, key(signer))
        assert code_of(w.books.issue, forged, NETWORKS, w.now) is ErrorCode.BAD_SIGNATURE
    old = sign(request, key("alice"))
    for moment in (w.now - 301, w.now + 301):
        assert code_of(w.books.issue, old, NETWORKS, moment) is ErrorCode.NOT_VALID_NOW


def test_classes_and_who_may_have_them() -> None:
    w = funded()
    assert code_of(w.request, "", allowance_class=FUNDED) is ErrorCode.BAD_FIELD
    assert code_of(w.request, "alice", allowance_class=ANONYMOUS) is ErrorCode.BAD_FIELD
    assert code_of(w.request, "alice", allowance_class=LOCAL) is ErrorCode.BAD_FIELD
    assert code_of(w.request, "alice", allowance_class=AUDIT) is ErrorCode.FOREIGN_OBJECT
    assert code_of(w.request, "alice", allowance_class=MEMBER) is ErrorCode.FOREIGN_OBJECT
    assert code_of(w.request, "alice", units=3) is ErrorCode.BAD_FIELD
    assert code_of(w.request, "alice", lifetime_s=0) is ErrorCode.BAD_FIELD
    w.mint("audit", CREDIT)
    w.organisation("uni", may_validate=True)
    challenge = w.request("uni", allowance_class=AUDIT)
    assert w.books.journal.balance("budget:audit") == CREDIT - 10**6
    # What a node is shown says nothing of that: it is like what the other accounts get.
    ordinary = w.request("alice")
    shown = challenge.allowance
    assert shown == replace(ordinary.allowance, serial=shown.serial, voucher_key=shown.voucher_key)


def test_the_times_of_an_allowance_do_not_tell_when_it_was_drawn() -> None:
    w = funded()
    w.mint("audit", CREDIT)
    w.organisation("uni", may_validate=True)
    w.now += 137
    ordinary = w.request("alice").allowance
    w.now += 300
    challenge = w.request("uni", allowance_class=AUDIT).allowance
    times = {(each.not_before_unix_s, each.expires_unix_s) for each in (ordinary, challenge)}
    ((begins, ends),) = times
    assert begins % 600 == ends % 600 == 0
    assert begins <= w.now - 300
    assert ends >= w.now + 3600
    # and no more than nodes accept, nor less than was asked for where they do
    longest = w.request("alice", lifetime_s=MAX_ALLOWANCE_S).allowance
    assert longest.expires_unix_s - longest.not_before_unix_s == MAX_ALLOWANCE_S
    shortest = w.request("alice", lifetime_s=1).allowance
    assert shortest.not_before_unix_s <= w.now < shortest.expires_unix_s


def test_anonymous_networks_have_a_bucket_that_fills_in_a_day() -> None:
    w = funded()
    for _ in range(10):
        w.request(allowance_class=ANONYMOUS, units=10 * CREDIT)
    empty = {"allowance_class": ANONYMOUS, "units": CREDIT}
    assert code_of(w.request, **empty) is ErrorCode.OVER_LIMIT
    w.request(allowance_class=ANONYMOUS, units=CREDIT, networks=("network-b", "network-wide"))
    w.now += DAY // 10
    w.request(allowance_class=ANONYMOUS, units=10 * CREDIT)
    assert code_of(w.request, **empty) is ErrorCode.OVER_LIMIT
    large = {"allowance_class": ANONYMOUS, "units": 10 * CREDIT + 1}
    assert code_of(w.request, **large) is ErrorCode.OVER_LIMIT


def test_the_network_around_bounds_many_networks() -> None:
    w = funded()
    for number in range(160):
        w.request(
            allowance_class=ANONYMOUS, units=10 * CREDIT, networks=(f"net-{number}", "wide-a")
        )
    full = {"allowance_class": ANONYMOUS, "networks": ("net-new", "wide-a")}
    assert code_of(w.request, **full) is ErrorCode.OVER_LIMIT
    w.request(allowance_class=ANONYMOUS, networks=("net-new", "wide-b"))


def test_members_have_a_share_of_each_day() -> None:
    w = funded()
    w.member("bob", "public", 3 * CREDIT)
    for _ in range(3):
        w.request("bob", CREDIT, MEMBER, "public")
    assert code_of(w.request, "bob", CREDIT, MEMBER, "public") is ErrorCode.OVER_LIMIT
    w.now += DAY + 1
    w.request("bob", CREDIT, MEMBER, "public")
    assert code_of(w.request, "bob", CREDIT, MEMBER, "gifts") is ErrorCode.FOREIGN_OBJECT


def test_networks_are_pseudonyms_of_prefixes() -> None:
    salt = b"salt"
    assert networks_of("192.0.2.1", salt) == networks_of("192.0.2.254", salt)
    assert networks_of("192.0.2.1", salt) == networks_of("::ffff:192.0.2.9", salt)
    assert networks_of("192.0.3.1", salt)[0] != networks_of("192.0.2.1", salt)[0]
    assert networks_of("192.0.3.1", salt)[1] == networks_of("192.0.2.1", salt)[1]
    assert networks_of("2001:db8:1:2::3", salt) == networks_of("2001:db8:1:ffff::1", salt)
    assert networks_of("192.0.2.1", b"other") != networks_of("192.0.2.1", salt)
    assert "192.0.2" not in "".join(networks_of("192.0.2.1", salt))
    assert networks_of("nonsense", salt)[0].startswith("network:")
