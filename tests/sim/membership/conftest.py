"""Swarms with charters in memory, and peers with every kind of wrong credential."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from swarm.gate import Gate
from swarm.memory_network import MemoryNetwork, MemoryPeer, MemorySettings
from swarm.protocol.identity import Identity, PeerId, public_key_from_peer_id
from swarm.protocol.passport import (
    AdmissionMode,
    Certificate,
    CertificateKind,
    Charter,
    Passport,
    RevocationPage,
    Tier,
    join_chain,
    seal,
)
from swarm.virtual_time import STARTED_UNIX_S, LoopClock

DAY_S = 24 * 3600
NOW = int(STARTED_UNIX_S)
REVOKED = bytes([255]) * 8


class Careless(Gate):
    """The gate of somebody who checks nobody: what it shows is all that matters."""

    def check(self, peer: PeerId, passport: bytes, swarm_id: bytes) -> Passport | None:
        return None

    def admits(self, peer: PeerId) -> bool:
        return True


@dataclass
class Land:
    """An authority, and what it gives."""

    admission: AdmissionMode = AdmissionMode.MEMBERS
    swarm_id: bytes = bytes(range(32))

    def __post_init__(self) -> None:
        self.authority = Identity.generate()
        self.charter = Charter(self.swarm_id, 1, "Land", self.admission, (self.authority.peer_id,))
        self.sealed = seal(self.authority, self.swarm_id, self.charter)
        self.revoked = [REVOKED]
        self.issued = 0

    def certificate(self, peer: PeerId, **changes: Any) -> Certificate:
        self.issued += 1
        plain = Certificate(
            serial=self.issued.to_bytes(8, "big"),
            kind=CertificateKind.PEER,
            subject=public_key_from_peer_id(peer),
            issuer=self.authority.public_key_bytes,
            tier=Tier.REGISTERED,
            not_before_unix_s=NOW - DAY_S,
            expires_unix_s=NOW + DAY_S,
            organisation="University",
            country="KE",
        )
        return replace(plain, **changes)

    def passport(self, peer: PeerId, signer: Identity | None = None, **changes: Any) -> bytes:
        certificate = self.certificate(peer, **changes)
        return join_chain(seal(signer or self.authority, self.swarm_id, certificate))

    def pages(self, *serials: bytes, number: int = 1) -> list[bytes]:
        page = RevocationPage(number, 0, 1, NOW, serials)
        return [seal(self.authority, self.swarm_id, page)]

    def gate(self, peer: PeerId, passport: bytes, kind: type[Gate] = Gate) -> Gate:
        return kind(self.sealed, passport, peer, LoopClock())


@dataclass
class Town:
    """A memory network in which members meet; use inside of ``virtual_time.run``."""

    land: Land

    def __post_init__(self) -> None:
        self.network = MemoryNetwork(1, MemorySettings())

    def member(self, **certificate: Any) -> tuple[Identity, MemoryPeer]:
        identity = Identity.generate()
        passport = self.land.passport(identity.peer_id, **certificate)
        gate = self.land.gate(identity.peer_id, passport)
        gate.adopt_revocations(
            self.land.pages(*self.land.revoked, number=len(self.land.revoked) + 1)
        )
        return identity, self.network.join(identity, gate)

    def intruder(self, credential: str) -> tuple[Identity, MemoryPeer]:
        """A peer that checks nobody and shows this."""
        identity = Identity.generate()
        gate = credentials(self.land, identity)[credential]
        return identity, self.network.join(identity, gate)


def credentials(land: Land, identity: Identity) -> dict[str, Gate | None]:
    """Every kind of credential that must not help, and one that does."""
    peer, other = identity.peer_id, Identity.generate()
    elsewhere = Land(swarm_id=bytes(32))
    issuer = land.certificate(other.peer_id, kind=CertificateKind.ISSUER, country="TZ")
    no_issuer = land.certificate(other.peer_id)
    from_other = {"issuer": other.public_key_bytes}

    def chain(first: Certificate, **changes: Any) -> bytes:
        last = land.certificate(peer, **from_other, **changes)
        return join_chain(
            seal(land.authority, land.swarm_id, first), seal(other, land.swarm_id, last)
        )

    shown = {
        "none": b"",
        "garbage": b"\x91\xc4\x04junk",
        "unsigned": _unsigned(land, peer),
        "expired": land.passport(peer, expires_unix_s=NOW - 1),
        "not valid yet": land.passport(peer, not_before_unix_s=NOW + 3600),
        "revoked": land.passport(peer, serial=REVOKED),
        "forged": land.passport(peer, signer=identity),
        "signed by itself": land.passport(peer, signer=identity, issuer=identity.public_key_bytes),
        "of another peer": land.passport(other.peer_id),
        "by invitation": land.passport(peer, invited=True),
        "of an issuer": land.passport(peer, kind=CertificateKind.ISSUER),
        "by a member who may not issue": chain(no_issuer),
        "of a country beyond its issuer's": chain(issuer, country="KE"),
        "of a tier beyond its issuer's": chain(replace(issuer, country=""), tier=Tier.TRUSTED),
        "by a revoked issuer": chain(replace(issuer, serial=REVOKED, country="")),
        "valid": land.passport(peer),
        "valid, by an issuer": chain(replace(issuer, country="")),
    }
    gates: dict[str, Gate | None] = {
        name: land.gate(peer, passport, Careless) for name, passport in shown.items()
    }
    gates["of another swarm"] = elsewhere.gate(peer, elsewhere.passport(peer), Careless)
    stolen = land.gate(peer, elsewhere.passport(peer), Careless)
    gates["another swarm's passport under this charter"] = stolen
    gates["no charter"] = None
    return gates


def _unsigned(land: Land, peer: PeerId) -> bytes:
    sealed = bytearray(seal(land.authority, land.swarm_id, land.certificate(peer)))
    sealed[-64:] = bytes(64)
    return join_chain(bytes(sealed))


VALID = ("valid", "valid, by an issuer")
INVALID = tuple(name for name in credentials(Land(), Identity.generate()) if name not in VALID)


@pytest.fixture
def make_town() -> Callable[..., Town]:
    return lambda admission=AdmissionMode.MEMBERS: Town(Land(admission))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, values in (("bad_credential", INVALID), ("good_credential", VALID)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)
