"""Signed objects: golden bytes, strictness against hostile ones, units and Merkle proofs."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.protocol import ledger_objects, merkle, strict_json
from swarm.protocol.envelope import Envelope, Signature, pae, parse_envelope, verify_bytes
from swarm.protocol.errors import DecodeError, ErrorCode, ProtocolError, UsageError
from swarm.protocol.ledger_objects import OBJECT_TYPES, Receipt, Voucher, Work, sign, verified
from swarm.protocol.prices import PriceTable, mflop_per_block_token, step_work

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden_ledger.json").read_text())
KINDS = {kind.__name__: kind for kind in OBJECT_TYPES}
KEY = Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\x07")
PUBLIC = KEY.public_key().public_bytes_raw()
VOUCHER = Voucher(**next(v["fields"] for v in GOLDEN["objects"] if v["class"] == "Voucher"))

SMALL_ORDER_KEYS = [
    bytes.fromhex(text)
    for text in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0000000000000000000000000000000000000000000000000000000000000080",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000080",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
        # not canonical: y = p, p + 1
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    )
]


@pytest.mark.parametrize(
    "vector",
    GOLDEN["objects"] + GOLDEN["under_a_policy"],
    ids=lambda vector: vector["class"],
)
def test_golden(vector: dict[str, Any]) -> None:
    value = KINDS[vector["class"]](**vector["fields"])
    keys = [Ed25519PrivateKey.from_private_bytes(bytes.fromhex(key)) for key in vector["keys"]]
    assert sign(value, *keys).to_json() == vector["envelope"], "the signed bytes have changed"
    sealed = parse_envelope(vector["envelope"])
    signers = [key.public_key().public_bytes_raw() for key in keys]
    assert verified(type(value), sealed, *signers) == value


def test_every_kind_has_a_vector() -> None:
    assert [vector["class"] for vector in GOLDEN["objects"]] == [k.__name__ for k in OBJECT_TYPES]


def test_pae_is_that_of_the_specification() -> None:
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_one_kind_does_not_pass_as_another() -> None:
    sealed = sign(VOUCHER, KEY)
    with pytest.raises(DecodeError):
        ledger_objects.parse(Receipt, sealed)
    renamed = replace(sealed, payload_type=ledger_objects.payload_type(Receipt))
    with pytest.raises(ProtocolError) as refused:
        verified(Receipt, renamed, PUBLIC)
    assert refused.value.code is ErrorCode.BAD_SIGNATURE


@given(position=st.integers(min_value=0), bit=st.integers(0, 7))
def test_any_changed_bit_is_noticed(position: int, bit: int) -> None:
    sealed = sign(VOUCHER, KEY)
    payload = bytearray(sealed.payload)
    payload[position % len(payload)] ^= 1 << bit
    with pytest.raises(ProtocolError):
        verified(Voucher, replace(sealed, payload=bytes(payload)), PUBLIC)


def test_all_named_signers_are_needed() -> None:
    other = Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\x08")
    sealed = sign(VOUCHER, KEY)
    with pytest.raises(ProtocolError):
        sealed.require_signatures(PUBLIC, other.public_key().public_bytes_raw())
    with pytest.raises(ProtocolError):
        sealed.require_signatures()
    sign(VOUCHER, KEY, other).require_signatures(PUBLIC)


@pytest.mark.parametrize("key", SMALL_ORDER_KEYS, ids=lambda key: key.hex()[:8])
def test_weak_keys_are_refused(key: bytes) -> None:
    signed = pae("t", b"whatever")
    with pytest.raises(ProtocolError) as refused:
        verify_bytes(key, signed, bytes(64))
    assert refused.value.code is ErrorCode.BAD_FIELD
    sealed = Envelope("t", b"whatever", (Signature(key, key + bytes(32)),))
    with pytest.raises(ProtocolError):
        sealed.require_signatures(key)


PAYLOAD = sign(VOUCHER, KEY).payload.decode()


@pytest.mark.parametrize(
    "payload",
    [
        PAYLOAD.replace('"sequence":3', '"sequence":3,"sequence":4'),
        PAYLOAD.replace('"sequence":3', '"sequence":3.0'),
        PAYLOAD.replace('"sequence":3', '"sequence":3e0'),
        PAYLOAD.replace('"sequence":3', '"sequence":-3'),
        PAYLOAD.replace('"sequence":3', '"sequence":true'),
        PAYLOAD.replace('"sequence":3', '"sequence":null'),
        PAYLOAD.replace('"sequence":3', '"sequence":NaN'),
        PAYLOAD.replace('"sequence":3', '"sequence":Infinity'),
        PAYLOAD.replace('"sequence":3', '"sequence":9007199254740992'),
        PAYLOAD.replace('"sequence":3', '"sequence":' + "9" * 3000),
        PAYLOAD.replace('"sequence":3', '"sequence":"3"'),
        PAYLOAD.replace('"sequence":3', '"sequence":[3]'),
        PAYLOAD.replace('"sequence":3', '"sequence":{"a":3}'),
        PAYLOAD.replace('"sequence":3,', ""),
        PAYLOAD.replace('"sequence":3', '"sequence":3,"more":1'),
        PAYLOAD.replace('"sequence":3', '"sequence":3,"policy":""'),
        PAYLOAD.replace('"sequence":3', '"sequence":3,"policy":"ab"'),
        PAYLOAD.replace('"sequence":3', '"policy":"' + "ab" * 32 + '"'),
        PAYLOAD.replace('"end_block":20', '"end_block":1025'),
        PAYLOAD.replace("abab", "ABAB", 1),
        PAYLOAD.replace("abab", "aba", 1),
        PAYLOAD.replace("12D3", "12\\u00d63"),
        PAYLOAD.replace("12D3", "12\\u00003"),
        PAYLOAD.replace("12D3", "12Ö3"),
        PAYLOAD + "x",
        PAYLOAD + PAYLOAD,
        PAYLOAD.replace("{", "{" + " " * 4096, 1),
        "[" * 4000,
        "",
        "[]",
        '"text"',
        "3",
    ],
)
def test_strictness(payload: str) -> None:
    assert payload != PAYLOAD
    with pytest.raises(DecodeError):
        strict_json.parse(Voucher, payload.encode("utf-8"))


@settings(max_examples=200)
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode()))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    for reader in (lambda: parse_envelope(data), lambda: strict_json.parse(Voucher, data)):
        with pytest.raises(DecodeError):
            reader()


ENVELOPE = sign(VOUCHER, KEY).to_json()


@pytest.mark.parametrize(
    "text",
    [
        ENVELOPE.replace('"payload":', '"payload":"","payload":'),
        ENVELOPE.replace('"signatures":[', '"signatures":[],"signature":['),
        ENVELOPE.replace('"keyid":"', '"keyid":" '),
        ENVELOPE.replace(PUBLIC.hex(), PUBLIC.hex().upper()),
        ENVELOPE.replace('"sig":"', '"sig":"\\n'),
        ENVELOPE.replace('"signatures":[{', '"signatures":[{"x":1,'),
        ENVELOPE[:-2] + "," + ",".join(["{}"] * 3) + "]}",
        ENVELOPE.replace("==", "="),
    ],
)
def test_envelopes_are_strict(text: str) -> None:
    assert text != ENVELOPE
    with pytest.raises(DecodeError):
        parse_envelope(text)


def test_our_own_mistakes_are_usage_errors() -> None:
    for wrong in (replace(VOUCHER, sequence=-1), replace(VOUCHER, model="xyz")):
        with pytest.raises(UsageError):
            sign(wrong, KEY)


@pytest.mark.parametrize("kind", OBJECT_TYPES, ids=lambda kind: kind.__name__)
def test_every_field_is_bounded(kind: type[Any]) -> None:
    assert all("json" in declared.metadata for declared in fields(kind))


@pytest.mark.parametrize("vector", GOLDEN["units"])
def test_units(vector: dict[str, Any]) -> None:
    units = PriceTable(epoch=1).units(
        Work(*vector["work"]), blocks=vector["blocks"], mflop_per_block_token=vector["mflop"]
    )
    assert units == vector["units"]


def test_more_than_can_be_counted() -> None:
    with pytest.raises(ProtocolError) as refused:
        PriceTable(epoch=1).units(Work(2**50), blocks=1024, mflop_per_block_token=436)
    assert refused.value.code is ErrorCode.OVER_LIMIT


def test_a_block_of_llama_3_8b() -> None:
    assert mflop_per_block_token(218_112_000, 4096) == 436 + 33


def test_a_pass_reads_the_weights_once() -> None:
    assert step_work(1, 1) == Work(0, 1)
    assert step_work(4, 8) == Work(28, 4)


def test_work_is_compared_by_each_count() -> None:
    assert Work(2, 2).covers(Work(1, 2))
    assert not Work(9, 1).covers(Work(1, 2))
    assert asdict(Work(1, 2) + Work(3, 4, 5, 6)) == asdict(Work(4, 6, 5, 6))


@pytest.mark.parametrize("vector", GOLDEN["roots"], ids=lambda vector: vector["leaves"])
def test_roots(vector: dict[str, Any]) -> None:
    leaves = [merkle.leaf_hash(bytes([index])) for index in range(vector["leaves"])]
    assert merkle.root_of(leaves).hex() == vector["root"]


def split(size: int) -> int:
    """The largest power of two below ``size``."""
    return 1 << ((size - 1).bit_length() - 1)


def inclusion(index: int, leaves: list[bytes]) -> list[bytes]:
    """By the definition in RFC 6962, 2.1.1: slow, and written apart from the code under test."""
    if len(leaves) == 1:
        return []
    k = split(len(leaves))
    if index < k:
        return [*inclusion(index, leaves[:k]), merkle.root_of(leaves[k:])]
    return [*inclusion(index - k, leaves[k:]), merkle.root_of(leaves[:k])]


def consistency(old: int, leaves: list[bytes], complete: bool = True) -> list[bytes]:
    """By the definition in RFC 6962, 2.1.2."""
    if old == len(leaves):
        return [] if complete else [merkle.root_of(leaves)]
    k = split(len(leaves))
    if old <= k:
        return [*consistency(old, leaves[:k], complete), merkle.root_of(leaves[k:])]
    return [*consistency(old - k, leaves[k:], False), merkle.root_of(leaves[:k])]


def test_proofs_of_all_small_trees() -> None:
    hashes = [merkle.leaf_hash(bytes([index])) for index in range(33)]
    for size in range(1, 34):
        leaves = hashes[:size]
        root = merkle.root_of(leaves)
        for index in range(size):
            proof = inclusion(index, leaves)
            merkle.check_inclusion(index, size, leaves[index], proof, root)
            for wrong in (proof[:-1] if proof else [root], [*proof, root]):
                with pytest.raises(ProtocolError):
                    merkle.check_inclusion(index, size, leaves[index], wrong, root)
        for old in range(1, size + 1):
            old_root = merkle.root_of(leaves[:old])
            proof = consistency(old, leaves)
            merkle.check_consistency(old, old_root, size, root, proof)
            with pytest.raises(ProtocolError):
                merkle.check_consistency(old, hashes[0][::-1], size, root, proof)
