"""Directory records: what is signed comes back, and everything else is dropped."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.protocol import records
from swarm.protocol.errors import RecordError, UsageError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.records import ModelIndexRecord, NodeRecord, NodeState, TombstoneRecord
from swarm.protocol.tensors import DType

NOW_UNIX_S = 1_800_000_000.5
OWN = Identity(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
FOREIGN = Identity(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))
SIGNATURE_CONTEXT = b"directory record"

NODE = NodeRecord(
    peer_id=OWN.peer_id,
    model_name="SmolLM2-135M-Instruct",
    model_revision=bytes(range(32)),
    number_of_blocks=30,
    shards=4,
    first_block=10,
    end_block=20,
    state=NodeState.ONLINE,
    dtype=DType.BFLOAT16,
    minimum_version=1,
    maximum_version=1,
    sequence=17,
    expires_unix_s=1_800_000_060,
    decode_tokens_per_s=900,
    prefill_tokens_per_s=20_000,
    cache_tokens_total=100_000,
    cache_tokens_free=90_000,
    queued_steps=3,
    quantisation="int8",
    adapters=("chichewa-v2", "medical"),
    passport_hash=bytes(32),
    addresses=("/ip4/192.0.2.7/tcp/31330", "/ip4/192.0.2.7/udp/31330/quic-v1"),
    reachable_directly=True,
    software="0.1.0",
    display_name="Université de Genève",
)
MODEL = ModelIndexRecord(
    peer_id=OWN.peer_id,
    model_name="SmolLM2-135M-Instruct",
    model_revision=bytes(range(32)),
    number_of_blocks=30,
    shards=4,
    hidden_size=576,
    sequence=17,
    expires_unix_s=1_800_000_060,
)
TOMBSTONE = TombstoneRecord(
    peer_id=OWN.peer_id,
    model_revision=bytes(range(32)),
    groups=4,
    group=records.shard_of(FOREIGN.peer_id, 4),
    lost_peers=(FOREIGN.peer_id,),
    lost_sequences=(17,),
    sequence=18,
    expires_unix_s=1_800_000_060,
)


def open_now(value: bytes, expected_peer: PeerId | None = OWN.peer_id) -> records.Record:
    return records.open_record(value, now_unix_s=NOW_UNIX_S, expected_peer=expected_peer)


def dropped_because(value: bytes, expected_peer: PeerId | None = OWN.peer_id) -> str:
    with pytest.raises(RecordError) as caught:
        open_now(value, expected_peer)
    return caught.value.detail


def forge(kind: Any, fields: Any, signer: Identity = OWN) -> bytes:
    """Sign whatever fields, as a hostile peer can."""
    payload = fields if isinstance(fields, bytes) else msgpack.packb(fields)
    signed = (bytes([kind]) if type(kind) is int else b"\1") + payload
    envelope: bytes = msgpack.packb([kind, payload, signer.sign(SIGNATURE_CONTEXT, signed)])
    return envelope


def fields_of(record: records.Record) -> dict[int, Any]:
    payload = msgpack.unpackb(records.sign_record(OWN, record))[1]
    fields: dict[int, Any] = msgpack.unpackb(payload, strict_map_key=False)
    return fields


@pytest.mark.parametrize("record", [NODE, MODEL, TOMBSTONE])
def test_what_was_signed_comes_back(record: records.Record) -> None:
    value = records.sign_record(OWN, record)
    opened = open_now(value)
    assert opened == record
    assert type(opened) is type(record)
    assert open_now(value, expected_peer=None) == record


def test_types_come_back_too() -> None:
    opened = open_now(records.sign_record(OWN, NODE))
    assert isinstance(opened, NodeRecord)
    assert opened.state is NodeState.ONLINE
    assert opened.dtype is DType.BFLOAT16
    assert opened.reachable_directly is True


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.builds(
        lambda span, cache, state, **rest: replace(
            NODE,
            first_block=min(span),
            end_block=max(span) + 1,
            state=state,
            target_first_block=3 if state is NodeState.MOVING else 0,
            target_end_block=9 if state is NodeState.MOVING else 0,
            cache_tokens_free=min(cache),
            cache_tokens_total=max(cache),
            **rest,
        ),
        span=st.tuples(st.integers(0, 29), st.integers(0, 29)),
        cache=st.tuples(st.integers(0, 2**53 - 1), st.integers(0, 2**53 - 1)),
        state=st.sampled_from(NodeState),
        dtype=st.sampled_from(DType),
        reachable_directly=st.booleans(),
        queued_steps=st.integers(0, 2**53 - 1),
        adapters=st.lists(st.sampled_from(["one", "two", "drei", "четыре"])).map(
            lambda names: tuple(names[:16])
        ),
        passport_hash=st.sampled_from([b"", bytes(32)]),
        country=st.sampled_from(["", "KE", "MW"]),
        busy_permille=st.integers(0, 1000),
        display_name=st.sampled_from(["", "دانشگاه تهران", "東京大学", "می‌خواهم"]),
        expires_unix_s=st.integers(int(NOW_UNIX_S) + 1, int(NOW_UNIX_S) + 900),
    )
)
def test_round_trip(record: NodeRecord) -> None:
    assert open_now(records.sign_record(OWN, record)) == record


@pytest.mark.parametrize("record", [NODE, MODEL, TOMBSTONE])
def test_no_byte_can_be_changed(record: records.Record) -> None:
    value = records.sign_record(OWN, record)
    for position in range(len(value)):
        for flip in (0x01, 0x80):
            changed = bytearray(value)
            changed[position] ^= flip
            dropped_because(bytes(changed))


def test_no_byte_can_be_cut_or_added() -> None:
    value = records.sign_record(OWN, NODE)
    for size_bytes in range(len(value)):
        dropped_because(value[:size_bytes])
    dropped_because(value + b"\0")
    dropped_because(value + value)
    dropped_because(value + bytes(2048))


def test_a_kind_cannot_be_relabelled() -> None:
    _, payload, signature = msgpack.unpackb(records.sign_record(OWN, MODEL))
    dropped_because(msgpack.packb([1, payload, signature]))


def test_unsigned_and_foreign_signatures() -> None:
    _, payload, signature = msgpack.unpackb(records.sign_record(OWN, NODE))
    for value in (
        payload,
        msgpack.packb([1, payload]),
        msgpack.packb([1, payload, b""]),
        msgpack.packb([1, payload, bytes(64)]),
        msgpack.packb([1, payload, signature[:-1]]),
        msgpack.packb([1, payload, signature.hex()]),
        msgpack.packb([1, payload, signature, b""]),
        msgpack.packb([True, payload, signature]),
        msgpack.packb({0: 1, 1: payload, 2: signature}),
        forge(1, fields_of(NODE), signer=FOREIGN),
    ):
        dropped_because(value)


def test_a_signature_made_for_another_purpose() -> None:
    payload = msgpack.packb(fields_of(NODE))
    signature = OWN.sign(b"receipt", b"\1" + payload)
    assert dropped_because(msgpack.packb([1, payload, signature])) == "the signature is wrong"


def test_the_record_of_another_peer() -> None:
    foreign = records.sign_record(FOREIGN, replace(NODE, peer_id=FOREIGN.peer_id))
    assert dropped_because(foreign) == "the record of another peer"
    assert open_now(foreign, FOREIGN.peer_id)
    # FOREIGN signs a record that speaks of OWN
    assert dropped_because(forge(1, fields_of(NODE), FOREIGN)) == "the signature is wrong"


@pytest.mark.parametrize("lifetime_s", [-(10**9), -1, 0, 901, 10 * 365 * 86400])
def test_expiry(lifetime_s: int) -> None:
    value = records.sign_record(OWN, replace(NODE, expires_unix_s=int(NOW_UNIX_S) + lifetime_s))
    assert dropped_because(value) == "expired, or expires too late"


def test_a_record_is_good_until_it_expires() -> None:
    value = records.sign_record(OWN, NODE)
    expires = NODE.expires_unix_s
    assert records.open_record(value, now_unix_s=expires - 0.001)
    assert records.open_record(value, now_unix_s=expires - 900)
    for now_unix_s in (expires, expires - 900.5):
        with pytest.raises(RecordError):
            records.open_record(value, now_unix_s=now_unix_s)


@pytest.mark.parametrize(
    "changes",
    [
        {1: ""},
        {1: "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"},
        {1: b"bytes"},
        {2: ""},
        {2: "x" * 129},
        {2: "two\nlines"},
        {2: "\x1b[2Jclear"},
        {2: "right\u202eleft"},
        {3: bytes(31)},
        {3: "text"},
        {4: 0},
        {4: 1025},
        {4: 19},
        {5: 0},
        {5: 65537},
        {6: 20},
        {6: 21},
        {6: -1},
        {6: True},
        {6: 1.0},
        {6: float("nan")},
        {7: 31},
        {7: 0},
        {8: 0},
        {8: 4},
        {8: "online"},
        {9: 0},
        {9: 4},
        {10: 2},
        {11: 0},
        {12: 2**63},
        {12: -1},
        {13: 2**64 - 1},
        {13: float("inf")},
        {16: 1},
        {17: 2**53},
        {19: "x" * 65},
        {20: ["x"] * 17},
        {20: "chichewa"},
        {20: [1]},
        {20: {}},
        {21: bytes(31)},
        {21: bytes(33)},
        {22: ["/ip4/192.0.2.7"] * 9},
        {22: ["x" * 161]},
        {22: ["/ip4/192.0.2.7\0"]},
        {23: 2},
        {23: True},
        {24: "\x07"},
        {25: "x" * 65},
        {25: "\u2028"},
        {26: "x" * 65},
        {27: "ke"},
        {27: "K"},
        {27: "KEN"},
        {31: 5},
        {8: 4, 30: 5, 31: 31},
        {8: 4, 30: 5, 31: 5},
        {32: 1001},
        {99: [[[[[[[[[[1]]]]]]]]]]},
        {"text": 1},
    ],
)
def test_signed_nonsense(changes: dict[Any, Any]) -> None:
    assert open_now(forge(1, fields_of(NODE))) == NODE
    dropped_because(forge(1, {**fields_of(NODE), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {1: FOREIGN.peer_id},
        {3: 0},
        {4: (TOMBSTONE.group + 1) % 4},
        {5: []},
        {5: [OWN.peer_id]},
        {5: [FOREIGN.peer_id, FOREIGN.peer_id], 6: [1, 2]},
        {5: ["nobody"]},
        {5: ["é"]},
        {5: [FOREIGN.peer_id] * 25, 6: [1] * 25},
        {6: []},
        {6: [1, 2]},
        {6: [-1]},
    ],
)
def test_signed_nonsense_of_witnesses(changes: dict[Any, Any]) -> None:
    assert open_now(forge(3, fields_of(TOMBSTONE))) == TOMBSTONE
    dropped_because(forge(3, {**fields_of(TOMBSTONE), **changes}))


def test_the_fullest_tombstone_fits() -> None:
    peers = [
        Identity(Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))).peer_id
        for number in range(1, records.MAX_TOMBSTONES + 1)
    ]
    full = replace(
        TOMBSTONE,
        groups=1,
        group=0,
        lost_peers=tuple(peers),
        lost_sequences=(2**53 - 1,) * len(peers),
        sequence=2**53 - 1,
    )
    assert open_now(records.sign_record(OWN, full)) == full


def test_a_mover_is_placed_at_its_target() -> None:
    moving = replace(NODE, state=NodeState.MOVING, target_first_block=2, target_end_block=8)
    assert (NODE.placed_span, moving.placed_span) == ((10, 20), (2, 8))


@pytest.mark.parametrize("number", range(1, 14))
def test_fields_that_must_be_there(number: int) -> None:
    fields = fields_of(NODE)
    del fields[number]
    assert "missing" in dropped_because(forge(1, fields))


def test_fields_of_later_versions_are_ignored() -> None:
    assert open_now(forge(1, {**fields_of(NODE), 99: "later"})) == NODE


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc0", b"\x90", b"\x91" * 300 + b"\xc0", b"\x81\x01" * 1000, b"\xd4\x05\x00"],
)
def test_signed_payloads_that_are_no_map(payload: bytes) -> None:
    dropped_because(forge(1, payload))


@pytest.mark.parametrize("kind", [0, 4, 255])
def test_unknown_kinds(kind: int) -> None:
    assert dropped_because(forge(kind, fields_of(NODE))) == "unknown kind"


@pytest.mark.parametrize("kind", [2**63, -1, None, "node", [1], {1: 1}, 1.0, float("nan")])
def test_kinds_that_are_none(kind: object) -> None:
    dropped_because(forge(1, fields_of(NODE)).replace(b"\x93\x01", b"\x93" + msgpack.packb(kind)))


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=300))
def test_random_bytes(value: bytes) -> None:
    dropped_because(value)
    dropped_because(msgpack.packb([1, value, bytes(64)]))
    dropped_because(forge(1, value))


def test_nothing_larger_than_2_kib() -> None:
    large = replace(NODE, addresses=("/dns4/" + "x" * 150,) * 8, adapters=("x" * 60,) * 16)
    with pytest.raises(UsageError, match="fewer addresses"):
        records.sign_record(OWN, large)
    padded = forge(1, {**fields_of(NODE), 99: bytes(2000)})
    assert dropped_because(padded) == "too large"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: replace(record, peer_id=FOREIGN.peer_id),
        lambda record: replace(record, model_name=""),
        lambda record: replace(record, model_name="a\tb"),
        lambda record: replace(record, number_of_blocks=0),
        lambda record: replace(record, sequence=-1),
    ],
)
@pytest.mark.parametrize("record", [NODE, MODEL])
def test_we_do_not_sign_what_is_dropped(
    record: records.Record, spoil: Callable[[records.Record], records.Record]
) -> None:
    with pytest.raises(UsageError):
        records.sign_record(OWN, spoil(record))


def test_keys_follow_from_the_record() -> None:
    shard = records.shard_of(OWN.peer_id, 4)
    assert records.expected_key(NODE) == records.shard_key(NODE.model_revision, shard)
    assert records.expected_key(MODEL) == records.model_index_key()
    tombstones = records.tombstone_key(TOMBSTONE.model_revision, TOMBSTONE.group)
    assert records.expected_key(TOMBSTONE) == tombstones
    assert [records.tombstone_groups(shards) for shards in (1, 16, 32)] == [1, 1, 2]
    other_model = replace(NODE, model_revision=bytes(32))
    assert records.expected_key(other_model) != records.expected_key(NODE)
    keys = {records.shard_key(bytes(32), number) for number in range(100)}
    assert len(keys | {records.model_index_key()}) == 101


def test_peers_spread_evenly_over_the_shards() -> None:
    peer_ids = [
        Identity(Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))).peer_id
        for number in range(800)
    ]
    assert {records.shard_of(peer_id, 1) for peer_id in peer_ids} == {0}
    counts = [0] * 8
    for peer_id in peer_ids:
        counts[records.shard_of(peer_id, 8)] += 1
    assert min(counts) > 60
    assert max(counts) < 140
