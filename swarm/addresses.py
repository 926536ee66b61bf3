"""Multiaddresses as text: what kind of way they name. Pure."""

from __future__ import annotations

import ipaddress


def is_relayed(address: str) -> bool:
    """Whether the way to ``address`` leads through a relay."""
    return "p2p-circuit" in address.split("/")


def is_global(address: str) -> bool:
    """Whether it is an address of the whole internet; of a relayed one, whether the relay's is."""
    ip = ip_of(address)
    return ip is not None and ip.is_global


def is_given_by_router(address: str) -> bool:
    """For a peer behind a router: whether this is how the router shows it to the internet.

    Nobody translates addresses of IPv6.
    """
    return is_global(address) and address.startswith("/ip4/") and not is_relayed(address)


def is_loopback(address: str) -> bool:
    """Whether only programs on the same computer reach it."""
    ip = ip_of(address)
    return ip is not None and ip.is_loopback


def host_of(address: str) -> str:
    """Its first part: ``/ip4/192.0.2.1`` of ``/ip4/192.0.2.1/tcp/31330``."""
    return "/".join(address.split("/")[:3])


def ip_of(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Of the first part of an address; None when that is a name, or nothing of the kind."""
    parts = address.split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
        return None
    try:
        return ipaddress.ip_address(parts[2])
    except ValueError:
        return None
