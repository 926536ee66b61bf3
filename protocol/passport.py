"""Who may be in a swarm: its charter, passports, invitations and revocations.

A swarm's **authority** is one or several keys. Its **charter** says what the swarm is and whom it
admits. A **passport** is a chain of one or two certificates: the authority vouches for a peer, or
for an organisation that vouches for its peers. A **revocation list** takes certificates back. An
**invitation** is exchanged for a passport at a desk, a peer that may issue certificates.

All of them are small signed objects. A signature is over the swarm's id as well, so that nothing of
one swarm means anything in another. How they look in files: ``swarm.membership_files``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, TypeVar

import msgpack

from swarm.protocol.errors import DecodeError, ErrorCode, ProtocolError, UsageError
from swarm.protocol.identity import (
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
    Identity,
    PeerId,
    peer_id_from_public_key,
    public_key_from_peer_id,
    verify,
)
from swarm.protocol.messages import (
    MAX_PASSPORT_BYTES,
    MAX_STEP,
    PEER,
    SWARM_ID_BYTES,
    Array,
    Bytes,
    Text,
    Uint,
    wire,
)
from swarm.protocol.schema import Schema, unpack

SERIAL_BYTES = 8
MAX_CHAIN = 2
MAX_CHARTER_BYTES = 1536
MAX_REVOCATION_PAGE_BYTES = 1536
MAX_REVOKED_PER_PAGE = 128
MAX_REVOCATION_PAGES = 32
MAX_INVITATION_BYTES = 1024
COUNTRY_LETTERS = 2

COUNT = Uint(MAX_STEP)
SMALL_TEXT = Text(64)
SWARM_ID = Bytes(SWARM_ID_BYTES, SWARM_ID_BYTES)
SERIAL = Bytes(SERIAL_BYTES, SERIAL_BYTES)
KEY = Bytes(PUBLIC_KEY_BYTES, PUBLIC_KEY_BYTES)

T = TypeVar("T")


class AdmissionMode(IntEnum):
    """Whom a swarm admits."""

    OPEN = 1
    """Everybody; passports only matter for policies."""
    INVITED = 2
    """Who has a passport; desks give one for an invitation."""
    MEMBERS = 3
    """Who has a passport that was not got for an invitation."""


class Tier(IntEnum):
    """How much a swarm trusts a peer; the higher the more."""

    ANONYMOUS = 0
    REGISTERED = 1
    CERTIFIED = 2
    TRUSTED = 3


@dataclass(frozen=True, slots=True)
class Charter:
    """What a swarm is. A later one replaces it when an authority of the former has signed it."""

    swarm_id: bytes = wire(1, SWARM_ID)
    """Made at random when the swarm is founded; it never changes."""
    version: int = wire(2, COUNT)
    name: str = wire(3, SMALL_TEXT)
    admission: AdmissionMode = wire(4, Uint(255))
    authorities: tuple[str, ...] = wire(5, Array(PEER, 4))
    publishers: tuple[str, ...] = wire(6, Array(PEER, 8), ())
    """Whose manifests are believed; empty: everybody's."""
    operators: tuple[str, ...] = wire(7, Array(PEER, 4), ())
    """Whose allowances are worth something."""
    minimum_protocol_version: int = wire(8, Uint(65535), 0)
    minimum_software: str = wire(9, Text(32), "")
    """Older software refuses to join, and says that it must be updated."""
    issued_unix_s: int = wire(10, COUNT, 0)
    hub: bool = wire(11, Uint(1), True)
    """False: weights never come from outside of the swarm and its mirrors."""


class CertificateKind(IntEnum):
    PEER = 1
    ISSUER = 2
    """May sign certificates of peers, for its organisation and country, up to its tier."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """That ``issuer`` vouches for ``subject``."""

    serial: bytes = wire(1, SERIAL)
    kind: CertificateKind = wire(2, Uint(255))
    subject: bytes = wire(3, KEY)
    issuer: bytes = wire(4, KEY)
    tier: Tier = wire(5, Uint(255))
    not_before_unix_s: int = wire(6, COUNT)
    expires_unix_s: int = wire(7, COUNT)
    organisation: str = wire(8, SMALL_TEXT, "")
    country: str = wire(9, Text(COUNTRY_LETTERS), "")
    """ISO 3166-1 alpha-2 in capitals, empty when the issuer does not say."""
    invited: bool = wire(10, Uint(1), False)
    """Whether it was given for an invitation."""


@dataclass(frozen=True, slots=True)
class RevocationPage:
    """One page of the list of certificates that are worth nothing any more."""

    number: int = wire(1, COUNT)
    """Of the list; grows with each change. All pages of a list have the same."""
    page: int = wire(2, Uint(MAX_REVOCATION_PAGES - 1))
    pages: int = wire(3, Uint(MAX_REVOCATION_PAGES))
    issued_unix_s: int = wire(4, COUNT)
    serials: tuple[bytes, ...] = wire(5, Array(SERIAL, MAX_REVOKED_PER_PAGE), ())


@dataclass(frozen=True, slots=True)
class Invitation:
    """Exchanged for a passport at the desk that signed it, by so many peers until it expires."""

    serial: bytes = wire(1, SERIAL)
    count: int = wire(2, Uint(1_000_000))
    expires_unix_s: int = wire(3, COUNT)
    tier: Tier = wire(4, Uint(255))
    passport_days: int = wire(5, Uint(3660))
    organisation: str = wire(6, SMALL_TEXT, "")
    country: str = wire(7, Text(COUNTRY_LETTERS), "")


@dataclass(frozen=True, slots=True)
class Passport:
    """A checked chain: what a swarm's authority says of a peer."""

    peer_id: PeerId
    organisation: str
    country: str
    tier: Tier
    invited: bool
    expires_unix_s: int
    serials: tuple[bytes, ...]
    """Of all certificates of the chain; one of them revoked, and it is worth nothing."""

    @classmethod
    def of_authority(cls, peer_id: PeerId) -> Passport:
        """Authorities need none."""
        return cls(peer_id, "", "", Tier.TRUSTED, False, MAX_STEP, ())


_SCHEMAS: dict[type, Schema[Any]] = {
    kind: Schema(kind) for kind in (Charter, Certificate, RevocationPage, Invitation)
}
_CONTEXTS: dict[type, bytes] = {
    Charter: b"charter",
    Certificate: b"certificate",
    RevocationPage: b"revocations",
    Invitation: b"invitation",
}


# --- signed objects ------------------------------------------------------------------------------
def seal(identity: Identity, swarm_id: bytes, value: object) -> bytes:
    """``[payload, signer's public key, signature]`` in msgpack. Raises UsageError."""
    kind = type(value)
    payload: bytes = msgpack.packb(_SCHEMAS[kind].to_map(value))
    signature = identity.sign(_CONTEXTS[kind], swarm_id + payload)
    sealed: bytes = msgpack.packb([payload, identity.public_key_bytes, signature])
    return sealed


def unseal(kind: type[T], swarm_id: bytes, sealed: bytes) -> tuple[T, PeerId]:
    """A signed object and who signed it. Raises ProtocolError for anything else."""
    payload, signer, signature = _open(sealed)
    verify(signer, _CONTEXTS[kind], swarm_id + payload, signature)
    value: T = _SCHEMAS[kind].from_map(unpack(payload))
    return value, peer_id_from_public_key(signer)


def open_charter(sealed: bytes) -> Charter:
    """A charter that one of its own authorities signed. Raises ProtocolError(BAD_FIELD)."""
    if len(sealed) > MAX_CHARTER_BYTES:
        raise DecodeError(ErrorCode.BAD_FIELD, "the charter is too large")
    payload, signer, signature = _open(sealed)
    charter: Charter = _SCHEMAS[Charter].from_map(unpack(payload))
    verify(signer, _CONTEXTS[Charter], charter.swarm_id + payload, signature)
    if peer_id_from_public_key(signer) not in charter.authorities:
        raise DecodeError(ErrorCode.BAD_FIELD, "the charter is not signed by its authority")
    return charter


def succeeds(sealed: bytes, present: Charter) -> Charter | None:
    """The charter in ``sealed`` if it replaces ``present``; None if it does not. Never raises."""
    try:
        later = open_charter(sealed)
        _, signer, _ = _open(sealed)
        signed_by = peer_id_from_public_key(signer)
    except ProtocolError:
        return None
    if later.swarm_id != present.swarm_id or later.version <= present.version:
        return None
    return later if signed_by in present.authorities else None


def _open(sealed: bytes) -> tuple[bytes, bytes, bytes]:
    envelope = unpack(sealed)
    if (
        type(envelope) is not list
        or len(envelope) != 3
        or any(type(item) is not bytes for item in envelope)
        or len(envelope[1]) != PUBLIC_KEY_BYTES
        or len(envelope[2]) != SIGNATURE_BYTES
    ):
        raise DecodeError(ErrorCode.BAD_FIELD, "not a signed object")
    payload, signer, signature = envelope
    return payload, signer, signature


# --- passports -----------------------------------------------------------------------------------
def join_chain(*certificates: bytes) -> bytes:
    """Sealed certificates, the authority's first, as the bytes that peers show each other."""
    chain: bytes = msgpack.packb(list(certificates))
    if len(certificates) > MAX_CHAIN or len(chain) > MAX_PASSPORT_BYTES:
        raise UsageError("a passport is a chain of one or two certificates")
    return chain


def split_chain(passport: bytes) -> list[bytes]:
    """The sealed certificates of a passport. Raises ProtocolError(PASSPORT_INVALID)."""
    if len(passport) > MAX_PASSPORT_BYTES:
        raise _invalid("too large")
    try:
        chain = unpack(passport)
    except DecodeError as error:
        raise _invalid(error.detail) from error
    if (
        type(chain) is not list
        or not 1 <= len(chain) <= MAX_CHAIN
        or any(type(item) is not bytes for item in chain)
    ):
        raise _invalid("not a chain of certificates")
    return chain


def check_passport(
    passport: bytes,
    charter: Charter,
    holder: PeerId,
    *,
    now_unix_s: float,
    is_revoked: Callable[[bytes], bool] = lambda _: False,
) -> Passport:
    """What the swarm's authority says of ``holder``, who has shown these bytes.

    Raises ProtocolError: PASSPORT_MISSING for no bytes, PASSPORT_INVALID for a chain that is
    forged, of another swarm or of another peer, PASSPORT_EXPIRED (or not valid yet),
    PASSPORT_REVOKED.
    """
    if holder in charter.authorities:
        return Passport.of_authority(holder)
    if not passport:
        raise ProtocolError(ErrorCode.PASSPORT_MISSING)
    checked = _verified(passport, charter.swarm_id, frozenset(charter.authorities))
    if isinstance(checked, ProtocolError):
        raise ProtocolError(checked.code, checked.detail)
    certificates, result = checked
    if result.peer_id != holder:
        raise _invalid("it is the passport of another peer")
    if any(
        not certificate.not_before_unix_s <= now_unix_s < certificate.expires_unix_s
        for certificate in certificates
    ):
        raise ProtocolError(ErrorCode.PASSPORT_EXPIRED)
    if any(map(is_revoked, result.serials)):
        raise ProtocolError(ErrorCode.PASSPORT_REVOKED)
    if result.invited and charter.admission is AdmissionMode.MEMBERS:
        raise _invalid("this swarm admits nobody by invitation")
    return result


@lru_cache(maxsize=4096)
def _verified(
    passport: bytes, swarm_id: bytes, authorities: Collection[str]
) -> tuple[tuple[Certificate, ...], Passport] | ProtocolError:
    """The signatures of a chain, which time does not change; errors are remembered as well."""
    try:
        return _verify_chain(passport, swarm_id, authorities)
    except ProtocolError as error:
        return _invalid(error.detail)


def _verify_chain(
    passport: bytes, swarm_id: bytes, authorities: Collection[str]
) -> tuple[tuple[Certificate, ...], Passport]:
    chain = [unseal(Certificate, swarm_id, sealed) for sealed in split_chain(passport)]
    first, first_signer = chain[0]
    last, _ = chain[-1]
    if first_signer not in authorities:
        raise _invalid("not signed by the swarm's authority")
    for certificate, signer in chain:
        if public_key_from_peer_id(signer) != certificate.issuer:
            raise _invalid("not signed by its issuer")
    if last.kind is not CertificateKind.PEER:
        raise _invalid("the certificate is not one of a peer")
    if len(chain) == MAX_CHAIN:
        if first.kind is not CertificateKind.ISSUER or last.issuer != first.subject:
            raise _invalid("signed by somebody who may not issue passports")
        if last.tier > first.tier:
            raise _invalid("a higher tier than its issuer may give")
        if first.organisation and last.organisation != first.organisation:
            raise _invalid("another organisation than its issuer's")
        if first.country and last.country != first.country:
            raise _invalid("another country than its issuer's")
    return tuple(certificate for certificate, _ in chain), Passport(
        peer_id=peer_id_from_public_key(last.subject),
        organisation=last.organisation,
        country=last.country,
        tier=last.tier,
        invited=last.invited,
        expires_unix_s=min(certificate.expires_unix_s for certificate, _ in chain),
        serials=tuple(certificate.serial for certificate, _ in chain),
    )


def passport_hash(passport: bytes) -> bytes:
    """What a node's record names."""
    return hashlib.sha256(passport).digest() if passport else b""


def _invalid(detail: str) -> ProtocolError:
    return ProtocolError(ErrorCode.PASSPORT_INVALID, detail)
