"""How others reach a node, in plain words."""

from __future__ import annotations

import pytest

from swarm.node.reachability import Way, judge

HOME, PUBLIC, OWN = "/ip4/192.168.1.5/tcp/1", "/ip4/8.8.8.8/tcp/1", "/ip4/127.0.0.1/tcp/1"


@pytest.mark.parametrize(
    ("addresses", "behind_router", "relays", "reached", "way", "words"),
    [
        ([PUBLIC, OWN], False, 0, True, "direct", "directly"),
        ([PUBLIC, OWN], False, 0, None, "direct", "nobody has tried"),
        ([PUBLIC, OWN], False, 0, False, "unreachable", "firewall"),
        ([PUBLIC, OWN], False, 1, False, "relayed", "a relay"),
        ([HOME, OWN], True, 3, False, "relayed", "3 relays"),
        ([HOME, OWN], True, 0, False, "unreachable", "let a port of the router in"),
        ([HOME, OWN], True, 3, True, "direct", "directly"),
        ([HOME, OWN], False, 0, None, "local", "local network"),
        ([OWN], False, 0, None, "local", "this computer"),
    ],
)
def test_ways(
    addresses: list[str],
    behind_router: bool,
    relays: int,
    reached: bool | None,
    way: Way,
    words: str,
) -> None:
    judged = judge(addresses, behind_router=behind_router, relays=relays, reached=reached)
    assert judged.way == way
    assert words in f"{judged.found} {judged.advice}"
