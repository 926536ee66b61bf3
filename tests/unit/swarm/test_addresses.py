"""What kind of way a multiaddress names."""

from __future__ import annotations

import pytest

from swarm.addresses import host_of, is_global, is_loopback, is_relayed

RELAYED = "/ip4/8.8.8.8/udp/1/quic-v1/p2p/12D3KooWExample/p2p-circuit"


@pytest.mark.parametrize(
    ("address", "is_kind"),
    [
        ("/ip4/8.8.8.8/tcp/1", (True, False, False)),
        ("/ip6/2a00:1450::1/udp/1/quic-v1", (True, False, False)),
        ("/ip4/192.168.1.5/tcp/1", (False, False, False)),
        ("/ip6/::1/tcp/1", (False, True, False)),
        ("/ip4/127.0.0.1/tcp/1", (False, True, False)),
        (RELAYED, (True, False, True)),
        ("/dns4/p2p-circuit.example/tcp/1", (False, False, False)),
        ("/ip4/nonsense/tcp/1", (False, False, False)),
        ("", (False, False, False)),
    ],
)
def test_kinds_of_addresses(address: str, is_kind: tuple[bool, bool, bool]) -> None:
    assert (is_global(address), is_loopback(address), is_relayed(address)) == is_kind


def test_the_host_of_an_address() -> None:
    assert host_of(RELAYED) == "/ip4/8.8.8.8"
