"""Which directory entries a peer keeps, whatever network they come from.

``swarm.protocol.records`` says whether the bytes of one record are valid. Here is what takes more
than the bytes: that the record lies under its own key and subkey, that the directory's expiry is
the signed one, and that nobody brings back an older record or floods the directory.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from swarm.gate import Gate
from swarm.protocol.errors import ProtocolError, RecordError
from swarm.protocol.identity import PeerId
from swarm.protocol.records import (
    MAX_VALUE_BYTES,
    Record,
    check_lifetime,
    expected_key,
    passport_of,
    verify_record,
)

MAX_ENTRIES_PER_KEY = 512
"""Subkeys under one key; shards are made so that about 64 are in use."""
MAX_KEYS = 4096
"""Keys that one peer stores for the swarm."""
MAX_KEYS_PER_PEER = 64
"""Records of one peer that are alive at a time."""
MAX_KNOWN_RECORDS = 16384


def check_entry(
    is_stored_under: Callable[[str], bool],
    subkey: PeerId,
    value: bytes,
    expires_unix_s: float,
    *,
    now_unix_s: float,
) -> tuple[str, Record]:
    """Key and record of a directory entry, or RecordError (and nothing else) when it is not valid.

    ``is_stored_under`` tells whether a key is the one of the entry; some networks know only its
    hash. Entries that were seen before cost no signature, whoever in this process saw them.
    """
    if len(value) > MAX_VALUE_BYTES:
        raise RecordError("too large")
    record = _verified(value, subkey)
    check_lifetime(record, now_unix_s)
    if expires_unix_s != record.expires_unix_s:
        raise RecordError("the entry's expiry is not the signed one")
    key = expected_key(record)
    if not is_stored_under(key):
        raise RecordError("stored under a wrong key")
    return key, record


@lru_cache(maxsize=MAX_KNOWN_RECORDS)
def _verified(value: bytes, subkey: PeerId) -> Record:
    return verify_record(value, subkey)


@dataclass(frozen=True, slots=True)
class _Known:
    value: bytes
    record: Record


class RecordChecker:
    """Checks entries one after the other and remembers the newest record of each peer and key."""

    def __init__(self, gate: Gate | None = None) -> None:
        """``gate`` says whose records are kept at all."""
        self._gate = gate
        self._known: OrderedDict[tuple[PeerId, str], _Known] = OrderedDict()
        self._keys_of_peer: Counter[PeerId] = Counter()

    def check(
        self,
        is_stored_under: Callable[[str], bool],
        subkey: PeerId,
        value: bytes,
        expires_unix_s: float,
        *,
        now_unix_s: float,
    ) -> Record:
        """As :func:`check_entry`, but of one peer's records under a key only newer ones pass."""
        key, record = check_entry(
            is_stored_under, subkey, value, expires_unix_s, now_unix_s=now_unix_s
        )
        if self._gate is not None:
            self._require_member(self._gate, subkey, value)
        self._remember(subkey, key, value, record, now_unix_s)
        return record

    @staticmethod
    def _require_member(gate: Gate, peer: PeerId, value: bytes) -> None:
        """Learn the passport that came with a record; who may not take part announces nothing."""
        try:
            gate.check(peer, passport_of(value), b"")
        except ProtocolError as error:
            raise RecordError(f"of a peer that may not take part: {error}") from error

    def _remember(
        self,
        peer: PeerId,
        key: str,
        value: bytes,
        record: Record,
        now_unix_s: float,
    ) -> None:
        known = self._known.get((peer, key))
        if known is not None:
            if known.value == value:
                return
            if record.sequence <= known.record.sequence:
                raise RecordError("older than the record that is known")
            self._forget(peer, key)
        if self._keys_of_peer[peer] >= MAX_KEYS_PER_PEER or len(self._known) >= MAX_KNOWN_RECORDS:
            self._forget_expired(now_unix_s)
        if self._keys_of_peer[peer] >= MAX_KEYS_PER_PEER:
            raise RecordError("too many records of this peer")
        if len(self._known) >= MAX_KNOWN_RECORDS:
            self._forget(*next(iter(self._known)))
        self._known[peer, key] = _Known(value, record)
        self._keys_of_peer[peer] += 1

    def _forget_expired(self, now_unix_s: float) -> None:
        expired = [
            at for at, known in self._known.items() if known.record.expires_unix_s <= now_unix_s
        ]
        for peer, key in expired:
            self._forget(peer, key)

    def _forget(self, peer: PeerId, key: str) -> None:
        del self._known[peer, key]
        self._keys_of_peer[peer] -= 1
        if not self._keys_of_peer[peer]:
            del self._keys_of_peer[peer]
