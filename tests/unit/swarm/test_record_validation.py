from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from swarm import record_validation
from swarm.protocol.errors import RecordError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.records import (
    MAX_LIFETIME_S,
    MAX_VALUE_BYTES,
    NodeRecord,
    Record,
    expected_key,
    sign_record,
)
from swarm.record_validation import RecordChecker

NOW = 1000.0
MakeRecord = Callable[..., NodeRecord]
Check = Callable[..., Record]


@pytest.fixture
def owner(identities: list[Identity]) -> Identity:
    return identities[0]


@pytest.fixture
def record(make_record: MakeRecord, owner: Identity) -> NodeRecord:
    return make_record(0, 10, peer_id=owner.peer_id, sequence=5)


@pytest.fixture
def check(owner: Identity) -> Check:
    checker = RecordChecker()

    def run(
        value: bytes,
        *,
        key: str,
        subkey: PeerId = owner.peer_id,
        expires: float = 1060.0,
        now: float = NOW,
    ) -> Record:
        return checker.check(
            lambda expected: expected == key, subkey, value, expires, now_unix_s=now
        )

    return run


def test_a_good_record_passes_again_and_again(
    check: Check, owner: Identity, record: NodeRecord
) -> None:
    value = sign_record(owner, record)
    for _ in range(2):
        assert check(value, key=expected_key(record)) == record


def test_it_expires_even_when_it_was_seen(
    check: Check, owner: Identity, record: NodeRecord
) -> None:
    value = sign_record(owner, record)
    check(value, key=expected_key(record))
    with pytest.raises(RecordError, match="expired"):
        check(value, key=expected_key(record), now=1060.0)


def test_foreign_subkey(
    check: Check, owner: Identity, record: NodeRecord, identities: list[Identity]
) -> None:
    with pytest.raises(RecordError, match="another peer"):
        check(sign_record(owner, record), key=expected_key(record), subkey=identities[1].peer_id)


def test_foreign_subkey_of_a_record_that_was_seen(
    check: Check, owner: Identity, record: NodeRecord, identities: list[Identity]
) -> None:
    value = sign_record(owner, record)
    check(value, key=expected_key(record))
    with pytest.raises(RecordError):
        check(value, key=expected_key(record), subkey=identities[1].peer_id)


def test_forged_signature(check: Check, owner: Identity, record: NodeRecord) -> None:
    value = bytearray(sign_record(owner, record))
    value[-1] ^= 1
    with pytest.raises(RecordError):
        check(bytes(value), key=expected_key(record))


def test_wrong_key(check: Check, owner: Identity, record: NodeRecord) -> None:
    value = sign_record(owner, record)
    for _ in range(2):
        with pytest.raises(RecordError, match="wrong key"):
            check(value, key="elsewhere")


def test_the_directory_cannot_prolong_a_record(
    check: Check, owner: Identity, record: NodeRecord
) -> None:
    with pytest.raises(RecordError, match="expiry"):
        check(sign_record(owner, record), key=expected_key(record), expires=1061.0)


def test_expiry_in_ten_years(check: Check, owner: Identity, record: NodeRecord) -> None:
    far = replace(record, expires_unix_s=int(NOW) + MAX_LIFETIME_S + 1)
    with pytest.raises(RecordError, match="expire"):
        check(sign_record(owner, far), key=expected_key(far), expires=far.expires_unix_s)


def test_too_large(check: Check, record: NodeRecord) -> None:
    with pytest.raises(RecordError, match="large"):
        check(bytes(MAX_VALUE_BYTES + 1), key=expected_key(record))


def test_an_older_record_does_not_come_back(
    check: Check, owner: Identity, record: NodeRecord
) -> None:
    old = sign_record(owner, record)
    newer = replace(record, sequence=6, expires_unix_s=1061)
    check(old, key=expected_key(record))
    check(sign_record(owner, newer), key=expected_key(newer), expires=1061.0)
    with pytest.raises(RecordError, match="older"):
        check(old, key=expected_key(record))


def test_two_records_with_one_sequence(check: Check, owner: Identity, record: NodeRecord) -> None:
    check(sign_record(owner, record), key=expected_key(record))
    other = replace(record, end_block=20)
    with pytest.raises(RecordError, match="older"):
        check(sign_record(owner, other), key=expected_key(other))


def test_a_peer_has_room_for_so_many_records(
    check: Check, owner: Identity, record: NodeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_validation, "MAX_KEYS_PER_PEER", 3)
    for number in range(5):
        of_model = replace(record, model_revision=bytes([number]) * 32)
        value, key = sign_record(owner, of_model), expected_key(of_model)
        if number < 3:
            check(value, key=key)
        else:
            with pytest.raises(RecordError, match="too many"):
                check(value, key=key)
    later = replace(record, model_revision=b"l" * 32, expires_unix_s=1100)
    check(sign_record(owner, later), key=expected_key(later), expires=1100.0, now=1070.0)


def test_memory_is_bounded(
    identities: list[Identity], record: NodeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_validation, "MAX_KNOWN_RECORDS", 2)
    checker = RecordChecker()
    for identity in identities:
        own = replace(record, peer_id=identity.peer_id)
        value = sign_record(identity, own)
        checker.check(lambda key: True, own.peer_id, value, 1060.0, now_unix_s=NOW)
    assert len(checker._known) == len(checker._keys_of_peer) == 2
