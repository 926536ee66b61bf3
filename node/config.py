"""What can be set about a node, and how the settings are read.

One frozen dataclass for each process: :class:`NodeSettings` for ``swarm-node join`` and
:class:`SeedSettings` for ``swarm-node seed``. Its fields are the keys of the TOML file, and in
upper case after ``SWARM_NODE_`` the environment variables. Flags win over the environment, the
environment over the file, the file over the defaults. Nothing is read on import.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from swarm.membership_files import MembershipFiles
from swarm.node.donor.limits import LIMIT_NAMES, DonorLimits
from swarm.node.hours import EXAMPLE_HOURS, Week, parse_week
from swarm.protocol.errors import ConfigError, ProtocolError
from swarm.protocol.identity import public_key_from_peer_id
from swarm.protocol.messages import MAX_BLOCKS
from swarm.protocol.records import COUNTRY

ENVIRONMENT_PREFIX = "SWARM_NODE_"

LISTEN_ON_ALL_INTERFACES = (
    "/ip4/0.0.0.0/tcp/0",
    "/ip4/0.0.0.0/udp/0/quic-v1",
    "/ip6/::/tcp/0",
    "/ip6/::/udp/0/quic-v1",
)
"""TCP is faster on short ways; QUIC is what passes most home routers. Port 0: a free one. Where a
computer has no IPv6, it listens on the rest."""

EXAMPLE_ADDRESS = "/ip4/192.0.2.1/tcp/31330/p2p/12D3KooW..."

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class BlockSpan:
    """Blocks ``[first_block, end_block)`` of a model; written ``first:end``."""

    first_block: int
    end_block: int

    def __str__(self) -> str:
        return f"{self.first_block}:{self.end_block}"

    def __len__(self) -> int:
        return self.end_block - self.first_block


def parse_blocks(text: str) -> BlockSpan:
    """Read ``0:10``, the blocks 0 to 9. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", text)
    if match is None:
        raise ConfigError(f"blocks {text!r}: write FIRST:END, for example 0:10 for blocks 0 to 9")
    span = BlockSpan(int(match[1]), int(match[2]))
    if not span.first_block < span.end_block <= MAX_BLOCKS:
        raise ConfigError(
            f"blocks {text!r}: the end must be greater than the first and at most {MAX_BLOCKS}"
        )
    return span


def parse_size(text: str) -> int:
    """Read ``8 GiB``, ``500MB`` or a plain number of bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", text.lower())
    if match is None:
        raise ConfigError(f"size {text!r}: write for example 8 GiB, 500 MB or a number of bytes")
    number, prefix, binary = match.groups()
    power = "kmgt".index(prefix) + 1 if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSettings:
    """What every peer that listens has in common."""

    peers: tuple[str, ...] = ()
    """Multiaddresses of peers to join by, each ending in ``/p2p/PEER_ID``."""

    display_name: str = ""
    """Name shown to others, for example of your university; at most 64 bytes."""

    data_dir: Path = Path("~/.local/share/sovereign-swarm")
    """Folder for the identity key and the peers last met; made with mode 0700 when missing."""

    identity_path: Path | None = None
    """Ed25519 key file, made when missing; by default ``identity.key`` in ``data_dir``."""

    listen_addresses: tuple[str, ...] = LISTEN_ON_ALL_INTERFACES
    """Multiaddresses to listen on."""

    announce_addresses: tuple[str, ...] = ()
    """Multiaddresses to tell others instead of those found, for example behind a forwarded port."""

    announce_period_s: float = 30.0
    """Seconds between announcements in a small swarm; up to four times that in a large one."""

    metrics: bool = True
    """Whether to serve Prometheus metrics, on 127.0.0.1 only."""

    metrics_port: int = 0
    """TCP port of the metrics; 0 picks a free one."""

    log_level: str = "warning"
    """debug, info, warning or error."""

    charter: Path | None = None
    """The swarm's charter; by default ``charter.swarm`` in ``data_dir``, if it is there."""

    passport: Path | None = None
    """Our passport in the swarm; by default ``passport.swarm`` in ``data_dir``, if it is there."""

    disk_bytes: int | None = None
    """Most that fetched weights may take on the disk; by default all that is free but 256 MiB.

    What was not used for the longest time gives way.
    """

    upload_bytes_per_s: int | None = None
    """Most that is sent to peers, as ``2 MB``; by default as much as the line takes.

    Of a node that is everything, of a seed the weights.
    """

    download_bytes_per_s: int | None = None
    """Most that is taken from peers."""

    mirrors: tuple[str, ...] = ()
    """Folders or web addresses with a mirror, for weights that no peer has."""

    hub: bool = True
    """Whether models that neither peers nor mirrors have may come from the Hugging Face hub."""

    publishers: tuple[str, ...] = ()
    """Peer ids whose manifests are believed; by default all, or those of the swarm's charter."""

    @property
    def identity_file(self) -> Path:
        """Where the key is, with ``~`` expanded."""
        path = self.identity_path or self.data_dir / "identity.key"
        return path.expanduser()

    @property
    def store_folder(self) -> Path:
        """Where fetched weights are kept."""
        return self.data_dir.expanduser() / "store"

    @property
    def membership_files(self) -> MembershipFiles:
        """Charter, passport and revocations."""
        return MembershipFiles.of(self.data_dir.expanduser(), self.charter, self.passport)

    @property
    def peers_file(self) -> Path:
        """Where peers of the last run are kept, for when none of ``peers`` answers."""
        return self.identity_file.with_suffix(".peers")

    @property
    def ledger_file(self) -> Path:
        """The node's books: vouchers, receipts, evidence."""
        return self.identity_file.with_suffix(".ledger")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings(PeerSettings):
    """All settings of ``swarm-node join``."""

    model: str
    """Checkpoint directory, or a model's name in the Hugging Face cache or hub."""

    organisation: str = ""
    """Who runs the node, at most 64 bytes; replicas are spread over organisations."""

    country: str = ""
    """Where it stands, two letters of ISO 3166 as in KE; users may ask for nodes of a country."""

    blocks: BlockSpan | None = None
    """Blocks to host, as ``first:end``; by default those that the swarm needs most."""

    number_of_blocks: int | None = None
    """How many blocks to host; by default as many as fit."""

    device: str = "auto"
    """auto, cpu, cuda, mps or xpu; with a number where there are several, as in cuda:1."""

    dtype: str = "auto"
    """auto, float32, bfloat16 or float16. auto takes what is fast and safe on the device."""

    threads: int | None = None
    """CPU threads to compute with; by default one for each physical core."""

    memory_bytes: int | None = None
    """Memory of the device for weights and cache; by default 80 % of what is free."""

    adapter_bytes: int = 256 * 1024**2
    """Memory for adapters beside weights and cache; those that no session uses make room."""

    cache_tokens: int | None = None
    """Tokens that the cache holds over all sessions; by default what fits beside the weights."""

    max_sessions: int = 256
    """Sessions open at a time."""

    max_sessions_per_peer: int = 32
    """Sessions that one client may have open."""

    session_idle_s: float = 600.0
    """Seconds without a step after which a session is closed."""

    session_lifetime_s: float = 21600.0
    """Seconds after which a session is closed in any case."""

    declared_watts: float | None = None
    """What this computer draws while it computes; for statistics, where it cannot measure that."""

    hours: Week | None = None
    """Hours at which to work, local time, as ``20:00-08:00`` for every day, or as
    ``mon-fri 20:00-08:00, sat-sun 00:00-24:00``; by default always.

    At their end the node drains, gives its memory back, and waits for their next begin. The same
    happens when any of the limits below does not hold any more.
    """

    only_when_idle: bool = False
    """Work only while nobody uses the computer, nor another program its GPU."""

    idle_after_s: float = 300.0
    """Seconds without a key press after which nobody uses it."""

    works_on_battery: bool = False
    """Whether a laptop goes on working without its charger."""

    monthly_bytes: int | None = None
    """Traffic of a calendar month, both ways; when it is used up the node rests until the next."""

    keep_memory_free_bytes: int | None = None
    """Memory left for other programs; the node leaves when they need more."""

    keep_disk_free_bytes: int | None = None
    """Free space below which the node leaves."""

    maximum_temperature_c: float | None = None
    """Of the hottest sensor of processor and GPU; above it the node cools down."""

    maximum_power_w: float | None = None
    """Of processor and GPU together, where they tell."""

    drain_timeout_s: float = 60.0
    """Seconds that a leaving node waits until its sessions are handed over or have ended."""

    books: bool = True
    """Whether to keep books of the work done, by vouchers that clients sign."""

    operator_keys: tuple[str, ...] = ()
    """Public keys, in hexadecimal, of operators whose allowances count as paid."""

    operator_url: str = ""
    """Where to settle, hourly; its key is one of ``operator_keys``. Empty: nowhere."""

    payout: str = ""
    """Peer id of the account that gets what the node earns; empty is the node's own key."""

    certificate: Path | None = None
    """File in which an organisation vouches for this node (``swarm operator certify``)."""

    settle_interval_s: float = 3600.0
    """Seconds between two rounds of settling."""

    owner_keys: tuple[str, ...] = ()
    """Peer ids of your other nodes: who signs with their keys is served first, as with ours."""

    anonymous_tokens_per_s: int = 0
    """Tokens that each user without a paid allowance may reserve per second; 0 is no limit."""

    client_ledger: Path | None = None
    """Books of your own client: nodes that served you are served before strangers."""

    relays: tuple[str, ...] = ()
    """Peers that may relay for a node behind a router; by default those of ``peers``."""

    use_relay: bool = True
    """Whether to be reachable through relays when no port is open."""

    @property
    def donor_limits(self) -> DonorLimits:
        """What the owner allows. Raises ConfigError for values that make no sense."""
        return DonorLimits(**{name: getattr(self, name) for name in LIMIT_NAMES})

    @property
    def limits_file(self) -> Path:
        """Where the owner's later changes of the limits are kept."""
        return self.identity_file.with_suffix(".limits.json")

    @property
    def diary_file(self) -> Path:
        """Where it is kept what the node did on each day."""
        return self.identity_file.with_suffix(".diary.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedSettings(PeerSettings):
    """All settings of ``swarm-node seed``, a peer without blocks by which others meet."""

    relay: bool = True
    """Whether to relay for nodes behind routers; takes a reachable port."""

    models: tuple[str, ...] = ()
    """Models and adapters to hold and send to others without computing; ``all`` is everything that
    the catalogue lists."""


Settings = TypeVar("Settings", bound=PeerSettings)


def load_settings(
    settings_type: type[Settings],
    toml_path: Path | None,
    environment: Mapping[str, str],
    flags: Mapping[str, Any],
) -> Settings:
    """Merge file, environment and flags; flags that are None or () were not given.

    Raises ConfigError for files that cannot be read, unknown keys, wrong types and settings that
    contradict each other.
    """
    known = typing.get_type_hints(settings_type)
    merged: dict[str, Any] = {}
    for key, value in _read_toml(toml_path).items():
        merged[key] = _convert(key, value, known, f"{toml_path}")
    for variable, text in environment.items():
        if variable.startswith(ENVIRONMENT_PREFIX):
            key = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            if key not in known and key in _NODE_KEYS:
                continue  # one environment may hold for a seed and a node: this is for the node
            merged[key] = _convert(key, text, known, f"environment variable {variable}")
    for key, value in flags.items():
        if value is not None and value != () and value != []:
            merged[key] = _convert(key, value, known, "")
    missing = [item.name for item in fields(settings_type) if _is_required(item, merged)]
    if missing:
        names = ", ".join(missing)
        raise ConfigError(f"{names} is not set: give it as an argument or in the --config file")
    settings = settings_type(**merged)
    _check(settings)
    return settings


def load_identity_file(
    toml_path: Path | None, environment: Mapping[str, str], identity_path: Path | None
) -> Path:
    """The key file of the node or seed that runs with these settings, whatever else they say."""
    return load_own_files(toml_path, environment, identity_path).identity_file


def load_own_files(
    toml_path: Path | None, environment: Mapping[str, str], identity_path: Path | None
) -> PeerSettings:
    """Where the node or seed with these settings keeps its own files, whatever else they say."""
    known = typing.get_type_hints(PeerSettings)
    keys = ("data_dir", "identity_path", "charter", "passport")
    found = {key: value for key, value in _read_toml(toml_path).items() if key in keys}
    for key in keys:
        if (text := environment.get(ENVIRONMENT_PREFIX + key.upper())) is not None:
            found[key] = text
    if identity_path is not None:
        found["identity_path"] = identity_path
    converted = {key: _convert(key, value, known, "") for key, value in found.items()}
    return PeerSettings(**converted)


_NODE_KEYS = frozenset(item.name for item in fields(NodeSettings))


def _is_required(item: Field[Any], merged: Mapping[str, Any]) -> bool:
    return item.default is MISSING and item.name not in merged


def _read_toml(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid TOML: {error}") from None


def _convert(key: str, value: Any, known: Mapping[str, Any], source: str) -> Any:
    """``value`` as the type of the field ``key``; text is parsed, other types must fit."""
    where = f"{source}: " if source else ""
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        raise ConfigError(f"{where}unknown key {key!r}; did you mean {nearest[0]!r}?")
    wanted = known[key]
    if isinstance(wanted, types.UnionType):  # ``X | None``: leaving the key out says None
        wanted = next(item for item in typing.get_args(wanted) if item is not types.NoneType)
    try:
        return _CONVERTERS[wanted](key, value)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None
    except (TypeError, ValueError):
        raise ConfigError(f"{where}{key} = {value!r}: {_EXPECTED[wanted]} is needed") from None


def _text(_key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _flag(_key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "1"):
        return True
    if str(value).lower() in ("false", "0"):
        return False
    raise TypeError


def _whole(key: str, value: Any) -> int:
    if isinstance(value, str):
        return parse_size(value) if "_bytes" in key else int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _number(_key: str, value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _path(_key: str, value: Any) -> Path:
    return Path(value)


def _texts(_key: str, value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else [*value]
    if not all(isinstance(item, str) for item in items):
        raise TypeError
    return tuple(part.strip() for item in items for part in item.split(",") if part.strip())


def _blocks(_key: str, value: Any) -> BlockSpan:
    return value if isinstance(value, BlockSpan) else parse_blocks(_text(_key, value))


def _hours(_key: str, value: Any) -> Week:
    return value if isinstance(value, Week) else parse_week(_text(_key, value))


_CONVERTERS: dict[Any, Callable[[str, Any], Any]] = {
    str: _text,
    bool: _flag,
    int: _whole,
    float: _number,
    Path: _path,
    tuple[str, ...]: _texts,
    BlockSpan: _blocks,
    Week: _hours,
}

_EXPECTED: dict[Any, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Path: "a path",
    tuple[str, ...]: "a list of texts",
    BlockSpan: "a text such as 0:10",
    Week: f"a text such as {EXAMPLE_HOURS}",
}


def _check(settings: PeerSettings) -> None:
    """Refuse values that no later part could work with."""
    if len(settings.display_name.encode()) > 64:
        raise ConfigError("display_name is longer than 64 bytes")
    if not settings.display_name.isprintable():
        raise ConfigError("display_name has characters that cannot be printed")
    if not 0 <= settings.metrics_port <= 65535:
        raise ConfigError(f"metrics_port {settings.metrics_port} is no TCP port")
    if settings.log_level not in LOG_LEVELS:
        raise ConfigError(f"log_level {settings.log_level!r}: one of {', '.join(LOG_LEVELS)}")
    if not settings.listen_addresses:
        raise ConfigError("listen_addresses is empty: a peer must listen somewhere")
    for key in ("disk_bytes", "upload_bytes_per_s", "download_bytes_per_s"):
        value = getattr(settings, key)
        if value is not None and value < 1:
            raise ConfigError(f"{key} must be at least 1")
    for address in settings.peers:
        if not address.startswith("/") or "/p2p/" not in address:
            raise ConfigError(f"peer {address!r}: write an address such as {EXAMPLE_ADDRESS}")
    if not 1.0 <= settings.announce_period_s <= 300.0:
        raise ConfigError("announce_period_s must be between 1 and 300 seconds")
    if isinstance(settings, NodeSettings):
        _check_node(settings)


def _check_node(settings: NodeSettings) -> None:
    _ = settings.donor_limits  # says what is wrong with them
    if len(settings.organisation.encode()) > 64:
        raise ConfigError("organisation is longer than 64 bytes")
    if not settings.organisation.isprintable():
        raise ConfigError("organisation has characters that cannot be printed")
    if settings.country and not COUNTRY.fullmatch(settings.country):
        raise ConfigError(
            f"country {settings.country!r}: write its two letters of ISO 3166 in capitals, as in KE"
        )
    if settings.blocks is not None and settings.number_of_blocks is not None:
        raise ConfigError("set blocks or number_of_blocks, not both")
    if settings.device.split(":")[0] not in DEVICES:
        raise ConfigError(f"device {settings.device!r}: one of {', '.join(DEVICES)}")
    if settings.declared_watts is not None and not 0 < settings.declared_watts <= 20_000:
        raise ConfigError("declared_watts must be above 0 and at most 20000")
    for key in settings.operator_keys:
        if not re.fullmatch("[0-9a-f]{64}", key):
            raise ConfigError(f"operator_keys: {key!r} is no public key of 64 hexadecimal digits")
    if settings.operator_url and not (settings.operator_keys and settings.books):
        raise ConfigError("operator_url needs books and the operator's key in operator_keys")
    if settings.operator_url and not settings.operator_url.startswith(("http://", "https://")):
        raise ConfigError(f"operator_url: {settings.operator_url!r} begins neither with https://")
    if not 0 < settings.settle_interval_s <= 24 * 3600:
        raise ConfigError("settle_interval_s must be above 0 and at most a day")
    for peer in (*settings.owner_keys, *filter(None, [settings.payout])):
        try:
            public_key_from_peer_id(peer)
        except ProtocolError:
            raise ConfigError(f"{peer!r} is no peer id, as in 12D3KooW...") from None
    if settings.anonymous_tokens_per_s < 0:
        raise ConfigError("anonymous_tokens_per_s must not be negative")
    if not 0 <= settings.drain_timeout_s <= 3600:
        raise ConfigError("drain_timeout_s must be between 0 and 3600 seconds")
    if settings.dtype not in DTYPES:
        raise ConfigError(f"dtype {settings.dtype!r}: one of {', '.join(DTYPES)}")
    for key in (
        "number_of_blocks",
        "threads",
        "memory_bytes",
        "adapter_bytes",
        "cache_tokens",
        "max_sessions",
        "max_sessions_per_peer",
        "session_idle_s",
        "session_lifetime_s",
    ):
        value = getattr(settings, key)
        if value is not None and not value > 0:
            raise ConfigError(f"{key} = {value}: must be greater than 0")
