"""Which of a peer's addresses are worth telling others, and in which order. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from swarm.addresses import is_global, is_loopback, is_relayed
from swarm.protocol.identity import PeerId
from swarm.protocol.records import MAX_ADDRESS_BYTES, MAX_RECORD_ADDRESSES


def is_public(address: str) -> bool:
    """Whether it is an address of the whole internet that needs no relay."""
    return is_global(address) and not is_relayed(address)


def for_record(addresses: Iterable[str]) -> tuple[str, ...]:
    """As many as a directory record takes, those that reach farthest first."""
    short = (address for address in addresses if len(address) <= MAX_ADDRESS_BYTES)
    return tuple(sorted(short, key=_reach, reverse=True)[:MAX_RECORD_ADDRESSES])


def for_people(addresses: Iterable[str], peer_id: PeerId) -> tuple[str, ...]:
    """As written after ``--peers``: ending in ``/p2p/PEER_ID``, those that reach farthest first."""
    return tuple(
        f"{address}/p2p/{peer_id}" for address in sorted(addresses, key=_reach, reverse=True)
    )


def _reach(address: str) -> int:
    """0 for this computer, 1 for the local network or an unknown kind, 2 for the internet."""
    if is_loopback(address):
        return 0
    return 2 if is_global(address) or is_relayed(address) else 1
