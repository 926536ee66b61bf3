"""Which of a peer's addresses are worth telling others, and in which order. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from swarm.addresses import is_global, is_loopback, is_relayed
from swarm.protocol.identity import PeerId
from swarm.protocol.records import MAX_ADDRESS_BYTES, MAX_RECORD_ADDRESSES

FAR = 2
PLACES_FOR_NEIGHBOURS = 2


def is_public(address: str) -> bool:
    """Whether it is an address of the whole internet that needs no relay."""
    return is_global(address) and not is_relayed(address)


def for_record(addresses: Iterable[str]) -> tuple[str, ...]:
    """As many as a directory record takes, those that reach farthest first.

    Some are for the local network, since neighbours behind one router need no relay.
    """
    short = [address for address in addresses if len(address) <= MAX_ADDRESS_BYTES]
    far = [address for address in short if _reach(address) == FAR]
    near = [one for one in sorted(short, key=_reach, reverse=True) if _reach(one) < FAR]
    room = MAX_RECORD_ADDRESSES - min(len(near), PLACES_FOR_NEIGHBOURS)
    return (*far[:room], *near)[:MAX_RECORD_ADDRESSES]


def for_people(addresses: Iterable[str], peer_id: PeerId) -> tuple[str, ...]:
    """As written after ``--peers``: ending in ``/p2p/PEER_ID``, those that reach farthest first."""
    return tuple(
        f"{address}/p2p/{peer_id}" for address in sorted(addresses, key=_reach, reverse=True)
    )


def _reach(address: str) -> int:
    """0 for this computer, 1 for the local network or an unknown kind, 2 for the internet."""
    if is_loopback(address):
        return 0
    return FAR if is_global(address) or is_relayed(address) else 1
