"""Settings of an operator's folder: `operator.toml` beside keys, books and public files."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.ledger.notes import KeyType, VerifierKey
from swarm.operator.policy import Policy
from swarm.protocol.errors import ConfigError, ProtocolError
from swarm.protocol.identity import Identity, check_public_key

SETTINGS_FILE = "operator.toml"
OPERATOR_KEY_FILE = "operator.key"
LOG_KEY_FILE = "log.key"
BOOKS_FILE = "books.sqlite"
PUBLIC_FOLDER = "public"
MINT_KEYS = 3
DEFAULT_LISTEN = "127.0.0.1:8440"


@dataclass(frozen=True, slots=True)
class Witness:
    """Somebody who cosigns our checkpoints, and where."""

    url: str
    key: VerifierKey


@dataclass(frozen=True, slots=True)
class OperatorSettings:
    """Everything that an operator's process is told."""

    folder: Path
    policy: Policy
    operator_key: Ed25519PrivateKey
    log_key: Ed25519PrivateKey
    host: str
    port: int
    witnesses: tuple[Witness, ...] = ()
    checkpoint_interval_s: float = 60.0
    cosign_interval_s: float = 3600.0
    upkeep_interval_s: float = 300.0
    """How often what has waited long enough is given out or back."""
    forwarded_header: str = ""
    """Header in which a reverse proxy of ours puts the client's address; empty: no proxy."""

    @property
    def log_verifier(self) -> VerifierKey:
        public_key_bytes = self.log_key.public_key().public_bytes_raw()
        return VerifierKey(self.policy.origin, KeyType.NOTE, public_key_bytes)


def create_folder(folder: Path, origin: str, mint_keys: list[str], listen: str) -> None:
    """Make keys and settings of a new operator. Raises ConfigError, and overwrites nothing."""
    if len(set(mint_keys)) != MINT_KEYS:
        raise ConfigError(
            "an operator has three different mint keys, held by three people; each makes one with"
            " swarm operator key FILE and gives you the public half"
        )
    for text in mint_keys:
        _public_key(text)
    _address(listen)
    keys = ", ".join(f'"{text}"' for text in mint_keys)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / SETTINGS_FILE).open("x", encoding="ascii") as file:
            file.write(
                f'origin = "{origin}"\nlisten = "{listen}"\nmint_keys = [{keys}]\n\n'
                "# [[witnesses]]\n"
                '# url = "https://witness.example"\n# key = "witness.example+..."\n\n'
                "# [policy]\n# nodes_per_allowance = 16\n"
            )
        Identity.generate().save(folder / OPERATOR_KEY_FILE)
        Identity.generate().save(folder / LOG_KEY_FILE)
    except FileExistsError as error:
        raise ConfigError(f"{folder} is an operator's folder already") from error
    except (OSError, UnicodeEncodeError) as error:
        raise ConfigError(f"cannot make {folder}: {error}") from error
    load_settings(folder)


def load_settings(folder: Path) -> OperatorSettings:
    """Raises ConfigError for anything missing, unknown or wrong."""
    path = folder / SETTINGS_FILE
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; swarm operator init makes a new folder"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid TOML: {error}") from error
    operator = Identity.load(folder / OPERATOR_KEY_FILE)
    log = Identity.load(folder / LOG_KEY_FILE)
    known = {
        "origin", "listen", "mint_keys", "witnesses", "policy", "forwarded_header",
        "checkpoint_interval_s", "cosign_interval_s", "upkeep_interval_s",
    }  # fmt: skip
    if unknown := set(content) - known:
        raise ConfigError(f"{path}: unknown setting {sorted(unknown)[0]!r}")
    try:
        VerifierKey(str(content["origin"]), KeyType.NOTE, log.public_key_bytes)
        host, port = _address(str(content.get("listen", DEFAULT_LISTEN)))
        intervals = {
            name: float(content[name]) for name in sorted(known & set(content)) if "_s" in name[-2:]
        }
        if any(not 0 < seconds <= 86400 for seconds in intervals.values()):
            raise ConfigError(f"{path}: an interval is above 0 and at most a day")
        return OperatorSettings(
            folder=folder,
            policy=_policy(content, operator.public_key_bytes, path),
            operator_key=operator.private_key,
            log_key=log.private_key,
            host=host,
            port=port,
            witnesses=tuple(
                Witness(str(entry["url"]).rstrip("/"), VerifierKey.parse(str(entry["key"])))
                for entry in content.get("witnesses", ())
            ),
            forwarded_header=str(content.get("forwarded_header", "")),
            **intervals,
        )
    except (KeyError, TypeError, ValueError, ProtocolError) as error:
        raise ConfigError(f"{path}: missing or wrong: {error}") from error


def _policy(content: dict[str, Any], operator_key: bytes, path: Path) -> Policy:
    values = dict(content.get("policy", {}))
    adjustable = {field.name for field in fields(Policy)} - {"origin", "mint_keys", "operator_key"}
    if unknown := values.keys() - adjustable:
        raise ConfigError(f"{path}: unknown policy {sorted(unknown)[0]!r}")
    for name, value in values.items():
        expected = str if name.endswith("budget") else int
        least = 1 if name in ("nodes_per_allowance", "validators_to_decide") else 0
        if type(value) is not expected or (isinstance(value, int) and value < least):
            raise ConfigError(f"{path}: {name} is a {expected.__name__}, at least {least}")
    mint_keys = frozenset(_public_key(str(text)) for text in content["mint_keys"])
    if len(mint_keys) != MINT_KEYS:
        raise ConfigError(f"{path}: three different mint_keys are needed")
    return Policy(str(content["origin"]), mint_keys, operator_key, **values)


def _public_key(text: str) -> bytes:
    try:
        public_key_bytes = bytes.fromhex(text)
        check_public_key(public_key_bytes)
    except (ValueError, ProtocolError) as error:
        raise ConfigError(f"{text[:80]!r} is no public key of 64 hexadecimal digits") from error
    return public_key_bytes


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{listen!r} is no HOST:PORT")
    return host.strip("[]"), int(port)
