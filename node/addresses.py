"""Multiaddresses as text: which of a peer's are worth telling others. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from swarm.protocol.identity import PeerId
from swarm.protocol.records import MAX_RECORD_ADDRESSES


def is_public(address: str) -> bool:
    """Whether ``/ip4/...`` or ``/ip6/...`` is an address of the whole internet."""
    return _reach(address) == 2


def for_record(addresses: Iterable[str]) -> tuple[str, ...]:
    """As many as a directory record takes, those that reach farthest first."""
    ordered = sorted(addresses, key=_reach, reverse=True)
    return tuple(ordered[:MAX_RECORD_ADDRESSES])


def for_people(addresses: Iterable[str], peer_id: PeerId) -> tuple[str, ...]:
    """As written after ``--peers``: ending in ``/p2p/PEER_ID``, those that reach farthest first."""
    return tuple(
        f"{address}/p2p/{peer_id}" for address in sorted(addresses, key=_reach, reverse=True)
    )


def _reach(address: str) -> int:
    """0 for this computer, 1 for the local network or an unknown kind, 2 for the internet."""
    parts = address.split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
        return 1
    try:
        host = ipaddress.ip_address(parts[2])
    except ValueError:
        return 1
    if host.is_loopback:
        return 0
    return 2 if host.is_global else 1
