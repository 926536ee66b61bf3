"""The bodies of requests and answers of a federation: JSON, and words for vectors. Pure.

Whatever is read here came from a stranger. The bounds of bodies follow from the terms, and are
applied before a body is read (:func:`body_limit`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from swarm.client.finetune.federation.rounds import ROUND_ID_BYTES, Message, Phase
from swarm.client.finetune.secure_sum import (
    ENCRYPTED_SHARE_BYTES,
    Advertised,
    Unmasking,
    Words,
)
from swarm.client.finetune.shamir import SHARE_BYTES
from swarm.protocol.bounded_json import parse_json
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.identity import SIGNATURE_BYTES, PeerId

KEY_BYTES = 32
MAX_ADAPTER_BYTES = 512 * 1024 * 1024
_PEER_ROOM_BYTES = 128
_SMALL_BODY_BYTES = 4096
_HASH = re.compile("[0-9a-f]{64}")
_VERSION = re.compile("[0-9a-z.]{1,128}")
"""It goes back in an address."""


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A common adapter, as a file."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class RoundState:
    """What the aggregator tells one participant."""

    version: str
    """Changes with everything else here; to wait for news by."""
    number: int
    """Of the round, from 1; after the last one that of the last."""
    attempt: int
    round_id: bytes
    phase: Phase
    adapter: StoredAdapter
    """What this round begins with; in the end, the result."""
    keys: tuple[Advertised, ...] = ()
    """In ``SHARE``."""
    shares: Mapping[PeerId, bytes] | None = None
    """In ``MASKED``: those for the one who asks."""
    stayed: tuple[PeerId, ...] = ()
    """In ``UNMASK``."""

    def to_json(self) -> bytes:
        return json.dumps(
            {
                "version": self.version,
                "round": self.number,
                "attempt": self.attempt,
                "round_id": self.round_id.hex(),
                "phase": self.phase.value,
                "adapter": {"sha256": self.adapter.sha256, "size_bytes": self.adapter.size_bytes},
                "keys": [{"peer": key.peer, **_keys_json(key)} for key in self.keys],
                "shares": _hex_of(self.shares or {}),
                "stayed": list(self.stayed),
            }
        ).encode()

    @classmethod
    def from_json(cls, data: bytes, invited: int) -> RoundState:
        """Raises ProtocolError."""
        value = parse_json(data, maximum_bytes=state_limit(invited), maximum_depth=4)
        try:
            adapter = value["adapter"]
            stored = StoredAdapter(_text(adapter["sha256"]), _count(adapter["size_bytes"]))
            if not _HASH.fullmatch(stored.sha256) or stored.size_bytes > MAX_ADAPTER_BYTES:
                raise ValueError("the adapter's hash or size")
            if not _VERSION.fullmatch(_text(value["version"])):
                raise ValueError("the version")
            return cls(
                version=_text(value["version"]),
                number=_count(value["round"]),
                attempt=_count(value["attempt"]),
                round_id=_bytes(value["round_id"], ROUND_ID_BYTES),
                phase=Phase(_text(value["phase"])),
                adapter=stored,
                keys=tuple(_advertised(PeerId(_text(key["peer"])), key) for key in value["keys"]),
                shares=_bytes_by_peer(value["shares"], ENCRYPTED_SHARE_BYTES),
                stayed=tuple(PeerId(_text(peer)) for peer in value["stayed"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(ErrorCode.BAD_FIELD, f"state of a round: {error}") from error


def state_limit(invited: int) -> int:
    """Largest answer with the state of a round."""
    one = _PEER_ROOM_BYTES + 2 * max(ENCRYPTED_SHARE_BYTES, 2 * KEY_BYTES + SIGNATURE_BYTES) + 128
    return _SMALL_BODY_BYTES + 2 * invited * one


def body_limit(phase: Phase, invited: int, length: int) -> int:
    """Largest body of a message; of a vector of ``length`` words the exact size."""
    if phase is Phase.MASKED:
        return 8 * length
    if phase is Phase.ADVERTISE:
        return _SMALL_BODY_BYTES
    return _SMALL_BODY_BYTES + invited * (_PEER_ROOM_BYTES + 2 * ENCRYPTED_SHARE_BYTES)


def write_message(message: Message) -> bytes:
    """The body that carries it."""
    match message:
        case Advertised():
            return json.dumps(_keys_json(message)).encode()
        case Unmasking():
            return json.dumps(
                {
                    "own_mask_shares": _hex_of(message.own_mask_shares),
                    "key_shares": _hex_of(message.key_shares),
                }
            ).encode()
        case Mapping():
            return json.dumps({"shares": _hex_of(message)}).encode()
    return message.astype("<u8").tobytes()


def read_message(
    phase: Phase, sender: PeerId, body: bytes, *, invited: int, length: int
) -> Message:
    """Inverse of :func:`write_message` for a phase. Raises ProtocolError."""
    limit = body_limit(phase, invited, length)
    if phase is Phase.MASKED:
        if len(body) != limit:
            raise ProtocolError(ErrorCode.BAD_TENSOR, "a vector of another length")
        words: Words = np.frombuffer(body, dtype="<u8").astype(np.uint64)
        return words
    value = parse_json(body, maximum_bytes=limit, maximum_depth=2)
    try:
        if phase is Phase.ADVERTISE:
            return _advertised(sender, value)
        if phase is Phase.SHARE:
            return _bytes_by_peer(value["shares"], ENCRYPTED_SHARE_BYTES)
        return Unmasking(
            _bytes_by_peer(value["own_mask_shares"], SHARE_BYTES),
            _bytes_by_peer(value["key_shares"], SHARE_BYTES),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProtocolError(ErrorCode.BAD_FIELD, f"{phase}: {error}") from error


def _keys_json(keys: Advertised) -> dict[str, str]:
    return {
        "channel_key": keys.channel_key.hex(),
        "mask_key": keys.mask_key.hex(),
        "signature": keys.signature.hex(),
    }


def _advertised(peer: PeerId, value: Any) -> Advertised:
    return Advertised(
        peer,
        _bytes(value["channel_key"], KEY_BYTES),
        _bytes(value["mask_key"], KEY_BYTES),
        _bytes(value["signature"], SIGNATURE_BYTES),
    )


def _hex_of(values: Mapping[PeerId, bytes]) -> dict[str, str]:
    return {peer: value.hex() for peer, value in values.items()}


def _bytes_by_peer(value: Any, size_bytes: int) -> dict[PeerId, bytes]:
    return {PeerId(_text(peer)): _bytes(one, size_bytes) for peer, one in value.items()}


def _bytes(value: Any, size_bytes: int) -> bytes:
    content = bytes.fromhex(_text(value))
    if len(content) != size_bytes:
        raise ValueError(f"{size_bytes} bytes are expected")
    return content


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 512:
        raise ValueError("expected a text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("expected a number")
    return value
