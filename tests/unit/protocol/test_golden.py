"""Golden vectors: the bytes that every implementation and every later version must agree on.

If a test here fails, do not edit ``golden.json`` to make it pass: changing a vector is a change of
the protocol, which needs a decision record, a new protocol version and a line in the changelog.
Adding vectors for new messages is no such change.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.protocol import codec, identity, messages, records, version
from swarm.protocol.errors import ErrorCode
from swarm.protocol.identity import Identity
from swarm.protocol.messages import Message
from swarm.protocol.tensors import DType, Encoding, WireTensor

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden.json").read_text())
CLASSES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (*messages.MESSAGE_TYPES, *records.RECORD_TYPES)
}
PROTOCOL_CHANGE = "the bytes on the wire have changed: see the docstring of this file"


def build(vector: dict[str, Any]) -> Any:
    """A dataclass from ``{"class": ..., "fields": {...}}``; byte strings are in hexadecimal."""
    kind = CLASSES[vector["class"]]
    types = {declared.name: str(declared.type) for declared in fields(kind)}
    arguments = {}
    for name, value in vector["fields"].items():
        match types[name]:
            case "bytes":
                value = bytes.fromhex(value)
            case "WireTensor":
                value = WireTensor(
                    DType[value["dtype"]],
                    tuple(value["shape"]),
                    bytes.fromhex(value["data"]),
                    Encoding[value["encoding"]],
                )
            case "tuple[bytes, ...]":
                value = tuple(map(bytes.fromhex, value))
            case declared if declared.startswith("tuple"):
                value = tuple(value)
            case "NodeState":
                value = records.NodeState(value)
            case "DType":
                value = DType(value)
        arguments[name] = value
    return kind(**arguments)


def name_of(vector: dict[str, Any]) -> str:
    return str(vector["name"])


@pytest.mark.parametrize("vector", GOLDEN["frames"], ids=name_of)
def test_frames(vector: dict[str, Any]) -> None:
    message = build(vector)
    frame = bytes.fromhex(vector["frame"])
    prefix = codec.read_prefix(frame[:8])
    header_end = 8 + prefix.header_bytes
    decoded = codec.decode(prefix, frame[8:header_end], frame[header_end:])
    assert decoded == message, PROTOCOL_CHANGE
    if "ZSTD" not in vector["frame_note"]:  # the same data compresses in more than one way
        head, payload = codec.encode(message)
        assert (head + bytes(payload)).hex() == vector["frame"], PROTOCOL_CHANGE


def test_every_message_has_a_vector() -> None:
    covered = {vector["class"] for vector in GOLDEN["frames"]}
    assert covered == {kind.__name__ for kind in messages.MESSAGE_TYPES}


def test_tags_and_field_numbers() -> None:
    numbers = {
        name: {
            "tag": kind.TAG if issubclass(kind, Message) else None,
            "fields": {
                declared.name: declared.metadata["wire"].number for declared in fields(kind)
            },
        }
        for name, kind in CLASSES.items()
    }
    for name, golden in GOLDEN["numbers"].items():
        assert numbers[name]["tag"] == golden["tag"], PROTOCOL_CHANGE
        for field_name, number in golden["fields"].items():
            assert numbers[name]["fields"][field_name] == number, PROTOCOL_CHANGE  # type: ignore[index]
    assert numbers == GOLDEN["numbers"], "new messages and fields belong into golden.json"


def test_error_codes() -> None:
    current = {code.name: int(code) for code in ErrorCode}
    assert GOLDEN["error_codes"].items() <= current.items(), PROTOCOL_CHANGE
    assert current == GOLDEN["error_codes"], "new error codes belong into golden.json"


@pytest.mark.parametrize("vector", GOLDEN["identities"], ids=name_of)
def test_identities(vector: dict[str, Any], tmp_path: Path) -> None:
    seed = bytes.fromhex(vector["seed"])
    own = Identity(Ed25519PrivateKey.from_private_bytes(seed))
    assert own.public_key_bytes.hex() == vector["public_key"], PROTOCOL_CHANGE
    assert own.peer_id == vector["peer_id"], PROTOCOL_CHANGE
    own.save(tmp_path / "identity.key")
    assert (tmp_path / "identity.key").read_bytes().hex() == vector["key_file"], PROTOCOL_CHANGE
    context, message = vector["context"].encode(), bytes.fromhex(vector["message"])
    assert own.sign(context, message).hex() == vector["signature"], PROTOCOL_CHANGE
    identity.verify(own.peer_id, context, message, bytes.fromhex(vector["signature"]))


@pytest.mark.parametrize("vector", GOLDEN["records"], ids=name_of)
def test_records(vector: dict[str, Any]) -> None:
    own = Identity(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(vector["seed"])))
    record = build(vector)
    assert records.sign_record(own, record).hex() == vector["value"], PROTOCOL_CHANGE
    opened = records.open_record(
        bytes.fromhex(vector["value"]),
        now_unix_s=vector["now_unix_s"],
        expected_peer=own.peer_id,
    )
    assert opened == record, PROTOCOL_CHANGE
    assert records.expected_key(record) == vector["key"], PROTOCOL_CHANGE


def test_shards() -> None:
    for vector in GOLDEN["shards"]:
        assert records.shard_of(vector["peer_id"], vector["shards"]) == vector["shard"], (
            PROTOCOL_CHANGE
        )


def test_names() -> None:
    assert GOLDEN["stream_protocol"] == version.STREAM_PROTOCOL, PROTOCOL_CHANGE
    assert GOLDEN["model_index_key"] == records.model_index_key(), PROTOCOL_CHANGE
