"""Settings of a client (file, environment, flags; flags win) and of one answer.

Reading is pure: the caller passes the environment in. Nothing is read on import.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from swarm.catalogue.resolve import models_directory
from swarm.membership_files import MembershipFiles
from swarm.protocol.errors import ConfigError, UsageError
from swarm.protocol.policy import Policy

PEERS_FILE = Path("~/.local/share/sovereign-swarm/client.peers")
"""Where the command ``swarm`` remembers nodes that it met; programs choose for themselves."""
PEERS_VARIABLE = "SWARM_PEERS"
"""Environment variable with peer addresses, separated by commas or white space."""
PEERS_FILE_VARIABLE = "SWARM_PEERS_FILE"
LEDGER_FILE = Path("~/.local/share/sovereign-swarm/client.ledger")
"""Where the command ``swarm`` keeps what it received from whom; programs choose for themselves."""
LEDGER_FILE_VARIABLE = "SWARM_LEDGER_FILE"
AUDITS_VARIABLE = "SWARM_AUDITS"
"""1 or 0; the command ``swarm`` audits unless it is 0."""

OPERATOR_VARIABLE = "SWARM_OPERATOR"
"""Environment variable with the URL of an operator."""
OPERATOR_KEY_VARIABLE = "SWARM_OPERATOR_KEY"
"""Environment variable with its public key; without it no allowances are asked for."""

LEAST_TEMPERATURE = 1e-4
"""What is lower takes the most likely token: dividing by it would overflow."""
FILE_VARIABLES = {
    "SWARM_CHARTER": "charter",
    "SWARM_PASSPORT": "passport",
    "SWARM_IDENTITY": "identity_path",
}
"""Environment variables with the files of a client in a swarm with a charter."""

DTYPES = ("auto", "float32", "bfloat16")
PATHS = (
    "identity_path",
    "peers_file",
    "ledger_file",
    "owner_key_path",
    "account_path",
    "charter",
    "passport",
)


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Everything that a client process can be told."""

    peers: tuple[str, ...]
    """Addresses of peers to join through, e.g. ``/ip4/192.0.2.7/tcp/31330/p2p/12D3KooW...``."""
    peers_file: Path | None = None
    """Where nodes are remembered, to be tried when none of ``peers`` answers; None: nowhere."""
    identity_path: Path | None = None
    """Key file of this client; None makes a fresh identity for each process."""
    ledger_file: Path | None = None
    """Books of what was received from whom, and what audits found; None: kept for this run only."""
    owner_key_path: Path | None = None
    """Key file of a node of yours: it and others then know that you give too, and serve you first.
    Nodes can link your sessions to it."""
    operator_url: str = ""
    """An operator that grants allowances for sessions; empty: all are self-issued."""
    operator_key: str = ""
    """Its public key, 64 hexadecimal digits: allowances by another are refused."""
    account_path: Path | None = None
    """Key file of an account at the operator; None asks as an anonymous user."""
    allowance_budget: str = ""
    """A budget that the account may draw on; empty spends the account's own credit."""
    validates: bool = False
    """Whether the account is a validating organisation's: its sessions are challenges, which the
    operator's audit budget pays, and which nodes cannot tell from others."""
    allowance_credits: float = 1.0
    """What one session may cost at most; what it does not use comes back."""
    audits: bool = False
    """Whether to have some of what nodes answered computed again by others, after sessions."""
    dtype: str = "auto"
    """Precision of embeddings, head, wire and nodes; auto takes what is fast and any node."""
    charter: Path | None = None
    """The swarm's charter; None: it has none, or ``charter.swarm`` in the data folder."""
    passport: Path | None = None
    """Our passport, which names the key in ``identity_path``."""
    policy: Policy | None = None
    """Which nodes may see anything of our sessions; None: all of the swarm."""
    mirrors: tuple[str, ...] = ()
    """Folders or web addresses with weights, for what no peer sends."""
    publishers: tuple[str, ...] = ()
    """Peer ids whose manifests are believed; empty: all, or those of the swarm's charter."""
    hub: bool = True
    """Whether models that are nowhere else may come from the Hugging Face hub."""
    connect_timeout_s: float = 20.0
    """How long joining the swarm may take."""
    open_timeout_s: float = 30.0
    """How long opening a chain may take, asking all hops for room included; while no other computer
    answers at all this does not run."""
    step_timeout_s: float = 120.0
    """How long one step (a token, or a whole prompt) may take through the chain."""

    @property
    def membership_files(self) -> MembershipFiles:
        """Charter, passport and revocations."""
        folder = models_directory().parent
        passport = self.passport or folder / "client-passport.swarm"
        return replace(
            MembershipFiles.of(folder, self.charter, passport),
            revocations=folder / "client-revocations.bin",
        )

    @property
    def key_file(self) -> Path | None:
        """The key to use; None makes a fresh one, which is enough where nobody asks who we are."""
        if self.identity_path is not None:
            return self.identity_path.expanduser()
        files = self.membership_files
        if files.charter.expanduser().exists() and files.passport.expanduser().exists():
            return models_directory().parent / "client.key"
        return None

    def __post_init__(self) -> None:
        if not self.peers and not (self.peers_file is not None and self.peers_file.exists()):
            raise ConfigError(
                "no peers to join through; pass --peers ADDRESS or set "
                f"{PEERS_VARIABLE} to the address that a seed or node prints when it starts"
            )
        for address in self.peers:
            if not address.startswith("/") or "/p2p/" not in address:
                raise ConfigError(
                    f"{address!r} is no peer address; expected something like "
                    "/ip4/192.0.2.7/tcp/31330/p2p/12D3KooW..."
                )
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        if self.operator_key and not re.fullmatch("[0-9a-f]{64}", self.operator_key):
            raise ConfigError("operator_key is no public key of 64 hexadecimal digits")
        if not 0 < self.allowance_credits <= 10**6:
            raise ConfigError("allowance_credits must be above 0 and at most a million")
        for name in ("connect_timeout_s", "open_timeout_s", "step_timeout_s"):
            if not 0 < getattr(self, name) <= 24 * 3600:
                raise ConfigError(f"{name} must be above 0 and at most a day")


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How the next token is chosen, and when to stop."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0 is all of them."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability."""
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    presence_penalty: float = 0.0
    """Subtracted from the scores of tokens that the answer has already."""
    frequency_penalty: float = 0.0
    """The same, for each time that the token occurred in the answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and what is added to their scores."""
    top_logprobs: int | None = None
    """How many alternatives to report with each token's log probability; None reports nothing."""
    json_schema: str | None = None
    """The answer is a JSON document of this schema; None leaves it free."""

    def __post_init__(self) -> None:
        for is_right, text in (
            (self.max_new_tokens >= 1, "max_new_tokens must be at least 1"),
            (0 <= self.temperature <= 100, "temperature must be between 0 and 100"),
            (self.top_k >= 0, "top_k must be 0 or more"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (0.01 <= self.repetition_penalty <= 100, "repetition_penalty must be 0.01 to 100"),
            (abs(self.presence_penalty) <= 100, "presence_penalty must be within -100 and 100"),
            (abs(self.frequency_penalty) <= 100, "frequency_penalty must be within -100 and 100"),
            (all(token >= 0 for token, _ in self.logit_bias), "logit_bias needs token ids"),
            (0 <= (self.top_logprobs or 0) <= 100, "top_logprobs must be between 0 and 100"),
        ):
            if not is_right:
                raise UsageError(text)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn, and not just the most likely ones taken."""
        return self.temperature >= LEAST_TEMPERATURE


def split_addresses(text: str) -> tuple[str, ...]:
    """Addresses out of a text that separates them by commas or white space."""
    return tuple(text.replace(",", " ").split())


def load_settings(
    flags: Mapping[str, Any],
    *,
    environment: Mapping[str, str],
    file_values: Mapping[str, Any] | None = None,
) -> ClientSettings:
    """Merge the sources. ``flags`` holds field names; a value of None or () means "not given".

    Raises ConfigError for unknown names and values of a wrong type.
    """
    merged: dict[str, Any] = {"peers": (), **(file_values or {})}
    if environment.get(PEERS_VARIABLE):
        merged["peers"] = split_addresses(environment[PEERS_VARIABLE])
    if environment.get(PEERS_FILE_VARIABLE):
        merged["peers_file"] = environment[PEERS_FILE_VARIABLE]
    if environment.get("SWARM_MIRRORS"):
        merged["mirrors"] = environment["SWARM_MIRRORS"].split(",")
    if environment.get("SWARM_HUB"):
        merged["hub"] = environment["SWARM_HUB"].lower() not in ("false", "0")
    for variable, name in FILE_VARIABLES.items():
        if environment.get(variable):
            merged[name] = environment[variable]
    if environment.get(LEDGER_FILE_VARIABLE):
        merged["ledger_file"] = environment[LEDGER_FILE_VARIABLE]
    if environment.get(OPERATOR_VARIABLE):
        merged["operator_url"] = environment[OPERATOR_VARIABLE]
    if environment.get(OPERATOR_KEY_VARIABLE):
        merged["operator_key"] = environment[OPERATOR_KEY_VARIABLE]
    if environment.get(AUDITS_VARIABLE):
        merged["audits"] = environment[AUDITS_VARIABLE] == "1"
    merged |= {name: value for name, value in flags.items() if value not in (None, (), [])}
    return ClientSettings(**_typed(merged))


def read_settings(path: Path | None) -> dict[str, Any]:
    """What a TOML file says; nothing without one. Raises ConfigError when it cannot be read."""
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid TOML: {error}") from error


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(ClientSettings)}
    typed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}; known are {', '.join(sorted(known))}")
        if name in ("peers", "mirrors", "publishers"):
            if isinstance(value, str):
                value = split_addresses(value)
            if not all(isinstance(item, str) for item in value):
                raise ConfigError(f"{name} must be a list of texts")
            typed[name] = tuple(value)
        elif name == "policy":
            typed[name] = value if isinstance(value, Policy) else Policy.from_mapping(value)
        elif name in ("hub", "audits", "validates"):
            if not isinstance(value, bool):
                raise ConfigError(f"{name} must be true or false")
            typed[name] = value
        elif name in PATHS:
            typed[name] = Path(value).expanduser()
        elif name in ("dtype", "operator_url", "operator_key", "allowance_budget"):
            typed[name] = str(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            typed[name] = float(value)
        else:
            of_seconds = " of seconds" if name.endswith("_s") else ""
            raise ConfigError(f"{name} must be a number{of_seconds}")
    return typed
