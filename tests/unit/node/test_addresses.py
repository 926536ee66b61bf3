"""Which addresses are told to others, and in which order."""

from __future__ import annotations

import pytest

from swarm.node.addresses import for_people, for_record, is_public
from swarm.protocol.identity import PeerId
from swarm.protocol.records import MAX_RECORD_ADDRESSES

LOOPBACK, HOME, PUBLIC = "/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.5/tcp/1", "/ip4/8.8.8.8/tcp/1"


def test_those_that_reach_farthest_come_first() -> None:
    peer = PeerId("12D3KooWExample")
    assert for_people([LOOPBACK, HOME, PUBLIC], peer) == (
        f"{PUBLIC}/p2p/{peer}",
        f"{HOME}/p2p/{peer}",
        f"{LOOPBACK}/p2p/{peer}",
    )


def test_a_record_takes_only_so_many() -> None:
    kept = for_record([LOOPBACK] * MAX_RECORD_ADDRESSES + [PUBLIC])
    assert len(kept) == MAX_RECORD_ADDRESSES
    assert kept[0] == PUBLIC


def test_neighbours_keep_some_places_in_a_record() -> None:
    relayed = [f"/ip4/8.8.8.8/tcp/{n}/p2p/12D3KooWExample/p2p-circuit" for n in range(20)]
    kept = for_record([HOME, LOOPBACK, *relayed, "/ip4/8.8.8.8/tcp/1/" + "x" * 200])
    assert kept == (*relayed[: MAX_RECORD_ADDRESSES - 2], HOME, LOOPBACK)
    assert not any(map(is_public, relayed))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        (PUBLIC, True),
        ("/ip6/2a00:1450::1/udp/1/quic-v1", True),
        (HOME, False),
        (LOOPBACK, False),
        ("/ip6/::1/tcp/1", False),
        ("/ip4/nonsense/tcp/1", False),
        ("/dns4/example.org/tcp/1", False),
        ("", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public
