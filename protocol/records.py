"""Signed entries of the directory (DHT): what nodes announce of themselves.

A record is a msgpack array ``[kind, payload, signature]``; the payload is a map of numbered fields.
Who stores or reads one checks it with ``open_record``, and that it lies under ``expected_key``.

A valid signature says who announced a record, not that it is true: speed, load, addresses and the
state are hints. What a client measures itself counts more.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import msgpack

from swarm.protocol.catalogue_records import CatalogueRecord, ProviderRecord
from swarm.protocol.errors import ProtocolError, RecordError, UsageError
from swarm.protocol.identity import (
    SIGNATURE_BYTES,
    Identity,
    PeerId,
    public_key_from_peer_id,
    verify,
)
from swarm.protocol.membership_records import CharterRecord, RevocationRecord
from swarm.protocol.messages import (
    MAX_BLOCKS,
    MAX_PASSPORT_BYTES,
    MAX_STEP,
    PEER,
    REVISION_BYTES,
    Array,
    Bytes,
    Text,
    Uint,
    wire,
)
from swarm.protocol.schema import Schema, unpack
from swarm.protocol.tensors import DType

MAX_RECORD_BYTES = 2048
"""Without a passport."""
MAX_VALUE_BYTES = MAX_RECORD_BYTES + MAX_PASSPORT_BYTES + 8
MAX_LIFETIME_S = 15 * 60
MAX_SHARDS = 65536
MAX_ADAPTERS = 16
MAX_RECORD_ADDRESSES = 8
MAX_ADDRESS_BYTES = 160
MAX_TOMBSTONES = 24
"""Lost peers that one witness names in one record."""
SHARDS_PER_TOMBSTONE_GROUP = 16
PASSPORT_HASH_BYTES = 32
SIGNATURE_CONTEXT = b"directory record"
COUNTRY = re.compile("[A-Z]{2}")

MODEL_NAME = Text(128)
SMALL_TEXT = Text(64)
COUNT = Uint(MAX_STEP)


class NodeState(IntEnum):
    """What a node does with new sessions."""

    JOINING = 1
    """Loads its blocks; takes no sessions yet."""
    ONLINE = 2
    DRAINING = 3
    """Serves its sessions to their end, takes no new ones."""
    MOVING = 4
    """Serves its span, new sessions too, while it prepares another one; drains before it changes.

    Routing uses it at its span, placement counts it at its target."""


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """One node's span ``[first_block, end_block)`` of one model revision."""

    peer_id: PeerId = wire(1, PEER)
    model_name: str = wire(2, MODEL_NAME)
    model_revision: bytes = wire(3, Bytes(REVISION_BYTES, REVISION_BYTES))
    number_of_blocks: int = wire(4, Uint(MAX_BLOCKS))
    """Of the whole model."""
    shards: int = wire(5, Uint(MAX_SHARDS))
    """Among how many keys the model's records are spread, as this node saw it."""
    first_block: int = wire(6, Uint(MAX_BLOCKS))
    end_block: int = wire(7, Uint(MAX_BLOCKS))
    state: NodeState = wire(8, Uint(255))
    dtype: DType = wire(9, Uint(255))
    """In which the node computes."""
    minimum_version: int = wire(10, Uint(65535))
    maximum_version: int = wire(11, Uint(65535))
    sequence: int = wire(12, COUNT)
    """Grows with each record of the peer; the highest one counts."""
    expires_unix_s: int = wire(13, COUNT)
    decode_tokens_per_s: int = wire(14, COUNT, 0)
    """Through one block, one session."""
    prefill_tokens_per_s: int = wire(15, COUNT, 0)
    """Through one block."""
    cache_tokens_total: int = wire(16, COUNT, 0)
    cache_tokens_free: int = wire(17, COUNT, 0)
    queued_steps: int = wire(18, COUNT, 0)
    quantisation: str = wire(19, SMALL_TEXT, "")
    adapters: tuple[str, ...] = wire(20, Array(SMALL_TEXT, MAX_ADAPTERS), ())
    passport_hash: bytes = wire(21, Bytes(0, PASSPORT_HASH_BYTES), b"")
    addresses: tuple[str, ...] = wire(22, Array(Text(MAX_ADDRESS_BYTES), MAX_RECORD_ADDRESSES), ())
    reachable_directly: bool = wire(23, Uint(1), False)
    software: str = wire(24, SMALL_TEXT, "")
    display_name: str = wire(25, SMALL_TEXT, "")
    organisation: str = wire(26, SMALL_TEXT, "")
    """Who runs the node, as declared; replicas should not all be of one."""
    country: str = wire(27, Text(2), "")
    """ISO 3166-1 alpha-2 in capitals, as declared; empty when unknown."""
    started_unix_s: int = wire(28, COUNT, 0)
    """Since when it runs, as declared: who has seen it first later believes that instead."""
    batched_tokens_per_s: int = wire(29, COUNT, 0)
    """Decoded through one block over all sessions, at the batch that fills the cache."""
    target_first_block: int = wire(30, Uint(MAX_BLOCKS), 0)
    target_end_block: int = wire(31, Uint(MAX_BLOCKS), 0)
    """The span that a MOVING node prepares; 0 and 0 in every other state."""
    busy_permille: int = wire(32, Uint(1000), 0)
    """Share of recent time in which the device computed."""
    decode_block_tokens: int = wire(50, COUNT, 0)
    """Tokens x blocks computed one token at a time, since the node started; by its own count."""
    prefill_block_tokens: int = wire(51, COUNT, 0)
    """Tokens x blocks of prompts, likewise."""
    energy_j: int = wire(52, COUNT, 0)
    """Needed for them, likewise; 0 when the node cannot tell."""
    energy_measured: bool = wire(53, Uint(1), False)
    """By counters of processor or graphics card; else from the power that its owner declares."""

    @property
    def takes_sessions(self) -> bool:
        """Whether routing may use the node."""
        return self.state in (NodeState.ONLINE, NodeState.MOVING)

    @property
    def placed_span(self) -> tuple[int, int]:
        """Where placement counts the node: at the target of its move, else at its span."""
        if self.state is NodeState.MOVING:
            return self.target_first_block, self.target_end_block
        return self.first_block, self.end_block


@dataclass(frozen=True, slots=True)
class ModelIndexRecord:
    """That a model is served, and among how many shards its nodes' records are spread."""

    peer_id: PeerId = wire(1, PEER)
    model_name: str = wire(2, MODEL_NAME)
    model_revision: bytes = wire(3, Bytes(REVISION_BYTES, REVISION_BYTES))
    number_of_blocks: int = wire(4, Uint(MAX_BLOCKS))
    shards: int = wire(5, Uint(MAX_SHARDS))
    hidden_size: int = wire(6, Uint(1 << 20))
    sequence: int = wire(7, COUNT)
    expires_unix_s: int = wire(8, COUNT)


@dataclass(frozen=True, slots=True)
class TombstoneRecord:
    """One witness's word that nodes of a model answer nobody any more.

    It counts only together with that of other witnesses (``swarm.tombstones``).
    """

    peer_id: PeerId = wire(1, PEER)
    """The witness."""
    model_revision: bytes = wire(2, Bytes(REVISION_BYTES, REVISION_BYTES))
    groups: int = wire(3, Uint(MAX_SHARDS))
    group: int = wire(4, Uint(MAX_SHARDS))
    """``shard_of(lost peer, groups)``, the same for all of them."""
    lost_peers: tuple[str, ...] = wire(5, Array(PEER, MAX_TOMBSTONES))
    lost_sequences: tuple[int, ...] = wire(6, Array(COUNT, MAX_TOMBSTONES))
    """Of the record of each lost peer that was the newest; a newer one shows that it lives."""
    sequence: int = wire(7, COUNT)
    expires_unix_s: int = wire(8, COUNT)


SelfContained = CatalogueRecord | ProviderRecord | CharterRecord | RevocationRecord
"""Records that know their key and their rules themselves."""
Record = NodeRecord | ModelIndexRecord | TombstoneRecord | SelfContained

_SCHEMAS: dict[int, Schema[Any]] = {
    1: Schema(NodeRecord),
    2: Schema(ModelIndexRecord),
    3: Schema(TombstoneRecord),
    60: Schema(CatalogueRecord),
    61: Schema(ProviderRecord),
    80: Schema(CharterRecord),
    81: Schema(RevocationRecord),
}
RECORD_TYPES: tuple[type[Any], ...] = tuple(schema.owner for schema in _SCHEMAS.values())
_KINDS: dict[type, int] = {schema.owner: kind for kind, schema in _SCHEMAS.items()}


def shard_of(peer_id: PeerId, shards: int) -> int:
    """The shard of a peer's records: SHA-256 of the peer id's text, first 8 bytes, modulo."""
    digest = hashlib.sha256(peer_id.encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") % shards


def shard_key(model_revision: bytes, shard: int) -> str:
    """Directory key of the node records in one shard of a model."""
    return f"sovereign-swarm/v1/nodes/{model_revision.hex()}/{shard}"


def model_index_key() -> str:
    """Directory key of all model index records."""
    return "sovereign-swarm/v1/models"


def tombstone_groups(shards: int) -> int:
    """Among how many keys the tombstones of a model with so many shards are spread."""
    return max(1, shards // SHARDS_PER_TOMBSTONE_GROUP)


def tombstone_key(model_revision: bytes, group: int) -> str:
    """Directory key of the tombstones of one group of a model's nodes."""
    return f"sovereign-swarm/v1/tombstones/{model_revision.hex()}/{group}"


def expected_key(record: Record) -> str:
    """The only key under which this record may be stored."""
    if isinstance(record, SelfContained):
        return record.key
    if isinstance(record, ModelIndexRecord):
        return model_index_key()
    if isinstance(record, TombstoneRecord):
        return tombstone_key(record.model_revision, record.group)
    return shard_key(record.model_revision, shard_of(record.peer_id, record.shards))


def sign_record(identity: Identity, record: Record) -> bytes:
    """The bytes to store. Raises UsageError for a record that every peer would drop."""
    problem = _problem(record)
    if problem or record.peer_id != identity.peer_id:
        raise UsageError(problem or "a record is signed by the peer that it speaks of")
    kind = _KINDS[type(record)]
    payload: bytes = msgpack.packb(_SCHEMAS[kind].to_map(record))
    signature = identity.sign(SIGNATURE_CONTEXT, bytes([kind]) + payload)
    value: bytes = msgpack.packb([kind, payload, signature])
    if len(value) > MAX_RECORD_BYTES:
        raise UsageError(
            f"the record has {len(value)} bytes, {MAX_RECORD_BYTES} are allowed:"
            " announce fewer addresses or adapters"
        )
    return value


def open_record(value: bytes, *, now_unix_s: float, expected_peer: PeerId | None = None) -> Record:
    """Decode and check a record. ``expected_peer`` owns the subkey where it was found.

    Raises RecordError, and nothing else, for any bytes that are not a valid, live record.
    """
    record = verify_record(value, expected_peer)
    check_lifetime(record, now_unix_s)
    return record


def verify_record(value: bytes, expected_peer: PeerId | None = None) -> Record:
    """As ``open_record``, but for what changes with time: the same bytes give the same answer."""
    if len(value) > MAX_VALUE_BYTES:
        raise RecordError("too large")
    try:
        kind, payload, signature, passport = _open_envelope(value)
        if len(value) - len(passport) > MAX_RECORD_BYTES + 8:
            raise RecordError("too large")
        schema = _SCHEMAS.get(kind)
        if schema is None:
            raise RecordError("unknown kind")
        record: Record = schema.from_map(unpack(payload))
        if expected_peer is not None and record.peer_id != expected_peer:
            raise RecordError("the record of another peer")
        problem = _problem(record)
        if problem:
            raise RecordError(problem)
        verify(record.peer_id, SIGNATURE_CONTEXT, bytes([kind]) + payload, signature)
    except RecordError:
        raise
    except ProtocolError as error:
        raise RecordError(error.detail) from error
    return record


def check_lifetime(record: Record, now_unix_s: float) -> None:
    """Raises RecordError for a record that has expired or expires too late."""
    if not now_unix_s < record.expires_unix_s <= now_unix_s + MAX_LIFETIME_S:
        raise RecordError("expired, or expires too late")


def with_passport(value: bytes, passport: bytes) -> bytes:
    """A signed record of ours together with our passport, for a swarm that asks for one."""
    if not passport:
        return value
    kind, payload, signature, _ = _open_envelope(value)
    result: bytes = msgpack.packb([kind, payload, signature, passport])
    return result


def passport_of(value: bytes) -> bytes:
    """The passport that came with a record; empty if there is none. Raises RecordError."""
    try:
        return _open_envelope(value)[3]
    except RecordError:
        raise
    except ProtocolError as error:
        raise RecordError(error.detail) from error


def _open_envelope(value: bytes) -> tuple[int, bytes, bytes, bytes]:
    """Kind, payload, signature, and the passport that may stand behind them."""
    envelope = unpack(value)
    if type(envelope) is not list or len(envelope) not in (3, 4):
        raise RecordError("not a signed record")
    kind, payload, signature = envelope[:3]
    passport = envelope[3] if len(envelope) == 4 else b""
    if type(passport) is not bytes or (
        len(envelope) == 4 and not 0 < len(passport) <= MAX_PASSPORT_BYTES
    ):
        raise RecordError("what stands behind the signature is no passport")
    if type(kind) is not int or type(payload) is not bytes or type(signature) is not bytes:
        raise RecordError("not a signed record")
    if len(signature) != SIGNATURE_BYTES:
        raise RecordError("not signed")
    return kind, payload, signature, passport


def _problem(record: Record) -> str:
    """What is wrong with a record beyond the bounds of single fields; empty if nothing is."""
    try:
        public_key_from_peer_id(record.peer_id)
    except ProtocolError as error:
        return error.detail
    if isinstance(record, SelfContained):
        return record.problem()
    if isinstance(record, TombstoneRecord):
        return _tombstone_problem(record)
    if not record.model_name:
        return "the model has no name"
    if record.number_of_blocks < 1 or record.shards < 1:
        return "a model has at least one block and one shard"
    if isinstance(record, ModelIndexRecord):
        return "" if record.hidden_size >= 1 else "the hidden size is 0"
    if not record.first_block < record.end_block <= record.number_of_blocks:
        return "the span does not lie within the model"
    if not record.minimum_version <= record.maximum_version:
        return "the protocol versions are in the wrong order"
    if record.cache_tokens_free > record.cache_tokens_total:
        return "more cache is free than there is"
    if len(record.passport_hash) not in (0, PASSPORT_HASH_BYTES):
        return "a passport hash has 32 bytes"
    if record.country and not COUNTRY.fullmatch(record.country):
        return "a country has two capital letters"
    target = (record.target_first_block, record.target_end_block)
    if record.state is NodeState.MOVING:
        if not target[0] < target[1] <= record.number_of_blocks:
            return "the target does not lie within the model"
    elif target != (0, 0):
        return "only who moves has a target"
    return ""


def _tombstone_problem(record: TombstoneRecord) -> str:
    if not 0 < len(record.lost_peers) == len(record.lost_sequences):
        return "a tombstone names lost peers, each with its sequence"
    if len(set(record.lost_peers)) < len(record.lost_peers) or record.peer_id in record.lost_peers:
        return "a witness names each other peer once"
    try:
        for peer in record.lost_peers:
            public_key_from_peer_id(PeerId(peer))
    except ProtocolError as error:
        return error.detail
    if record.groups < 1 or any(
        shard_of(PeerId(peer), record.groups) != record.group for peer in record.lost_peers
    ):
        return "a lost peer belongs to another group"
    return ""
