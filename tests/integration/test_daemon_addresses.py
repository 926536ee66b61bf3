"""What goes between us and the p2pd daemon as bytes: addresses and small protobuf messages."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.hivemind_network.listening import with_ports, with_quic, with_quic_of_others
from swarm.hivemind_network.multiaddresses import decode_address, encode_address
from swarm.hivemind_network.protobuf import encode_field, read_delimited, read_fields
from swarm.protocol.identity import PeerId

PEER = PeerId("12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN")


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/192.0.2.1/tcp/31330",
        "/ip6/2001:db8::1/udp/1/quic-v1",
        f"/ip4/192.0.2.1/udp/1/quic-v1/p2p/{PEER}/p2p-circuit",
        "/dns4/seed.example.org/tcp/443/ws",
    ],
)
def test_addresses_go_there_and_back(address: str) -> None:
    assert decode_address(encode_address(address)) == address


def test_a_peer_id_is_written_as_the_daemon_reads_it() -> None:
    # Protocol 421, 38 bytes: the identity hash of the key, and not a content id around it.
    assert encode_address(f"/p2p/{PEER}")[:6] == bytes((0xA5, 0x03, 38, 0x00, 36, 0x08))


@pytest.mark.parametrize(
    "text",
    ["", "/", "ip4/1.2.3.4", "/ip4", "/ip4/1.2.3", "/tcp/65536", "/tcp/x", "/p2p/0", "/unix/a"],
)
def test_what_is_no_address_is_said(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        encode_address(text)


@given(st.binary(max_size=64))
def test_any_bytes_are_an_address_or_a_value_error(data: bytes) -> None:
    try:
        text = decode_address(data)
    except ValueError:
        return
    assert isinstance(text, str)


@given(st.binary(max_size=64))
def test_any_bytes_are_fields_or_a_value_error(data: bytes) -> None:
    try:
        fields = list(read_fields(data))
    except ValueError:
        return
    assert all(number >= 0 for number, _ in fields)


@pytest.mark.parametrize("fields", [[(1, 0)], [(2, b""), (3, 300), (500, b"x" * 200)]])
def test_fields_go_there_and_back(fields: list[tuple[int, Any]]) -> None:
    message = b"".join(encode_field(number, value) for number, value in fields)
    assert list(read_fields(message)) == fields


@pytest.mark.parametrize("data", [b"\xff\xff\x7f", b"\xff" * 9])
async def test_a_message_that_is_too_long_is_not_read(data: bytes) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    with pytest.raises(ValueError, match=r"bytes|end"):
        await read_delimited(reader)


def test_quic_listens_beside_fixed_tcp_ports_but_not_on_loopback() -> None:
    both = ("/ip4/0.0.0.0/tcp/31330", "/ip4/0.0.0.0/udp/31330/quic-v1")
    assert with_quic(both[:1]) == with_quic(both) == both
    for alone in ("/ip4/127.0.0.1/tcp/31330", "/ip4/0.0.0.0/tcp/0"):
        assert with_quic((alone,)) == (alone,)


def test_peers_on_the_internet_are_dialled_over_quic_too() -> None:
    known = ["/ip4/8.8.8.8/tcp/1", "/ip4/10.0.0.1/tcp/1", "/dns4/example.org/tcp/1"]
    assert with_quic_of_others(known) == [*known, "/ip4/8.8.8.8/udp/1/quic-v1"]


def test_free_ports_are_kept_for_a_restart() -> None:
    wanted = ("/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1", "/ip6/::/tcp/7")
    listening = ["/ip4/10.0.0.1/udp/5/quic-v1", "/ip4/10.0.0.1/tcp/6", "/ip4/127.0.0.1/tcp/6"]
    assert with_ports(wanted, listening) == (
        "/ip4/0.0.0.0/tcp/6",
        "/ip4/0.0.0.0/udp/5/quic-v1",
        "/ip6/::/tcp/7",
    )
