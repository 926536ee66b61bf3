"""Peers on disk, so that who was in the swarm finds it again when all seeds are gone.

A text file beside the key, one multiaddress with ``/p2p/PEER_ID`` a line, the best ones first.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from swarm.protocol.errors import ProtocolError
from swarm.protocol.identity import PeerId, public_key_from_peer_id
from swarm.protocol.records import NodeRecord

MAXIMUM_PEERS = 64
ADDRESSES_PER_PEER = 3
MAXIMUM_LINE = 256
MAXIMUM_BYTES = MAXIMUM_PEERS * ADDRESSES_PER_PEER * (MAXIMUM_LINE + 1)


def load_peers(path: Path) -> tuple[str, ...]:
    """Addresses that were kept; nothing when there is no file. Lines that are none are skipped."""
    try:
        with path.open("rb") as file:
            lines = file.read(MAXIMUM_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return ()
    addresses = (line.strip() for line in lines)
    return tuple(address for address in addresses if _is_peer_address(address))


def save_peers(path: Path, addresses: Sequence[str]) -> None:
    """Replace the file as a whole, readable by its owner only. Raises OSError."""
    good = dict.fromkeys(address for address in addresses if _is_peer_address(address))
    bounded = list(good)[: MAXIMUM_PEERS * ADDRESSES_PER_PEER]
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(f"{address}\n" for address in bounded)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def worth_keeping(
    records: Iterable[NodeRecord], *, own: PeerId | None = None, before: Sequence[str] = ()
) -> list[str]:
    """Addresses to save: of nodes that are there now, then those that were kept ``before``.

    Nodes that run for longest come first: they are the most likely to run tomorrow.
    """
    by_age = sorted(
        (record for record in records if record.peer_id != own and record.addresses),
        key=lambda record: (not record.reachable_directly, record.started_unix_s, record.peer_id),
    )
    fresh = [
        f"{address.split('/p2p/')[0]}/p2p/{record.peer_id}"
        for record in by_age[:MAXIMUM_PEERS]
        for address in record.addresses[:ADDRESSES_PER_PEER]
        if "/p2p-circuit" not in address
    ]
    known = {address.rpartition("/p2p/")[2] for address in fresh}
    older = [address for address in before if address.rpartition("/p2p/")[2] not in known]
    return (fresh + older)[: MAXIMUM_PEERS * ADDRESSES_PER_PEER]


def _is_peer_address(text: str) -> bool:
    address, found, peer = text.rpartition("/p2p/")
    if not found or not address.startswith("/") or len(text) > MAXIMUM_LINE:
        return False
    try:
        public_key_from_peer_id(PeerId(peer))
    except ProtocolError:
        return False
    return text.isprintable()
