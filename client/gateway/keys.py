"""API keys of a gateway: random, shown once, kept as hashes in one file.

A key is ``sk-swarm-ID-SECRET``. Its secret has 256 random bits, so that a plain SHA-256 protects it
as well as a slow hash would; whoever reads the file can use no key. The file is JSON, mode 0600,
replaced whole under a lock; several gateways may have copies of it. A running gateway reads it
again when it changes: a key revoked is refused from the next request on.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from swarm.protocol.errors import ConfigError, ProtocolError, UsageError
from swarm.protocol.policy import Policy

PREFIX = "sk-swarm-"
MAXIMUM_FILE_BYTES = 64 * 1024 * 1024
CHECK_PERIOD_S = 1.0
_KEY = re.compile(r"sk-swarm-([0-9a-f]{16})-([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True)
class Payer:
    """An account at the operator that pays for what a key uses."""

    account: str
    """Its peer id."""
    key_path: str
    """The file with its key, on the gateway's computer."""
    budget: str = ""
    """A budget that it may draw on; empty: its own credit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """What is kept of a key."""

    key_id: str
    secret_sha256: str
    name: str
    account: str = ""
    """The account that pays for what the key uses, by its peer id; empty: the gateway's own."""
    account_path: str = ""
    account_budget: str = ""
    created_unix_s: int = 0
    revoked_unix_s: int | None = None
    requests_per_minute: int | None = None
    """None: what the gateway's settings say; the same for the others."""
    tokens_per_minute: int | None = None
    answers: int | None = None
    policy: str = ""
    """Which nodes may see what the key asks, in canonical JSON; empty: those of the gateway."""

    @property
    def payer(self) -> Payer | None:
        """Who pays; None: the gateway's own account."""
        if not self.account_path:
            return None
        return Payer(self.account, self.account_path, self.account_budget)

    @property
    def session_policy(self) -> Policy | None:
        """Raises ConfigError for a policy that cannot be read: then the key is of no use."""
        if not self.policy:
            return None
        try:
            return Policy.from_bytes(self.policy.encode())
        except ProtocolError as error:
            raise ConfigError(f"the policy of key {self.key_id} cannot be read") from error


def make_key(
    name: str,
    *,
    payer: Payer | None = None,
    policy: Policy | None = None,
    **limits: int | None,
) -> tuple[ApiKey, str]:
    """A new key, and the text of it, which nobody can show again."""
    if not 1 <= len(name) <= 100 or not name.isprintable():
        raise UsageError("a key's name has 1 to 100 printable characters")
    for value in limits.values():
        if value is not None and value < 1:
            raise UsageError("limits of a key must be at least 1")
    key_id = secrets.token_hex(8)
    secret = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")
    key = ApiKey(
        key_id=key_id,
        secret_sha256=_hash(secret),
        name=name,
        account=payer.account if payer else "",
        account_path=payer.key_path if payer else "",
        account_budget=payer.budget if payer else "",
        created_unix_s=int(time.time()),
        policy="" if policy is None else policy.to_bytes().decode(),
        **limits,
    )
    return key, f"{PREFIX}{key_id}-{secret}"


class KeyFile:
    """The keys in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()
        self._keys: dict[str, ApiKey] = {}
        self._stamp: tuple[int, int, int] | None = None
        self._checked_s = -CHECK_PERIOD_S

    def all(self) -> list[ApiKey]:
        """All, revoked ones too. Raises ConfigError for a file that cannot be used."""
        self._read()
        return list(self._keys.values())

    def find(self, text: str, now_s: float) -> ApiKey | None:
        """The key that ``text`` is; None for wrong and revoked ones.

        The file is looked at once a second at most. Should it be unreadable for a moment, what was
        read before goes on to count.
        """
        if now_s - self._checked_s >= CHECK_PERIOD_S:
            self._checked_s = now_s
            try:
                self._read()
            except ConfigError:
                if self._stamp is None:
                    raise
        match = _KEY.fullmatch(text)
        if match is None:
            return None
        key = self._keys.get(match[1])
        # Compared in any case: the time must not tell which ids exist.
        expected = key.secret_sha256 if key is not None else "0" * 64
        if not hmac.compare_digest(_hash(match[2]), expected) or key is None:
            return None
        return key if key.revoked_unix_s is None else None

    def add(self, key: ApiKey) -> None:
        with self._locked():
            self._write({**self._keys, key.key_id: key})

    def revoke(self, key_id_or_name: str) -> ApiKey:
        """Raises UsageError when no valid key, or more than one, is called so."""
        with self._locked():
            found = [
                key
                for key in self._keys.values()
                if key_id_or_name in (key.key_id, key.name) and key.revoked_unix_s is None
            ]
            if len(found) != 1:
                many = "several keys have the name" if found else "no valid key is called"
                raise UsageError(f"{many} {key_id_or_name!r}; swarm gateway keys list shows ids")
            revoked = replace(found[0], revoked_unix_s=int(time.time()))
            self._write({**self._keys, revoked.key_id: revoked})
            return revoked

    def _read(self) -> None:
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
                if stamp == self._stamp:
                    return
                if status.st_mode & 0o077:
                    raise ConfigError(f"others can read {self.path}; say chmod 600 {self.path}")
                content = file.read(MAXIMUM_FILE_BYTES + 1)
        except FileNotFoundError:
            self._keys, self._stamp = {}, (0, 0, 0)
            return
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}") from None
        self._keys, self._stamp = _parsed(content, self.path), stamp

    def _write(self, keys: dict[str, ApiKey]) -> None:
        fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        content = json.dumps({"keys": [asdict(key) for key in keys.values()]}, indent=1)
        try:
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(content + "\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.path)
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from None
        self._read()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(
                self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600
            )
        except OSError as error:
            raise ConfigError(f"cannot write in {self.path.parent}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._read()
            yield
        finally:
            os.close(descriptor)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _parsed(content: bytes, path: Path) -> dict[str, ApiKey]:
    known = {item.name for item in fields(ApiKey)}
    try:
        if len(content) > MAXIMUM_FILE_BYTES:
            raise ValueError
        rows = json.loads(content)["keys"]
        keys = [ApiKey(**{k: v for k, v in row.items() if k in known}) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ConfigError(f"{path} is no file of API keys; restore it or move it away") from None
    return {key.key_id: key for key in keys}
