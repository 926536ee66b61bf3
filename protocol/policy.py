"""What a session demands of the peers that may see any byte of it.

A policy speaks of what a swarm's authority vouches for in passports, never of what peers declare of
themselves. It travels with a session as canonical JSON, so that nodes check it as well, and its
SHA-256 names it in accounts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from swarm.protocol.errors import ConfigError, DecodeError, ErrorCode, ProtocolError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import MAX_POLICY_BYTES
from swarm.protocol.passport import Passport, Tier

MAX_NAMES = 64
DEFAULT_END_BLOCKS = 4
_COUNTRY = re.compile("[A-Z]{2}")


@dataclass(frozen=True, slots=True)
class Policy:
    """Empty fields demand nothing."""

    countries: tuple[str, ...] = ()
    """ISO 3166-1 alpha-2 in capitals."""
    organisations: tuple[str, ...] = ()
    minimum_tier: Tier = Tier.ANONYMOUS
    minimum_end_tier: Tier = Tier.ANONYMOUS
    """Of nodes that compute any of the first or last ``end_blocks`` blocks, where activations tell
    most about the text."""
    end_blocks: int = DEFAULT_END_BLOCKS
    avoid: tuple[str, ...] = ()
    """Peer ids that must not be used."""
    adapters: tuple[str, ...] = ()
    """Ids (in hexadecimal) of adapters that may be used; empty: all."""

    def __post_init__(self) -> None:
        for name in ("countries", "organisations", "avoid", "adapters"):
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))

    @property
    def is_empty(self) -> bool:
        return self == Policy(end_blocks=self.end_blocks)

    @property
    def needs_passports(self) -> bool:
        """Whether it speaks of what only passports say."""
        return (
            bool(self.countries or self.organisations)
            or max(self.minimum_tier, self.minimum_end_tier) > Tier.ANONYMOUS
        )

    def refusal(self, peer: PeerId, passport: Passport | None) -> str:
        """Why a peer must see nothing of the session, as people read it; empty if it may."""
        if peer in self.avoid:
            return "that the policy avoids"
        if self.countries and (passport is None or passport.country not in self.countries):
            return "outside of the policy's countries"
        if self.organisations and (
            passport is None or passport.organisation not in self.organisations
        ):
            return "outside of the policy's organisations"
        if _tier(passport) < self.minimum_tier:
            return "below the policy's tier"
        return ""

    def allowed_blocks(
        self, first_block: int, end_block: int, number_of_blocks: int, passport: Passport | None
    ) -> tuple[int, int]:
        """The part of a peer's span that it may compute; empty spans have first >= end."""
        if _tier(passport) >= self.minimum_end_tier:
            return first_block, end_block
        return (
            max(first_block, self.end_blocks),
            min(end_block, number_of_blocks - self.end_blocks),
        )

    def check(self, peer: PeerId, passport: Passport | None) -> None:
        """Raises ProtocolError(OUTSIDE_POLICY)."""
        reason = self.refusal(peer, passport)
        if reason:
            raise ProtocolError(ErrorCode.OUTSIDE_POLICY, f"{peer} is one {reason}")

    def allows_adapter(self, adapter_id: str) -> bool:
        """Whether the adapter with this id (in hexadecimal) may be used."""
        return not self.adapters or adapter_id in self.adapters

    def both(self, other: Policy) -> Policy:
        """What satisfies this policy and the other one.

        Raises ConfigError where nothing can: then no peer may be used at all.
        """

        def common(name: str) -> tuple[str, ...]:
            ours, theirs = getattr(self, name), getattr(other, name)
            if not ours or not theirs:
                return tuple(ours or theirs)
            shared = tuple(sorted(set(ours) & set(theirs)))
            if not shared:
                raise ConfigError(f"two policies that hold together allow no {name} in common")
            return shared

        return Policy(
            countries=common("countries"),
            organisations=common("organisations"),
            minimum_tier=max(self.minimum_tier, other.minimum_tier),
            minimum_end_tier=max(self.minimum_end_tier, other.minimum_end_tier),
            end_blocks=max(self.end_blocks, other.end_blocks),
            avoid=(*self.avoid, *other.avoid),
            adapters=common("adapters"),
        )

    # --- forms
    def to_bytes(self) -> bytes:
        """Canonical JSON without what is the default; empty for a policy that demands nothing."""
        if self.is_empty:
            return b""
        plain = Policy()
        content = {
            item.name: _plain(getattr(self, item.name))
            for item in fields(self)
            if getattr(self, item.name) != getattr(plain, item.name)
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")

    @classmethod
    def from_bytes(cls, content: bytes) -> Policy | None:
        """None for no bytes. Raises DecodeError(BAD_FIELD) for what is no policy.

        Only the bytes that ``to_bytes`` writes are read: they are what the digest names.
        """
        if not content:
            return None
        try:
            if len(content) > MAX_POLICY_BYTES:
                raise ConfigError("too large")
            policy = cls.from_mapping(json.loads(content))
            if policy.to_bytes() != content:
                raise ConfigError("not written as it has to be")
            return policy
        except (ConfigError, ValueError, RecursionError) as error:
            raise DecodeError(ErrorCode.BAD_FIELD, f"policy: {error}") from error

    @classmethod
    def from_mapping(cls, values: object) -> Policy:
        """As in settings: lists of texts, tiers by name. Raises ConfigError."""
        if not isinstance(values, Mapping):
            raise ConfigError("a policy is a table of settings")
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(map(str, values)) - known)
        if unknown:
            raise ConfigError(f"a policy has no {unknown[0]!r}; it has {', '.join(sorted(known))}")
        read: dict[str, Any] = {}
        for name, value in values.items():
            if name in ("minimum_tier", "minimum_end_tier"):
                read[name] = _read_tier(value)
            elif name == "end_blocks":
                if type(value) is not int or not 0 < value <= 512:
                    raise ConfigError("end_blocks is a number of blocks")
                read[name] = value
            else:
                read[name] = _read_names(name, value)
        if any(not _COUNTRY.fullmatch(country) for country in read.get("countries", ())):
            raise ConfigError("countries have two capital letters, as KE")
        policy = cls(**read)
        if len(policy.to_bytes()) > MAX_POLICY_BYTES:
            raise ConfigError(f"the policy is larger than {MAX_POLICY_BYTES} bytes")
        return policy

    @property
    def digest(self) -> bytes:
        """SHA-256 of ``to_bytes``; empty for a policy that demands nothing."""
        return policy_digest(self.to_bytes())

    def without(self, *peers: PeerId) -> Policy:
        """The same, and these peers avoided as well."""
        return replace(self, avoid=(*self.avoid, *peers))

    def describe(self) -> str:
        """For people: ``countries KE, TZ; tier certified``."""
        parts = []
        if self.countries:
            parts.append(f"countries {', '.join(self.countries)}")
        if self.organisations:
            parts.append(f"organisations {', '.join(self.organisations)}")
        if self.minimum_tier > Tier.ANONYMOUS:
            parts.append(f"tier {self.minimum_tier.name.lower()}")
        if self.minimum_end_tier > Tier.ANONYMOUS:
            tier = self.minimum_end_tier.name.lower()
            parts.append(f"first and last {self.end_blocks} blocks tier {tier}")
        if self.avoid:
            parts.append(f"without {len(self.avoid)} peers")
        if self.adapters:
            parts.append(f"adapters {', '.join(self.adapters)}")
        return "; ".join(parts)


def policy_digest(content: bytes) -> bytes:
    """The name in accounts of a policy as it travels; empty for none."""
    return hashlib.sha256(content).digest() if content else b""


def _tier(passport: Passport | None) -> Tier:
    return Tier.ANONYMOUS if passport is None else passport.tier


def _plain(value: object) -> object:
    return value.name.lower() if isinstance(value, Tier) else value


def _read_tier(value: object) -> Tier:
    try:
        return Tier[str(value).upper()]
    except KeyError:
        names = ", ".join(tier.name.lower() for tier in Tier)
        raise ConfigError(f"tier {value!r}: one of {names}") from None


def _read_names(name: str, value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if (
        not isinstance(items, list | tuple)
        or len(items) > MAX_NAMES
        or not all(isinstance(item, str) and 0 < len(item) <= 128 for item in items)
    ):
        raise ConfigError(f"{name} is a list of texts")
    return tuple(items)
