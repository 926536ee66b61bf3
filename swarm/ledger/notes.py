"""Checkpoints of the log as signed notes, and their cosignatures by witnesses.

Formats of C2SP: signed-note, tlog-checkpoint, tlog-cosignature (Ed25519, version 1), tlog-proof.
Other implementations of these read what we write. Everything parsed here may come from anybody.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.identity import SIGNATURE_BYTES, check_public_key
from swarm.protocol.merkle import check_inclusion

HASH_BYTES = 32
MAX_NOTE_BYTES = 8192
MAX_SIGNATURES = 32
MAX_NAME_LENGTH = 255
KEY_ID_BYTES = 4
TIME_BYTES = 8
MAX_PROOF_HASHES = 63
"""Trees are not higher than this; longer proofs are refused unread."""
PROOF_HEADER = "c2sp.org/tlog-proof@v1"
SIGNATURE_PREFIX = "\u2014 "


class KeyType(IntEnum):
    """How a key signs; part of its id, so that one key may serve both without confusion."""

    NOTE = 1
    COSIGNATURE = 4


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """A public key with a name, in text ``name+id+base64``."""

    name: str
    key_type: KeyType
    public_key_bytes: bytes

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= MAX_NAME_LENGTH or any(
            character == "+" or character.isspace() or ord(character) < 0x20
            for character in self.name
        ):
            raise _malformed("the name of a key is 1 to 255 characters without spaces and plus")
        check_public_key(self.public_key_bytes)

    @property
    def key_id(self) -> bytes:
        signed = self.name.encode() + b"\n" + bytes([self.key_type]) + self.public_key_bytes
        return sha256(signed).digest()[:KEY_ID_BYTES]

    def __str__(self) -> str:
        material = bytes([self.key_type]) + self.public_key_bytes
        return f"{self.name}+{self.key_id.hex()}+{base64.b64encode(material).decode()}"

    @classmethod
    def parse(cls, text: str) -> VerifierKey:
        """Raises ProtocolError(BAD_FIELD) for anything that is not exactly a verifier key."""
        name, _, rest = text.partition("+")
        key_id, _, encoded = rest.partition("+")
        material = _from_base64(encoded)
        if len(material) != 33 or material[0] not in list(KeyType):
            raise _malformed("the key is no Ed25519 verifier key")
        key = cls(name, KeyType(material[0]), material[1:])
        if str(key) != text:
            raise _malformed(f"the id of the verifier key is not {key_id[:8]!r}")
        return key


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log says of itself: so many leaves, under this root."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """Extension lines after the third are signed, but say nothing to us."""
        lines = text.split("\n")
        if len(lines) < 4 or lines[-1] or not lines[0]:
            raise _malformed("a checkpoint has three lines")
        root = _from_base64(lines[2])
        if len(root) != HASH_BYTES:
            raise _malformed("the root of a checkpoint has 32 bytes")
        return cls(lines[0], decimal(lines[1]), root)


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature line of a note; ``blob`` is what follows the key's id."""

    name: str
    key_id: bytes
    blob: bytes

    @property
    def line(self) -> str:
        encoded = base64.b64encode(self.key_id + self.blob).decode()
        return f"{SIGNATURE_PREFIX}{self.name} {encoded}\n"

    @property
    def time_unix_s(self) -> int:
        """When a witness cosigned; only meaningful for cosignatures."""
        return int.from_bytes(self.blob[:TIME_BYTES], "big")

    def is_by(self, key: VerifierKey) -> bool:
        return self.name == key.name and self.key_id == key.key_id


@dataclass(frozen=True, slots=True)
class Note:
    """Text with signatures, none of them checked yet."""

    text: str
    signatures: tuple[Signature, ...]

    def __str__(self) -> str:
        return self.text + "\n" + "".join(signature.line for signature in self.signatures)

    @classmethod
    def parse(cls, note: str) -> Note:
        """Raises ProtocolError(BAD_FIELD); bounded by MAX_NOTE_BYTES and MAX_SIGNATURES."""
        if len(note.encode(errors="replace")) > MAX_NOTE_BYTES or any(
            ord(character) < 0x20 and character != "\n" for character in note
        ):
            raise _malformed("a note is at most 8 kB of text without control characters")
        text, separator, signatures = note.rpartition("\n\n")
        if not separator:
            raise _malformed("a note has an empty line before its signatures")
        return cls(text + "\n", parse_signatures(signatures))

    def verified_by(self, keys: Iterable[VerifierKey]) -> list[Signature]:
        """The signatures by these keys, checked; one that is wrong spoils the note.

        Signatures by unknown keys are ignored. Raises ProtocolError(BAD_FIELD).
        """
        known = tuple(keys)
        verified = []
        for signature in self.signatures:
            for key in known:
                if signature.is_by(key):
                    _verify(self.text, signature, key)
                    verified.append(signature)
        return verified

    def with_signatures(self, signatures: Iterable[Signature]) -> Note:
        return Note(self.text, self.signatures + tuple(signatures))


def sign_note(text: str, key: Ed25519PrivateKey, name: str) -> Signature:
    """A signature of type 1, as logs make them."""
    verifier = VerifierKey(name, KeyType.NOTE, key.public_key().public_bytes_raw())
    return Signature(name, verifier.key_id, key.sign(text.encode()))


def cosign(text: str, key: Ed25519PrivateKey, name: str, time_unix_s: int) -> Signature:
    """A signature with a time, as witnesses make them after a check of consistency."""
    verifier = VerifierKey(name, KeyType.COSIGNATURE, key.public_key().public_bytes_raw())
    signed = key.sign(_cosigned(text, time_unix_s))
    return Signature(name, verifier.key_id, time_unix_s.to_bytes(TIME_BYTES, "big") + signed)


def parse_signatures(lines: str) -> tuple[Signature, ...]:
    """Signature lines, each with its newline. Raises ProtocolError(BAD_FIELD)."""
    if not lines.endswith("\n") or lines.count("\n") > MAX_SIGNATURES:
        raise _malformed("too many signatures, or half a line")
    signatures = []
    for line in lines[:-1].split("\n"):
        name, separator, encoded = line.removeprefix(SIGNATURE_PREFIX).partition(" ")
        blob = _from_base64(encoded)
        if not line.startswith(SIGNATURE_PREFIX) or not separator or not name:
            raise _malformed("a line is no signature")
        if len(blob) <= KEY_ID_BYTES:
            raise _malformed("a signature is too short")
        signatures.append(Signature(name, blob[:KEY_ID_BYTES], blob[KEY_ID_BYTES:]))
    return tuple(signatures)


@dataclass(frozen=True, slots=True)
class LogProof:
    """A proof that a leaf is in the log, that needs nothing but the leaf and trusted keys."""

    index: int
    hashes: tuple[bytes, ...]
    checkpoint: Note

    def __str__(self) -> str:
        hashes = "".join(base64.b64encode(digest).decode() + "\n" for digest in self.hashes)
        return f"{PROOF_HEADER}\nindex {self.index}\n{hashes}\n{self.checkpoint}"

    @classmethod
    def parse(cls, text: str) -> LogProof:
        head, separator, note = text.partition("\n\n")
        lines = head.split("\n")
        if not separator or lines[0] != PROOF_HEADER or len(lines) > MAX_PROOF_HASHES + 3:
            raise _malformed("this is no proof of version 1")
        if len(lines) > 1 and lines[1].startswith("extra "):
            del lines[1]
        if len(lines) < 2 or not lines[1].startswith("index "):
            raise _malformed("the proof names no index")
        return cls(
            decimal(lines[1].removeprefix("index ")),
            tuple(parse_hash(line) for line in lines[2:]),
            Note.parse(note),
        )

    def verify(
        self, leaf_digest: bytes, log: VerifierKey, witnesses: Sequence[VerifierKey] = ()
    ) -> int:
        """How many of ``witnesses`` cosigned. Raises ProtocolError if the leaf is not proven."""
        checkpoint = verified_checkpoint(self.checkpoint, log)
        check_inclusion(self.index, checkpoint.size, leaf_digest, self.hashes, checkpoint.root)
        return len({signature.key_id for signature in self.checkpoint.verified_by(witnesses)})


def verified_checkpoint(note: Note, log: VerifierKey) -> Checkpoint:
    """The checkpoint in a note that the log signed. Raises ProtocolError(BAD_FIELD)."""
    if not note.verified_by([log]):
        raise ProtocolError(ErrorCode.BAD_SIGNATURE, "the log has not signed the checkpoint")
    checkpoint = Checkpoint.parse(note.text)
    if checkpoint.origin != log.name:
        raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "the checkpoint is of another log")
    return checkpoint


def fresh_cosignatures(
    note: Note, witnesses: Mapping[bytes, VerifierKey], *, not_before_unix_s: int
) -> list[Signature]:
    """Cosignatures by known witnesses, by key id, that are not older than that. One per witness."""
    newest: dict[bytes, Signature] = {}
    for signature in note.verified_by(witnesses.values()):
        if signature.time_unix_s >= not_before_unix_s:
            newest[signature.key_id] = signature
    return [newest[key_id] for key_id in sorted(newest)]


def parse_hash(line: str) -> bytes:
    """32 bytes in base64. Raises ProtocolError(BAD_FIELD)."""
    digest = _from_base64(line)
    if len(digest) != HASH_BYTES:
        raise _malformed("a hash has 32 bytes")
    return digest


def decimal(text: str) -> int:
    """A number without sign and leading zeros, below 2^53. Raises ProtocolError(BAD_FIELD)."""
    if not (text.isascii() and text.isdigit() and len(text) <= 16) or str(int(text)) != text:
        raise _malformed("not a decimal number")
    return int(text)


def _verify(text: str, signature: Signature, key: VerifierKey) -> None:
    if key.key_type is KeyType.COSIGNATURE:
        message, signed = _cosigned(text, signature.time_unix_s), signature.blob[TIME_BYTES:]
    else:
        message, signed = text.encode(), signature.blob
    try:
        if len(signed) != SIGNATURE_BYTES:
            raise InvalidSignature
        Ed25519PublicKey.from_public_bytes(key.public_key_bytes).verify(signed, message)
    except (InvalidSignature, ValueError) as error:
        raise ProtocolError(ErrorCode.BAD_SIGNATURE, "a signature of the note is wrong") from error


def _cosigned(text: str, time_unix_s: int) -> bytes:
    return f"cosignature/v1\ntime {time_unix_s}\n{text}".encode()


def _from_base64(text: str) -> bytes:
    """Strict: one text for each byte string."""
    try:
        decoded = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _malformed("not base64") from error
    if base64.b64encode(decoded).decode() != text:
        raise _malformed("not canonical base64")
    return decoded


def _malformed(what: str) -> ProtocolError:
    return ProtocolError(ErrorCode.BAD_FIELD, what)
