from __future__ import annotations

import pytest

from swarm.protocol.errors import ConfigError, ErrorCode, ProtocolError
from swarm.protocol.identity import PeerId
from swarm.protocol.passport import Passport, Tier
from swarm.protocol.policy import Policy

PEER = PeerId("12D3KooWJW6bMxNDtTZ541p4vx3TKSgDJcpztXaH58UWd45yn5LC")


def passport(**changes: object) -> Passport:
    plain = {"organisation": "KENET", "country": "KE", "tier": Tier.CERTIFIED}
    return Passport(PEER, invited=False, expires_unix_s=1, serials=(), **(plain | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "shown", "allowed"),
    [
        (Policy(), None, True),
        (Policy(countries=("KE",)), passport(), True),
        (Policy(countries=("TZ", "KE")), passport(), True),
        (Policy(countries=("TZ",)), passport(), False),
        (Policy(countries=("KE",)), None, False),
        (Policy(countries=("KE",)), passport(country=""), False),
        (Policy(organisations=("KENET",)), passport(), True),
        (Policy(organisations=("KENET",)), passport(organisation="kenet"), False),
        (Policy(minimum_tier=Tier.CERTIFIED), passport(), True),
        (Policy(minimum_tier=Tier.TRUSTED), passport(), False),
        (Policy(minimum_tier=Tier.REGISTERED), None, False),
        (Policy(avoid=(PEER,)), passport(), False),
    ],
)
def test_who_may_see_a_session(policy: Policy, shown: Passport | None, allowed: bool) -> None:
    assert (policy.refusal(PEER, shown) == "") == allowed
    if allowed:
        policy.check(PEER, shown)
    else:
        with pytest.raises(ProtocolError) as refused:
            policy.check(PEER, shown)
        assert refused.value.code is ErrorCode.OUTSIDE_POLICY


def test_end_blocks() -> None:
    policy = Policy(minimum_end_tier=Tier.CERTIFIED, end_blocks=4)
    assert policy.allowed_blocks(0, 30, 30, passport()) == (0, 30)
    assert policy.allowed_blocks(0, 30, 30, passport(tier=Tier.REGISTERED)) == (4, 26)
    assert policy.allowed_blocks(5, 20, 30, None) == (5, 20)
    first, end = policy.allowed_blocks(0, 4, 30, None)
    assert first >= end


def test_forms() -> None:
    policy = Policy(
        countries=("TZ", "KE", "KE"), minimum_end_tier=Tier.TRUSTED, avoid=(PEER,), adapters=("a",)
    )
    assert Policy.from_bytes(policy.to_bytes()) == policy
    assert (
        policy.to_bytes()
        == Policy(
            countries=("KE", "TZ"), minimum_end_tier=Tier.TRUSTED, avoid=(PEER,), adapters=("a",)
        ).to_bytes()
    )
    assert len(policy.digest) == 32
    assert Policy().to_bytes() == Policy().digest == b""
    assert Policy.from_bytes(b"") is None
    assert "countries KE, TZ" in policy.describe()


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{",
        b"\xff",
        b'{"colour":"red"}',
        b'{"countries":["Kenya"]}',
        b'{"countries":7}',
        b'{"countries":[7]}',
        b'{"minimum_tier":"best"}',
        b'{"end_blocks":0}',
        b'{"end_blocks":true}',
        b'{"avoid":["' + b"x" * 3000 + b'"]}',
        b"[" * 2000,
        b"{}",
        b'{"countries": ["KE"]}',
        b'{"countries":["TZ","KE"]}',
        b'{"avoid":[],"countries":["KE"]}',
        b'{"countries":["UG"],"countries":["KE"]}',
        '{"countries":["KE"]}'.encode("utf-16"),
    ],
)
def test_what_is_no_policy(content: bytes) -> None:
    with pytest.raises(ProtocolError):
        Policy.from_bytes(content)


def test_two_policies_at_once() -> None:
    ours = Policy(countries=("KE", "TZ"), minimum_tier=Tier.REGISTERED)
    theirs = Policy(countries=("KE", "UG"), minimum_tier=Tier.CERTIFIED, avoid=(PEER,))
    both = ours.both(theirs)
    assert both == Policy(countries=("KE",), minimum_tier=Tier.CERTIFIED, avoid=(PEER,))
    assert ours.both(Policy()) == ours
    with pytest.raises(ConfigError):
        ours.both(Policy(countries=("UG",)))


def test_adapters() -> None:
    assert Policy().allows_adapter("anything")
    assert Policy(adapters=("00ff",)).allows_adapter("00ff")
    assert not Policy(adapters=("00ff",)).allows_adapter("11ff")
