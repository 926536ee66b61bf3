"""Keys, peer ids, signatures and key files, and the keys of peers that must be refused."""

import importlib.util
import os
import stat
from pathlib import Path
from types import ModuleType

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.protocol import base58, identity
from swarm.protocol.errors import ConfigError, ErrorCode, ProtocolError
from swarm.protocol.identity import Identity, PeerId

SMALL_ORDER_POINTS = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
]
NON_CANONICAL_POINTS = [
    *(
        ((2**255 - 19 + excess) | sign << 255).to_bytes(32, "little").hex()
        for excess in range(19)
        for sign in (0, 1)
    ),
    # x is 0, yet its sign says negative
    "0100000000000000000000000000000000000000000000000000000000000080",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
]


@pytest.mark.parametrize("point", SMALL_ORDER_POINTS + NON_CANONICAL_POINTS)
def test_weak_public_keys_are_refused(point: str) -> None:
    public_key_bytes = bytes.fromhex(point)
    with pytest.raises(ProtocolError):
        identity.check_public_key(public_key_bytes)
    peer_id = PeerId(base58.encode(identity.PEER_ID_PREFIX + public_key_bytes))
    with pytest.raises(ProtocolError):
        identity.public_key_from_peer_id(peer_id)
    # for the neutral point this signature holds for all messages, if the key is not refused
    forged = bytes.fromhex(SMALL_ORDER_POINTS[0]) + bytes(32)
    for signer in (public_key_bytes, peer_id):
        with pytest.raises(ProtocolError) as caught:
            identity.verify(signer, b"context", b"message", forged)
        assert caught.value.code is ErrorCode.BAD_FIELD


def test_a_peer_id_is_the_public_key() -> None:
    own = Identity.generate()
    assert own.peer_id.startswith("12D3KooW")
    assert identity.public_key_from_peer_id(own.peer_id) == own.public_key_bytes
    assert identity.peer_id_from_public_key(own.public_key_bytes) == own.peer_id


VALID_PEER_ID = Identity(Ed25519PrivateKey.from_private_bytes(bytes(range(32)))).peer_id


@pytest.mark.parametrize(
    "peer_id",
    [
        "",
        "1",
        "1" * 52,
        "1" + VALID_PEER_ID,
        VALID_PEER_ID[1:],
        VALID_PEER_ID[:-1],
        VALID_PEER_ID + "1",
        " " + VALID_PEER_ID,
        VALID_PEER_ID.replace("K", "0"),
        VALID_PEER_ID[:-1] + "é",
        VALID_PEER_ID * 100,
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        "bafzaajaiaejcbzdibmxyzdjbbehgvizh6g5tikvy47mshdy6gwbruvgwvd24seje",
    ],
)
def test_other_texts_are_no_peer_ids(peer_id: str) -> None:
    with pytest.raises(ProtocolError):
        identity.public_key_from_peer_id(peer_id)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=64))
def test_base58_round_trip(data: bytes) -> None:
    assert base58.decode(base58.encode(data)) == data


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text(alphabet=base58.ALPHABET, max_size=60))
def test_each_byte_string_has_one_base58_text(text: str) -> None:
    assert base58.encode(base58.decode(text)) == text


def test_base58_known_vectors() -> None:
    assert base58.encode(b"Hello World!") == "2NEpo7TZRRrLZSi2U"
    assert base58.encode(bytes.fromhex("0000287fb4cd")) == "11233QC4"


def test_signatures_hold_for_one_signer_message_and_context() -> None:
    own = Identity.generate()
    signature = own.sign(b"receipt", b"message")
    identity.verify(own.public_key_bytes, b"receipt", b"message", signature)
    identity.verify(own.peer_id, b"receipt", b"message", signature)
    foreign = Identity.generate()
    flipped = bytes([signature[0] ^ 1]) + signature[1:]
    for signer, context, message, claimed in (
        (foreign.peer_id, b"receipt", b"message", signature),
        (own.peer_id, b"voucher", b"message", signature),
        (own.peer_id, b"receip", b"tmessage", signature),
        (own.peer_id, b"receipt", b"massage", signature),
        (own.peer_id, b"receipt", b"message", flipped),
        (own.peer_id, b"receipt", b"message", signature[:-1]),
        (own.peer_id, b"receipt", b"message", b""),
    ):
        with pytest.raises(ProtocolError):
            identity.verify(signer, context, message, claimed)


@pytest.mark.parametrize("context", [b"", bytes(256)])
def test_a_signature_needs_a_context(context: bytes) -> None:
    with pytest.raises(ValueError, match="context"):
        Identity.generate().sign(context, b"message")


def test_the_key_does_not_show() -> None:
    own = Identity.generate()
    assert own.private_key.private_bytes_raw().hex() not in repr(own)
    assert str(own.private_key.private_bytes_raw()) not in repr(own)
    assert "private_key" not in repr(own)


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "identity.key"
    created = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert Identity.load(path) == created
    assert Identity.load_or_create(path).peer_id == created.peer_id
    with pytest.raises(FileExistsError):
        Identity.generate().save(path)
    assert Identity.load(path) == created


def test_the_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        Identity.generate().save(tmp_path / "new" / "identity.key")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "new" / "identity.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o602, 0o610, 0o601])
def test_a_key_file_that_others_can_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    Identity.generate().save(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        Identity.load_or_create(path)


def test_damaged_key_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    Identity.generate().save(path)
    content = path.read_bytes()
    for damaged in (
        b"",
        content[:-1],
        content + b"\0",
        b"\x08\x00" + content[2:],
        content[:-1] + bytes([content[-1] ^ 1]),
        bytes(1000),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError):
            Identity.load(path)


def test_a_missing_key_file_is_a_plain_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Identity.load(tmp_path / "missing.key")
    with pytest.raises(ConfigError):
        Identity.load(tmp_path)


def test_a_directory_that_cannot_be_made_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError):
        Identity.load_or_create(tmp_path / "file" / "identity.key")
    with pytest.raises(ConfigError):
        Identity.load_or_create(tmp_path / "file" / "deeper" / "identity.key")


def test_libp2p_reads_our_key_file(tmp_path: Path) -> None:
    own = Identity.generate()
    own.save(tmp_path / "identity.key")
    libp2p = _libp2p_key_messages()
    key = libp2p.PrivateKey.FromString((tmp_path / "identity.key").read_bytes())
    assert key.key_type == libp2p.KeyType.Ed25519
    assert key.data == own.private_key.private_bytes_raw() + own.public_key_bytes
    public_key = libp2p.PublicKey(key_type=libp2p.KeyType.Ed25519, data=own.public_key_bytes)
    encoded = public_key.SerializeToString()
    assert base58.encode(bytes([0, len(encoded)]) + encoded) == own.peer_id


def _libp2p_key_messages() -> ModuleType:
    """hivemind's generated protobuf module by its path: the package itself would import torch."""
    package = importlib.util.find_spec("hivemind")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "proto" / "crypto_pb2.py"
    spec = importlib.util.spec_from_file_location("libp2p_key_messages", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
