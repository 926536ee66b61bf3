"""Settings of a gateway: frozen, with units; the command's flags and a TOML file fill them in."""

from __future__ import annotations

import ipaddress
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from swarm.client.config import read_settings
from swarm.protocol.errors import ConfigError

TABLE = "gateway"
"""The part of a TOML file that is for gateways; the rest is for all commands."""

DEFAULT_KEYS_FILE = Path("~/.local/share/sovereign-swarm/gateway-keys.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Everything that a gateway can be told, beside how it joins the swarm (``ClientSettings``)."""

    models: tuple[str, ...] = ()
    """Checkpoint folders, or names in the Hugging Face cache; served under their names."""

    adapters: tuple[str, ...] = ()
    """Adapters of these models, as ``NAME=FOLDER``; served as ``MODEL@NAME``."""

    host: str = "127.0.0.1"
    """Address to listen on. Put a TLS proxy before any other than loopback."""

    port: int = 8000
    """TCP port; 0 picks a free one."""

    keys_file: Path = DEFAULT_KEYS_FILE
    """API keys, as ``swarm gateway keys`` writes them. Read again when it changes."""

    without_keys: bool = False
    """Serve everybody. On loopback that is also so while there are no keys."""

    allowed_origins: tuple[str, ...] = ()
    """Web pages of other hosts that may use the API, as ``https://chat.example.org``."""

    allowed_hosts: tuple[str, ...] = ()
    """Names by which clients may call an open gateway on loopback, beside localhost."""

    maximum_new_tokens: int = 4096
    """Longest answer that a request may ask for."""

    default_new_tokens: int = 1024
    """Longest answer of a chat request that names no limit."""

    maximum_choices: int = 8
    """Highest ``n``."""

    maximum_body_bytes: int = 2 * 1024 * 1024
    """Larger requests are refused unread."""

    body_timeout_s: float = 20.0
    """For a request's headers and for its body."""

    request_timeout_s: float = 900.0
    """For a whole answer, waiting included."""

    write_timeout_s: float = 60.0
    """For a client that does not read what it asked for."""

    keep_alive_s: float = 10.0
    """A stream that has nothing to say sends a comment so often."""

    resume_patience_s: float = 30.0
    """How long an answer waits for blocks that the swarm has lost, before it ends with an error."""

    maximum_answers: int = 64
    """Answers in the making at a time; further ones wait, the keys taking turns."""

    maximum_waiting: int = 512
    """Answers that wait; more are refused."""

    maximum_connections: int = 4096

    key_answers: int = 16
    """Answers of one key in the making at a time, unless the key has its own limit."""

    key_requests_per_minute: int = 600

    key_tokens_per_minute: int = 200_000
    """Tokens of prompts and answers."""

    grace_s: float = 30.0
    """How long a stopping gateway lets answers finish."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} is no TCP port")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                lowest = 0 if item.name in ("port", "grace_s", "resume_patience_s") else 1e-3
                if not lowest <= value <= 1e12:
                    raise ConfigError(f"{item.name} = {value}: must be greater than 0")
        for adapter in self.adapters:
            name, equals, folder = adapter.partition("=")
            if not (equals and folder and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name)):
                raise ConfigError(f"adapter {adapter!r}: write NAME=FOLDER, as law=./law-adapter")
        for origin in self.allowed_origins:
            if not origin.startswith(("https://", "http://")) or origin.count("/") != 2:
                raise ConfigError(f"{origin!r} is no origin; write for example https://chat.org")

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this computer can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def load_gateway_settings(
    flags: Mapping[str, Any], config_file: Path | None = None
) -> tuple[GatewaySettings, dict[str, Any]]:
    """The table ``[gateway]`` of a TOML file, then flags; flags that are None were not given.

    Returns also the rest of the file, which is that of ``ClientSettings``. Raises ConfigError.
    """
    rest = read_settings(config_file)
    values = rest.pop(TABLE, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{config_file}: [{TABLE}] must be a table")
    values |= {name: value for name, value in flags.items() if value not in (None, (), [])}
    known = typing.get_type_hints(GatewaySettings)
    return GatewaySettings(**{k: _typed(k, v, known) for k, v in values.items()}), rest


def _typed(name: str, value: Any, known: Mapping[str, Any]) -> Any:
    wanted = known.get(name)
    if wanted is None:
        raise ConfigError(f"unknown setting {name!r}; known are {', '.join(sorted(known))}")
    if wanted is Path:
        return Path(value).expanduser()
    if isinstance(wanted, types.GenericAlias):
        if isinstance(value, str) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{name} must be a list of texts")
        return tuple(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not wanted:
        raise ConfigError(f"{name} = {value!r}: {wanted.__name__} is needed")
    return value
