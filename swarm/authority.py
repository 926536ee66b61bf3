"""A swarm's authority: a folder with its key, its charter and the books of what it issued.

::

    authority.key      who it is; keep it off computers that serve others
    charter.swarm      as published
    issued.jsonl       every certificate and invitation, a line each
    revoked.jsonl      serials that are worth nothing any more
    redeemed.jsonl     who exchanged which invitation
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from swarm.membership_files import CHARTER, InvitationText, read_file, write_file
from swarm.protocol.errors import ConfigError, ErrorCode, ProtocolError, UsageError
from swarm.protocol.identity import Identity, PeerId, public_key_from_peer_id
from swarm.protocol.messages import SWARM_ID_BYTES
from swarm.protocol.passport import (
    MAX_REVOCATION_PAGES,
    MAX_REVOKED_PER_PAGE,
    SERIAL_BYTES,
    AdmissionMode,
    Certificate,
    CertificateKind,
    Charter,
    Invitation,
    RevocationPage,
    Tier,
    join_chain,
    open_charter,
    seal,
    split_chain,
    unseal,
)

DAY_S = 24 * 3600
BACKDATED_S = 300
"""Clocks differ: a certificate is valid from a little before it was made."""


class Authority:
    """The folder of an authority, or of an organisation that issues passports by its own key."""

    def __init__(self, folder: Path, identity: Identity, sealed_charter: bytes) -> None:
        self.folder = folder
        self.identity = identity
        self.sealed_charter = sealed_charter
        self.charter = open_charter(sealed_charter)

    @classmethod
    def found(cls, folder: Path, charter: Charter) -> Authority:
        """Begin a swarm: makes the key, and signs the charter with it. Raises ConfigError."""
        if (folder / "charter.swarm").exists():
            raise ConfigError(f"{folder} has a charter already")
        identity = Identity.load_or_create(folder / "authority.key")
        charter = replace(
            charter,
            swarm_id=secrets.token_bytes(SWARM_ID_BYTES),
            version=1,
            authorities=(identity.peer_id, *charter.authorities),
            issued_unix_s=int(time.time()),
        )
        sealed = seal(identity, charter.swarm_id, charter)
        write_file(CHARTER, folder / "charter.swarm", sealed)
        return cls(folder, identity, sealed)

    @classmethod
    def open(cls, folder: Path) -> Authority:
        """Raises ConfigError."""
        sealed = read_file(CHARTER, folder / "charter.swarm")
        try:
            return cls(folder, Identity.load(folder / "authority.key"), sealed)
        except ProtocolError as error:
            raise ConfigError(f"{folder}: the charter is not valid: {error.detail}") from error

    @property
    def _issuer_chain(self) -> tuple[bytes, ...]:
        """What stands before our certificates; empty for the authority itself."""
        file = self.folder / "issuer.swarm"
        if not file.exists():
            return ()
        return tuple(split_chain(read_file("swarm-passport", file)))

    def amend(self, **changes: Any) -> Charter:
        """A later version of the charter."""
        charter = replace(
            self.charter,
            version=self.charter.version + 1,
            issued_unix_s=int(time.time()),
            **changes,
        )
        self.sealed_charter = seal(self.identity, charter.swarm_id, charter)
        self.charter = charter
        write_file(CHARTER, self.folder / "charter.swarm", self.sealed_charter)
        return charter

    def issue(
        self,
        peer: PeerId,
        *,
        organisation: str = "",
        country: str = "",
        tier: Tier = Tier.REGISTERED,
        days: float = 365.0,
        may_issue: bool = False,
        invited: bool = False,
    ) -> bytes:
        """A passport for a peer, or with ``may_issue`` a certificate for an issuer."""
        now_unix_s = time.time()
        certificate = Certificate(
            serial=secrets.token_bytes(SERIAL_BYTES),
            kind=CertificateKind.ISSUER if may_issue else CertificateKind.PEER,
            subject=public_key_from_peer_id(peer),
            issuer=self.identity.public_key_bytes,
            tier=tier,
            not_before_unix_s=int(now_unix_s) - BACKDATED_S,
            expires_unix_s=int(now_unix_s + days * DAY_S),
            organisation=organisation,
            country=country,
            invited=invited,
        )
        sealed = seal(self.identity, self.charter.swarm_id, certificate)
        passport = join_chain(*self._issuer_chain, sealed)
        self._note(
            "issued",
            {
                "serial": certificate.serial.hex(),
                "kind": "issuer" if may_issue else "peer",
                "peer": peer,
                "organisation": organisation,
                "country": country,
                "tier": tier.name.lower(),
                "expires_unix_s": certificate.expires_unix_s,
                "invited": invited,
            },
        )
        return passport

    def invite(
        self,
        addresses: Sequence[str],
        *,
        count: int = 1,
        days: float = 7.0,
        passport_days: int = 365,
        tier: Tier = Tier.REGISTERED,
        organisation: str = "",
        country: str = "",
    ) -> InvitationText:
        """An invitation that is exchanged at the desk of this authority, at these addresses."""
        if self.charter.admission is AdmissionMode.MEMBERS:
            raise UsageError("this swarm admits members only: issue passports instead")
        invitation = Invitation(
            serial=secrets.token_bytes(SERIAL_BYTES),
            count=count,
            expires_unix_s=int(time.time() + days * DAY_S),
            tier=tier,
            passport_days=passport_days,
            organisation=organisation,
            country=country,
        )
        sealed = seal(self.identity, self.charter.swarm_id, invitation)
        self._note(
            "issued",
            {
                "serial": invitation.serial.hex(),
                "kind": "invitation",
                "count": count,
                "tier": tier.name.lower(),
                "expires_unix_s": invitation.expires_unix_s,
            },
        )
        return InvitationText(self.sealed_charter, sealed, self.identity.peer_id, tuple(addresses))

    def redeem(self, sealed_invitation: bytes, peer: PeerId) -> bytes:
        """A passport for an invitation of ours. Raises ProtocolError(INVITATION_USED_UP).

        A peer that asks again gets another passport without using the invitation up further.
        """
        refusal = ProtocolError(ErrorCode.INVITATION_USED_UP)
        try:
            invitation, signer = unseal(Invitation, self.charter.swarm_id, sealed_invitation)
        except ProtocolError as error:
            raise refusal from error
        serial = invitation.serial.hex()
        if (
            signer != self.identity.peer_id
            or invitation.expires_unix_s <= time.time()
            or serial in self.revoked()
            or self.charter.admission is AdmissionMode.MEMBERS
        ):
            raise refusal
        known = {line["peer"] for line in self._lines("redeemed") if line["serial"] == serial}
        if peer not in known:
            if len(known) >= invitation.count:
                raise refusal
            self._note("redeemed", {"serial": serial, "peer": peer})
        return self.issue(
            peer,
            organisation=invitation.organisation,
            country=invitation.country,
            tier=invitation.tier,
            days=invitation.passport_days,
            invited=True,
        )

    def revoke(self, wanted: str) -> list[str]:
        """Revoke by serial, peer id or organisation; returns the serials. Raises UsageError."""
        serials = [
            line["serial"]
            for line in self._lines("issued")
            if wanted in (line["serial"], line.get("peer"), line.get("organisation"))
            and line["serial"] not in self.revoked()
        ]
        if not serials:
            raise UsageError(f"nothing valid was issued for {wanted!r}")
        for serial in serials:
            self._note("revoked", {"serial": serial, "unix_s": int(time.time())})
        return serials

    def revoked(self) -> dict[str, int]:
        """Serials, and when they were revoked."""
        return {line["serial"]: line["unix_s"] for line in self._lines("revoked")}

    def issued(self) -> list[dict[str, Any]]:
        """Everything that was issued, with whether it was revoked."""
        revoked = self.revoked()
        return [line | {"revoked": line["serial"] in revoked} for line in self._lines("issued")]

    def revocation_pages(self) -> list[bytes]:
        """The list as peers pass it on; certificates that have expired need not stand in it."""
        now_unix_s = time.time()
        expires = {line["serial"]: line["expires_unix_s"] for line in self._lines("issued")}
        revoked = self.revoked()
        serials = [s for s in revoked if expires.get(s, now_unix_s + 1) > now_unix_s]
        if len(serials) > MAX_REVOCATION_PAGES * MAX_REVOKED_PER_PAGE:
            raise UsageError("too many certificates are revoked: found the swarm anew")
        pages = max(1, -(-len(serials) // MAX_REVOKED_PER_PAGE))
        return [
            seal(
                self.identity,
                self.charter.swarm_id,
                RevocationPage(
                    number=len(revoked) + 1,
                    page=page,
                    pages=pages,
                    issued_unix_s=int(now_unix_s),
                    serials=tuple(
                        bytes.fromhex(serial)
                        for serial in serials[
                            page * MAX_REVOKED_PER_PAGE : (page + 1) * MAX_REVOKED_PER_PAGE
                        ]
                    ),
                ),
            )
            for page in range(pages)
        ]

    def _lines(self, book: str) -> list[dict[str, Any]]:
        try:
            text = (self.folder / f"{book}.jsonl").read_text("utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines() if line.strip()]

    def _note(self, book: str, line: dict[str, Any]) -> None:
        """On the disk before anybody is told."""
        descriptor = os.open(
            self.folder / f"{book}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
        )
        try:
            os.write(descriptor, json.dumps(line).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
