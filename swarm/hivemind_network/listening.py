"""Where the daemon listens: QUIC beside TCP, and the same ports again after a restart. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from swarm.addresses import is_global, is_loopback


def with_quic(listen_addresses: Sequence[str]) -> tuple[str, ...]:
    """Add QUIC on the UDP port of the same number to fixed TCP ports that others can dial.

    Hole punching needs it. Not on loopback, where TCP is faster.
    """
    wanted = dict.fromkeys(listen_addresses)
    for address in listen_addresses:
        twin = quic_twin(address)
        if twin is not None and not is_loopback(address) and not address.endswith("/tcp/0"):
            wanted.setdefault(twin)
    return tuple(wanted)


def with_quic_of_others(addresses: Sequence[str]) -> list[str]:
    """The same for peers on the internet that we only know by their TCP address."""
    twins = (quic_twin(address) for address in addresses if is_global(address))
    return list(dict.fromkeys((*addresses, *(twin for twin in twins if twin is not None))))


def quic_twin(address: str) -> str | None:
    """``/ip4/.../udp/1/quic-v1`` of ``/ip4/.../tcp/1``; None for all that is not plain TCP."""
    parts = address.split("/")
    if len(parts) != 5 or parts[3] != "tcp":
        return None
    return f"/{parts[1]}/{parts[2]}/udp/{parts[4]}/quic-v1"


def with_ports(listen_addresses: Sequence[str], listening: Sequence[str]) -> tuple[str, ...]:
    """Ports 0 of ``listen_addresses`` replaced by those that the daemon took, as it lists them."""
    taken: dict[tuple[str, ...], str] = {}
    for address in listening:
        parts = address.split("/")
        if len(parts) >= 5:
            taken.setdefault(_kind(parts), parts[4])
    pinned = []
    for address in listen_addresses:
        parts = address.split("/")
        if len(parts) >= 5 and parts[4] == "0":
            parts[4] = taken.get(_kind(parts), "0")
        pinned.append("/".join(parts))
    return tuple(pinned)


def _kind(parts: Sequence[str]) -> tuple[str, ...]:
    """IP version, transport, and what goes over it."""
    return (parts[1], parts[3], *parts[5:])
