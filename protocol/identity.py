"""Who a peer is: one Ed25519 key. The libp2p peer id is the public key, in another notation.

The same key authenticates the peer's streams (libp2p does that), and signs its directory records.
Signatures are domain separated: one made for one purpose is worth nothing for another.

Public keys of peers are refused when they are of small order or not canonically encoded: for such
keys signatures verify that nobody made, or one peer has several ids.
"""

from __future__ import annotations

import os
import shlex
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import NewType

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from swarm.protocol import base58
from swarm.protocol.errors import ConfigError, ErrorCode, ProtocolError

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58: ``12D3KooW...``."""

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
SEED_BYTES = 32

PEER_ID_PREFIX = bytes.fromhex("002408011220")
"""Multihash "identity" of 36 bytes: a protobuf PublicKey with type Ed25519 and 32 bytes of key."""
KEY_FILE_PREFIX = bytes.fromhex("08011240")
"""Protobuf PrivateKey: field 1 (type) is 1 = Ed25519, field 2 has 64 bytes: seed, public key."""
KEY_FILE_BYTES = len(KEY_FILE_PREFIX) + SEED_BYTES + PUBLIC_KEY_BYTES

SIGNATURE_DOMAIN = b"sovereign-swarm signature v1\0"

FIELD_PRIME = 2**255 - 19
SMALL_ORDER_Y = frozenset(
    {
        0,
        1,
        FIELD_PRIME - 1,
        int.from_bytes(
            bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
            "little",
        ),
        int.from_bytes(
            bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
            "little",
        ),
    }
)
"""The y coordinates of the 8 points of small order; each is refused with either sign of x."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Our own key. ``save`` and ``load`` use the file format that libp2p's daemon reads."""

    private_key: Ed25519PrivateKey = field(repr=False, compare=False)
    public_key_bytes: bytes = field(init=False)
    peer_id: PeerId = field(init=False)

    def __post_init__(self) -> None:
        public_key_bytes = self.private_key.public_key().public_bytes_raw()
        object.__setattr__(self, "public_key_bytes", public_key_bytes)
        object.__setattr__(self, "peer_id", peer_id_from_public_key(public_key_bytes))

    @classmethod
    def generate(cls) -> Identity:
        """A new random identity, not yet on disk."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: str | Path) -> Identity:
        """Read a key file. Raises ConfigError if it is missing, malformed or readable by others."""
        return cls(_parse_key_file(_read_private_file(Path(path)), Path(path)))

    @classmethod
    def load_or_create(cls, path: str | Path) -> Identity:
        """Read the key file, or make a new identity and save it there. Raises ConfigError."""
        identity = cls.generate()
        try:
            identity.save(path)
        except FileExistsError:
            return cls.load(path)
        except OSError as error:
            raise ConfigError(f"cannot create the key file {path}: {error.strerror}") from error
        return identity

    def save(self, path: str | Path) -> None:
        """Create a key file with mode 0600. Raises FileExistsError rather than overwrite a key."""
        path = Path(path)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # exclusive and private from its first moment: there is no window in which others can read
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                seed = self.private_key.private_bytes_raw()
                file.write(KEY_FILE_PREFIX + seed + self.public_key_bytes)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)  # half a key would block the next start
            raise

    def sign(self, context: bytes, message: bytes) -> bytes:
        """Signature (64 bytes) over ``message`` for one purpose, named by ``context``."""
        return self.private_key.sign(_signed_bytes(context, message))


def verify(signer: bytes | PeerId, context: bytes, message: bytes, signature: bytes) -> None:
    """Check a signature by a public key (32 bytes) or peer id. Raises ProtocolError(BAD_FIELD)."""
    if isinstance(signer, bytes):
        check_public_key(signer)
        public_key_bytes = signer
    else:
        public_key_bytes = public_key_from_peer_id(signer)
    try:
        public_key = Ed25519PublicKey.from_public_bytes(public_key_bytes)
        public_key.verify(signature, _signed_bytes(context, message))
    except (InvalidSignature, ValueError) as error:
        raise ProtocolError(ErrorCode.BAD_FIELD, "the signature is wrong") from error


def check_public_key(public_key_bytes: bytes) -> None:
    """Raise ProtocolError(BAD_FIELD) for a wrong length, a non-canonical or small-order point."""
    if len(public_key_bytes) != PUBLIC_KEY_BYTES:
        raise ProtocolError(ErrorCode.BAD_FIELD, "a public key has 32 bytes")
    y = int.from_bytes(public_key_bytes, "little") & (2**255 - 1)  # the top bit is the sign of x
    if y >= FIELD_PRIME:
        raise ProtocolError(ErrorCode.BAD_FIELD, "the public key is not canonically encoded")
    if y in SMALL_ORDER_Y:
        raise ProtocolError(ErrorCode.BAD_FIELD, "the public key is of small order")


def peer_id_from_public_key(public_key_bytes: bytes) -> PeerId:
    """Raises ProtocolError(BAD_FIELD) for a key that ``check_public_key`` refuses."""
    check_public_key(public_key_bytes)
    return PeerId(base58.encode(PEER_ID_PREFIX + public_key_bytes))


def public_key_from_peer_id(peer_id: str) -> bytes:
    """The 32 bytes of an Ed25519 peer id; any other id raises ProtocolError(BAD_FIELD)."""
    try:
        decoded = base58.decode(peer_id)
    except ValueError as error:
        raise ProtocolError(ErrorCode.BAD_FIELD, "the peer id is not base58") from error
    if not decoded.startswith(PEER_ID_PREFIX):
        raise ProtocolError(ErrorCode.BAD_FIELD, "the peer id is not that of an Ed25519 key")
    public_key_bytes = decoded[len(PEER_ID_PREFIX) :]
    check_public_key(public_key_bytes)
    return public_key_bytes


def _signed_bytes(context: bytes, message: bytes) -> bytes:
    if not 1 <= len(context) <= 255:
        raise ValueError("a signature context has 1 to 255 bytes")
    return SIGNATURE_DOMAIN + bytes([len(context)]) + context + message


def _read_private_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{path} is no regular file; give the path of a key file")
            if stat.S_IMODE(status.st_mode) & 0o077:
                raise ConfigError(
                    f"others may read or write the key file {path}; run:"
                    f" chmod 600 {shlex.quote(str(path))}"
                )
            return file.read(KEY_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the key file {path}: {error.strerror}") from error


def _parse_key_file(content: bytes, path: Path) -> Ed25519PrivateKey:
    if len(content) != KEY_FILE_BYTES or not content.startswith(KEY_FILE_PREFIX):
        raise ConfigError(f"{path} is no libp2p Ed25519 key file; move it away to get a new key")
    seed = content[len(KEY_FILE_PREFIX) :][:SEED_BYTES]
    private_key = Ed25519PrivateKey.from_private_bytes(seed)
    if private_key.public_key().public_bytes_raw() != content[-PUBLIC_KEY_BYTES:]:
        raise ConfigError(f"the two halves of the key file {path} do not belong together")
    return private_key
