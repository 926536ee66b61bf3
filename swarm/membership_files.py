"""Charters, passports and invitations as people pass them on: a line of text, in a file or mail.

``swarm-passport:`` and the bytes in base64url. What reads them checks them; here is only the form.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import time
from dataclasses import dataclass
from pathlib import Path

import msgpack

from swarm.gate import Gate
from swarm.ports import Clock
from swarm.protocol.errors import ERROR_TEXTS, ConfigError, DecodeError, ProtocolError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.passport import (
    MAX_CHARTER_BYTES,
    MAX_INVITATION_BYTES,
    MAX_REVOCATION_PAGES,
    Charter,
    Invitation,
    open_charter,
    unseal,
)
from swarm.protocol.schema import unpack
from swarm.protocol.version import software_version
from swarm.virtual_time import LoopClock

CHARTER = "swarm-charter"
PASSPORT = "swarm-passport"
INVITATION = "swarm-invitation"
MAX_TEXT_BYTES = 16 * 1024


def to_text(kind: str, content: bytes) -> str:
    """One line."""
    return f"{kind}:{base64.urlsafe_b64encode(content).decode('ascii')}"


def from_text(kind: str, text: str) -> bytes:
    """The bytes of a line. Raises ConfigError for anything else."""
    found, _, encoded = "".join(text.split()).partition(":")
    if found != kind:
        raise ConfigError(f"this is no {kind}: it should begin with {kind}:")
    try:
        return base64.b64decode(encoded, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"this {kind} is damaged") from error


def read_file(kind: str, path: Path) -> bytes:
    """The bytes that a file holds. Raises ConfigError."""
    try:
        with path.expanduser().open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > MAX_TEXT_BYTES:
        raise ConfigError(f"{path} is no {kind}")
    try:
        return from_text(kind, content.decode("ascii"))
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def write_file(kind: str, path: Path, content: bytes) -> None:
    """Replace a file. Raises ConfigError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_text(to_text(kind, content) + "\n", "ascii")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


class WallClock:
    """A clock for commands without an event loop; nobody waits by it."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)


@dataclass(frozen=True, slots=True)
class InvitationText:
    """All that somebody needs who was invited."""

    sealed_charter: bytes
    sealed_invitation: bytes
    desk: PeerId
    addresses: tuple[str, ...]
    """Of the desk."""

    def __str__(self) -> str:
        parts = [self.sealed_charter, self.sealed_invitation, list(self.addresses)]
        return to_text(INVITATION, msgpack.packb(parts))

    @classmethod
    def parse(cls, text: str) -> InvitationText:
        """Raises ConfigError."""
        try:
            parts = unpack(from_text(INVITATION, text))
            if not isinstance(parts, list) or len(parts) != 3:
                raise ConfigError("this invitation is damaged")
            charter, invitation, addresses = parts
            if (
                not isinstance(charter, bytes)
                or not isinstance(invitation, bytes)
                or not isinstance(addresses, list)
                or len(charter) > MAX_CHARTER_BYTES
                or len(invitation) > MAX_INVITATION_BYTES
                or not all(isinstance(item, str) for item in addresses)
            ):
                raise ConfigError("this invitation is damaged")
            swarm_id = open_charter(charter).swarm_id
            _, desk = unseal(Invitation, swarm_id, invitation)
        except DecodeError as error:
            raise ConfigError("this invitation is damaged") from error
        except ProtocolError as error:
            raise ConfigError(f"this invitation is not valid: {error.detail}") from error
        return cls(charter, invitation, desk, tuple(addresses))

    @property
    def charter(self) -> Charter:
        return open_charter(self.sealed_charter)


@dataclass(frozen=True, slots=True)
class MembershipFiles:
    """Where a peer keeps what it knows of its swarm."""

    charter: Path
    passport: Path
    revocations: Path

    @classmethod
    def of(
        cls, data_folder: Path, charter: Path | None = None, passport: Path | None = None
    ) -> MembershipFiles:
        """In ``data_folder``, where the owner names no others."""
        return cls(
            charter or data_folder / "charter.swarm",
            passport or data_folder / "passport.swarm",
            data_folder / "revocations.bin",
        )

    def gate(self, own_peer: PeerId, clock: Clock) -> Gate | None:
        """The gate of a peer; None when its swarm has no charter. Raises ConfigError."""
        charter_file = self.charter.expanduser()
        if not charter_file.exists():
            return None
        passport_file = self.passport.expanduser()
        passport = read_file(PASSPORT, passport_file) if passport_file.exists() else b""
        gate = Gate(read_file(CHARTER, charter_file), passport, own_peer, clock)
        gate.adopt_revocations(self._revocation_pages())
        wanted = gate.charter.minimum_software
        if wanted and _version(software_version()) < _version(wanted):
            raise ConfigError(
                f"{gate.charter.name} asks for version {wanted} of this software, and this is "
                f"{software_version()}: update it"
            )
        return gate

    def require(self, own_peer: PeerId, clock: Clock) -> Gate | None:
        """As ``gate``, and that we will be let in ourselves. Raises ConfigError."""
        gate = self.gate(own_peer, clock)
        if gate is None:
            return None
        try:
            passport = gate.own_passport()
        except ProtocolError as error:
            raise ConfigError(
                f"{self.passport}: {ERROR_TEXTS[error.code]}. This computer is {own_peer}"
            ) from error
        if passport is None and gate.enforces:
            raise ConfigError(
                f"{gate.charter.name} admits only peers with a passport: ask its authority for one "
                f"for {own_peer}, or for an invitation, and give what you get to the command accept"
            )
        return gate

    def accept(self, text: str, own_peer: PeerId, clock: Clock) -> str:
        """Keep a charter or a passport; says what it was. Raises ConfigError."""
        kind = text.strip().partition(":")[0]
        if kind == CHARTER:
            content = from_text(CHARTER, text)
            gate = Gate(content, b"", own_peer, clock)
            write_file(CHARTER, self.charter.expanduser(), content)
            return f"the charter of {gate.charter.name}"
        if kind != PASSPORT:
            raise ConfigError("give a text that begins with swarm-charter: or swarm-passport:")
        content = from_text(PASSPORT, text)
        gate = Gate(read_file(CHARTER, self.charter.expanduser()), content, own_peer, clock)
        try:
            passport = gate.own_passport()
        except ProtocolError as error:
            raise ConfigError(f"{ERROR_TEXTS[error.code]}; this computer is {own_peer}") from error
        write_file(PASSPORT, self.passport.expanduser(), content)
        of = f" of {passport.organisation}" if passport and passport.organisation else ""
        return f"a passport{of} in {gate.charter.name}"

    def keep(self, gate: Gate) -> None:
        """Remember charter and revocations for the next start. Raises ConfigError."""
        write_file(CHARTER, self.charter.expanduser(), gate.sealed_charter)
        path = self.revocations.expanduser()
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_bytes(msgpack.packb(list(gate.revocations.pages)))
            temporary.replace(path)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error

    async def redeem(self, text: str, identity_file: Path) -> str:
        """Exchange an invitation for a passport, and keep both. Raises SwarmErrors."""
        from swarm.enrolment import redeem_invitation
        from swarm.hivemind_network import HivemindNetwork, NetworkSettings

        invitation = InvitationText.parse(text)
        network = await HivemindNetwork.create(
            identity_file,
            NetworkSettings(listen_addresses=("/ip4/127.0.0.1/tcp/0",), serve_directory=False),
        )
        try:
            issued = await redeem_invitation(network, invitation)
        finally:
            await network.close()
        if open_charter(issued.charter).swarm_id != invitation.charter.swarm_id:
            raise ConfigError("the desk belongs to another swarm than its invitation")
        clock = LoopClock()
        self.accept(to_text(CHARTER, issued.charter), network.peer_id, clock)
        return self.accept(to_text(PASSPORT, issued.passport), network.peer_id, clock)

    def _revocation_pages(self) -> list[bytes]:
        try:
            with self.revocations.expanduser().open("rb") as file:
                pages = unpack(file.read(2048 * MAX_REVOCATION_PAGES))
        except (OSError, DecodeError):
            return []
        return (
            [page for page in pages if isinstance(page, bytes)] if isinstance(pages, list) else []
        )


def _version(text: str) -> tuple[int, ...]:
    """``1.10.2`` as numbers; what is no number ends it."""
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def accept_text(text_or_file: str, files: MembershipFiles, identity_file: Path) -> str:
    """Keep a charter or a passport, or exchange an invitation; says what it was.

    Blocks; not for use on an event loop. Raises SwarmErrors.
    """
    text = text_or_file
    if not text.startswith("swarm-"):
        try:
            text = Path(text).expanduser().read_text("ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {text_or_file}") from error
    own = Identity.load_or_create(identity_file)
    if text.startswith(f"{INVITATION}:"):
        return asyncio.run(files.redeem(text, identity_file))
    return files.accept(text, own.peer_id, WallClock())
