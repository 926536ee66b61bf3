"""A receipt's transcript begins with the policy that the session was opened under."""

from __future__ import annotations

from swarm.ledger.transcript import Transcript, first_head
from swarm.protocol.policy import Policy

SESSION = bytes(range(16))


def test_the_policy_is_bound() -> None:
    kenya, tanzania = (Policy(countries=(country,)).to_bytes() for country in ("KE", "TZ"))
    heads = {first_head(SESSION), first_head(SESSION, kenya), first_head(SESSION, tanzania)}
    assert len(heads) == 3
    assert Transcript(SESSION, kenya).head == first_head(SESSION, kenya)
    assert Transcript(SESSION).head == first_head(SESSION)
