"""Signed notes: what others wrote is read, what we write is refused after any change."""

from __future__ import annotations

from contextlib import suppress

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from swarm.ledger.merkle_tree import MerkleTree
from swarm.ledger.notes import (
    Checkpoint,
    KeyType,
    LogProof,
    Note,
    VerifierKey,
    cosign,
    parse_signatures,
    sign_note,
    verified_checkpoint,
)
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.merkle import leaf_hash

LOG_KEY = Ed25519PrivateKey.from_private_bytes(b"\1" * 32)
WITNESS_KEY = Ed25519PrivateKey.from_private_bytes(b"\2" * 32)
LOG = VerifierKey("log.example/a", KeyType.NOTE, LOG_KEY.public_key().public_bytes_raw())
WITNESS = VerifierKey("w.example", KeyType.COSIGNATURE, WITNESS_KEY.public_key().public_bytes_raw())
TREE = MerkleTree(leaf_hash(b"%d" % number) for number in range(9))


def signed_proof(index: int = 3) -> LogProof:
    text = Checkpoint(LOG.name, 9, TREE.root()).text
    signatures = (
        sign_note(text, LOG_KEY, LOG.name),
        cosign(text, WITNESS_KEY, WITNESS.name, 1_800_000_000),
    )
    return LogProof(index, tuple(TREE.inclusion_proof(index)), Note(text, signatures))


def test_a_note_that_another_program_signed() -> None:
    """The example in the documentation of Go's golang.org/x/mod/sumdb/note."""
    key = VerifierKey.parse("PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
    note = Note.parse(
        "If you think cryptography is the answer to your problem,\n"
        "then you don't know what your problem is.\n"
        "\n"
        "\u2014 PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqf"
        "qdngotpRZb6KE6RyyBwJnAM=\n"
    )
    assert len(note.verified_by([key])) == 1
    assert str(Note.parse(str(note))) == str(note)


def test_a_proof_names_how_many_witnesses_saw_it() -> None:
    proof = LogProof.parse(str(signed_proof()))
    assert proof == signed_proof()
    assert proof.verify(leaf_hash(b"3"), LOG, [WITNESS]) == 1
    assert proof.verify(leaf_hash(b"3"), LOG) == 0
    assert proof.checkpoint.signatures[1].time_unix_s == 1_800_000_000


def test_a_proof_with_extra_data_is_read_without_it() -> None:
    header, rest = str(signed_proof()).split("\n", 1)
    assert LogProof.parse(f"{header}\nextra AAAA\n{rest}") == signed_proof()


@given(st.data())
def test_no_single_byte_may_change(data: st.DataObject) -> None:
    """What still verifies after a change says exactly the same."""
    original = str(signed_proof()).encode()
    position = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[position] ^= data.draw(st.integers(1, 255))
    try:
        proof = LogProof.parse(changed.decode())
        witnesses = proof.verify(leaf_hash(b"3"), LOG, [WITNESS])
    except (ProtocolError, UnicodeDecodeError):
        return
    # only the name or id of the witness's signature may be spoilt: it is then an unknown one
    assert witnesses == 0
    assert (proof.index, proof.hashes, proof.checkpoint.text) == (
        3,
        signed_proof().hashes,
        signed_proof().checkpoint.text,
    )


def test_checkpoints_of_other_logs_and_keys() -> None:
    other = VerifierKey("log.example/b", KeyType.NOTE, LOG.public_key_bytes)
    note = signed_proof().checkpoint
    with pytest.raises(ProtocolError) as refused:
        verified_checkpoint(note, other)
    assert refused.value.code is ErrorCode.BAD_SIGNATURE
    text = Checkpoint("log.example/b", 9, TREE.root()).text
    renamed = Note(text, (sign_note(text, LOG_KEY, LOG.name),))
    with pytest.raises(ProtocolError) as refused:
        verified_checkpoint(renamed, LOG)
    assert refused.value.code is ErrorCode.FOREIGN_OBJECT


def test_a_witness_key_signs_no_checkpoint() -> None:
    """The same key under the other type is another key."""
    as_log = VerifierKey(WITNESS.name, KeyType.NOTE, WITNESS.public_key_bytes)
    assert signed_proof().checkpoint.verified_by([as_log]) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\n",
        "a\n\n",
        "a\n\n\u2014 x\n",
        "a\n\n\u2014 x AAAA\n",
        "a\n\n- x AAAAAAAA\n",
        "a\n\n\u2014 x AAAAAAAA",
        "a\tb\n\n\u2014 x AAAAAAAA\n",
        "a\n\n" + "\u2014 x AAAAAAAA\n" * 33,
        "a" * 9000 + "\n\n\u2014 x AAAAAAAA\n",
    ],
)
def test_malformed_notes(text: str) -> None:
    with pytest.raises(ProtocolError):
        Note.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a+b+c",
        "log+00000000+AAAA",
        str(LOG)[:-4],
        str(LOG).replace(".", "!", 1),
        "+" + str(LOG),
    ],
)
def test_malformed_keys(text: str) -> None:
    with pytest.raises(ProtocolError):
        VerifierKey.parse(text)


@pytest.mark.parametrize("size", ["-1", "01", "1e3", " 1", "99999999999999999", "\u0661"])
def test_sizes_are_plain_decimals(size: str) -> None:
    with pytest.raises(ProtocolError):
        Checkpoint.parse(f"log\n{size}\n47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n")


@given(st.text(max_size=400))
def test_any_text_is_a_note_or_an_error(text: str) -> None:
    for parse in (
        Note.parse,
        Checkpoint.parse,
        LogProof.parse,
        VerifierKey.parse,
        parse_signatures,
    ):
        with suppress(ProtocolError):
            parse(text)
