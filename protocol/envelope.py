"""Signed objects in DSSE envelopes: payload type, exact bytes, one or several signatures.

A signature is Ed25519 over ``PAE(type, payload)``, as in the DSSE specification, so that other
programs can verify what peers of this swarm sign. The payload type separates the purposes: what was
signed as one kind of object is worth nothing as another.

As a file or evidence an envelope is DSSE's JSON; on streams its payload and signature travel as
byte strings of a message and the type follows from the message.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from swarm.protocol.errors import DecodeError, ErrorCode, ProtocolError
from swarm.protocol.identity import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, check_public_key
from swarm.protocol.strict_json import MAX_OBJECT_BYTES

MAX_SIGNATURES = 8
MAX_TYPE_LENGTH = 128
MAX_ENVELOPE_BYTES = 2 * MAX_OBJECT_BYTES + 512 * MAX_SIGNATURES


@dataclass(frozen=True, slots=True)
class Signature:
    """Who signed (32 bytes of public key) and the 64 bytes. Nothing is checked yet."""

    public_key: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Envelope:
    """Payload and signatures as they came; ``require_signatures`` checks them."""

    payload_type: str
    payload: bytes
    signatures: tuple[Signature, ...]

    def signers(self) -> frozenset[bytes]:
        """The keys whose signatures hold; a wrong one raises ProtocolError(BAD_SIGNATURE).

        Keys of small order and keys that are not canonical are refused with BAD_FIELD.
        """
        signed = pae(self.payload_type, self.payload)
        for each in self.signatures:
            verify_bytes(each.public_key, signed, each.signature)
        return frozenset(each.public_key for each in self.signatures)

    def require_signatures(self, *public_keys: bytes) -> None:
        """Raise ProtocolError(BAD_SIGNATURE) unless each of these keys signed, and all hold."""
        if not self.signers().issuperset(public_keys) or not public_keys:
            raise ProtocolError(ErrorCode.BAD_SIGNATURE, "not signed by whom it should be")

    def to_json(self) -> str:
        """DSSE's JSON; key ids are public keys in hexadecimal."""
        return json.dumps(
            {
                "payload": base64.b64encode(self.payload).decode("ascii"),
                "payloadType": self.payload_type,
                "signatures": [
                    {
                        "keyid": each.public_key.hex(),
                        "sig": base64.b64encode(each.signature).decode("ascii"),
                    }
                    for each in self.signatures
                ],
            },
            separators=(",", ":"),
        )


def seal(payload_type: str, payload: bytes, keys: Iterable[Ed25519PrivateKey]) -> Envelope:
    """Sign ``payload`` by each of ``keys``."""
    signed = pae(payload_type, payload)
    signatures = tuple(
        Signature(key.public_key().public_bytes_raw(), key.sign(signed)) for key in keys
    )
    return Envelope(payload_type, payload, signatures)


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed."""
    kind = payload_type.encode("ascii")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def verify_bytes(public_key: bytes, signed: bytes, signature: bytes) -> None:
    """Raises ProtocolError: BAD_FIELD for a key that must not be used, BAD_SIGNATURE."""
    try:
        _key(public_key).verify(signature, signed)
    except InvalidSignature as error:
        raise ProtocolError(ErrorCode.BAD_SIGNATURE) from error


@lru_cache(maxsize=1024)
def _key(public_key: bytes) -> Ed25519PublicKey:
    """A checked key. Making one costs as much as a tenth of a verification."""
    check_public_key(public_key)
    try:
        return Ed25519PublicKey.from_public_bytes(public_key)
    except ValueError as error:
        raise ProtocolError(ErrorCode.BAD_FIELD, "no public key") from error


def parse_envelope(data: bytes | str) -> Envelope:
    """Read an envelope's JSON. Raises DecodeError(BAD_FIELD); signatures are not yet checked."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if len(raw) > MAX_ENVELOPE_BYTES:
        raise _refused("too long")
    try:
        content = json.loads(raw.decode("ascii"), object_pairs_hook=_pairs)
        if set(content) != {"payload", "payloadType", "signatures"}:
            raise ValueError("unknown or missing fields")
        payload_type = content["payloadType"]
        if not isinstance(payload_type, str) or not 0 < len(payload_type) <= MAX_TYPE_LENGTH:
            raise ValueError("payloadType")
        signatures = content["signatures"]
        if not isinstance(signatures, list) or not 1 <= len(signatures) <= MAX_SIGNATURES:
            raise ValueError("signatures")
        return Envelope(
            payload_type, _base64(content["payload"]), tuple(map(_signature, signatures))
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise _refused("no envelope") from error


def _signature(content: Any) -> Signature:
    if not isinstance(content, dict) or set(content) != {"keyid", "sig"}:
        raise ValueError("a signature has a keyid and a sig")
    key_id = content["keyid"]
    if not isinstance(key_id, str) or key_id != key_id.lower():
        raise ValueError("keyid")
    public_key, signature = bytes.fromhex(key_id), _base64(content["sig"])
    if len(public_key) != PUBLIC_KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        raise ValueError("sizes of a signature")
    if public_key.hex() != key_id:
        raise ValueError("keyid")
    return Signature(public_key, signature)


def _base64(content: Any) -> bytes:
    """Strictly: what decodes must encode to the same text, or one object has many names."""
    if not isinstance(content, str):
        raise ValueError("no text")
    try:
        decoded = base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError("no base64") from error
    if base64.b64encode(decoded).decode("ascii") != content:
        raise ValueError("not canonical base64")
    return decoded


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _refused(detail: str) -> DecodeError:
    return DecodeError(ErrorCode.BAD_FIELD, f"envelope: {detail}")
