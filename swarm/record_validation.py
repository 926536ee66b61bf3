"""Which directory entries a peer keeps, whatever network they come from.

``swarm.protocol.records`` says whether the bytes of one record are valid. Here is what takes more
than the bytes: that the record lies under its own key and subkey, that the directory's expiry is
the signed one, and that nobody brings back an older record or floods the directory.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from swarm.protocol.errors import RecordError
from swarm.protocol.identity import PeerId
from swarm.protocol.records import (
    MAX_RECORD_BYTES,
    ModelIndexRecord,
    NodeRecord,
    expected_key,
    open_record,
)

MAX_ENTRIES_PER_KEY = 512
"""Subkeys under one key; shards are made so that about 64 are in use."""
MAX_KEYS = 4096
"""Keys that one peer stores for the swarm."""
MAX_KEYS_PER_PEER = 64
"""Records of one peer that are alive at a time."""
MAX_KNOWN_RECORDS = 16384


@dataclass(frozen=True, slots=True)
class _Known:
    value: bytes
    record: NodeRecord | ModelIndexRecord


class RecordChecker:
    """Checks entries one after the other and remembers the newest record of each peer and key.

    What it has seen before is not verified again, so that reading a shard costs signatures only for
    records that changed.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[PeerId, str], _Known] = OrderedDict()
        self._keys_of_peer: Counter[PeerId] = Counter()
        self._key_of_value: dict[tuple[PeerId, bytes], str] = {}

    def check(
        self,
        is_stored_under: Callable[[str], bool],
        subkey: PeerId,
        value: bytes,
        expires_unix_s: float,
        *,
        now_unix_s: float,
    ) -> NodeRecord | ModelIndexRecord:
        """The record in ``value``, or RecordError (and nothing else) when it must be dropped.

        ``is_stored_under`` tells whether a key is the one of the entry; some networks know only
        its hash.
        """
        if len(value) > MAX_RECORD_BYTES:
            raise RecordError("too large")
        record = self._seen(subkey, value, now_unix_s)
        if record is None:
            record = open_record(value, now_unix_s=now_unix_s, expected_peer=subkey)
        if expires_unix_s != record.expires_unix_s:
            raise RecordError("the entry's expiry is not the signed one")
        key = expected_key(record)
        if not is_stored_under(key):
            raise RecordError("stored under a wrong key")
        self._remember(subkey, key, value, record, now_unix_s)
        return record

    def _seen(
        self, peer: PeerId, value: bytes, now_unix_s: float
    ) -> NodeRecord | ModelIndexRecord | None:
        key = self._key_of_value.get((peer, value))
        if key is None:
            return None
        record = self._known[peer, key].record
        if record.expires_unix_s <= now_unix_s:
            raise RecordError("expired")
        return record

    def _remember(
        self,
        peer: PeerId,
        key: str,
        value: bytes,
        record: NodeRecord | ModelIndexRecord,
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
        self._key_of_value[peer, value] = key
        self._keys_of_peer[peer] += 1

    def _forget_expired(self, now_unix_s: float) -> None:
        expired = [
            at for at, known in self._known.items() if known.record.expires_unix_s <= now_unix_s
        ]
        for peer, key in expired:
            self._forget(peer, key)

    def _forget(self, peer: PeerId, key: str) -> None:
        known = self._known.pop((peer, key))
        del self._key_of_value[peer, known.value]
        self._keys_of_peer[peer] -= 1
        if not self._keys_of_peer[peer]:
            del self._keys_of_peer[peer]
