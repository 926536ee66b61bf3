"""hivemind's DHT without its trust: bounded decoding, signed records, places nobody chooses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

import msgpack
from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import P2PContext, P2PDaemonError, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.serializer import MSGPackSerializer, SerializerBase
from hivemind.utils.timed_storage import ValueWithExpiration

from swarm.gate import Gate
from swarm.hivemind_network.dht_clock import DHT_CLOCK
from swarm.hivemind_network.introductions import introduce
from swarm.protocol.errors import RecordError, SwarmError
from swarm.protocol.identity import PeerId
from swarm.protocol.membership_records import charter_key
from swarm.record_validation import MAX_ENTRIES_PER_KEY, MAX_KEYS, RecordChecker

logger = logging.getLogger(__name__)

CHARTER_KEY = DHTID.generate(charter_key()).to_bytes()
"""All that strangers may read."""
MAX_KEYS_PER_REQUEST = 512
"""In one directory request of a peer."""


class BoundedSerializer(SerializerBase):  # type: ignore[misc]
    """hivemind's serializer without recursion.

    The original decodes nested tuple extensions recursively in C: 1,437 bytes from a peer end the
    process. Here the only extension is the dictionary of subkeys, and nothing nests inside of it.
    """

    DICTIONARY_CODE = 0x50
    dumps = MSGPackSerializer.dumps  # only ever sees our own objects

    @classmethod
    def loads(cls, buf: bytes) -> object:
        return msgpack.unpackb(buf, raw=False, ext_hook=cls._load_dictionary)

    @classmethod
    def _load_dictionary(cls, code: int, data: bytes) -> DictionaryDHTValue:
        if code != cls.DICTIONARY_CODE:
            raise ValueError(f"extension {code} is not allowed")
        _, _, items = msgpack.unpackb(data, raw=False, ext_hook=_refuse_extension)
        if not isinstance(items, list) or len(items) > MAX_ENTRIES_PER_KEY:
            raise ValueError("not a list of subkeys, or too many of them")
        dictionary = DictionaryDHTValue(MAX_ENTRIES_PER_KEY)
        with dictionary.freeze():
            for subkey, value, expires_unix_s in items:
                if not isinstance(subkey, str) or not isinstance(value, bytes):
                    raise ValueError("a subkey is no text or its value no bytes")
                dictionary.store(subkey, value, float(expires_unix_s))
        return dictionary


def _refuse_extension(code: int, data: bytes) -> object:
    raise ValueError("extensions do not nest")


class SignedRecords(RecordValidatorBase):  # type: ignore[misc]
    """Wires our record checks to hivemind: plain values and foreign subkeys never pass."""

    def __init__(self, checker: RecordChecker, gate: Gate | None = None) -> None:
        self._checker = checker
        self.gate = gate

    def validate(self, record: DHTRecord) -> bool:
        """Whether ``record`` may be kept; any bytes give an answer, never an exception."""
        if record.subkey in DHTProtocol.RESERVED_SUBKEYS:
            return False
        try:
            subkey, value = (
                BoundedSerializer.loads(record.subkey),
                BoundedSerializer.loads(record.value),
            )
        except (ValueError, TypeError, msgpack.UnpackException):
            return False
        if not isinstance(subkey, str) or not isinstance(value, bytes):
            return False
        try:
            self._checker.check(
                lambda key: bool(DHTID.generate(key).to_bytes() == record.key),
                PeerId(subkey),
                value,
                record.expiration_time,
                now_unix_s=DHT_CLOCK.unix_s(),
            )
        except RecordError as error:
            logger.debug("dropped a record of %s: %s", subkey[:64], error.detail)
            return False
        return True


class BoundedStorage(DHTLocalStorage):  # type: ignore[misc]
    """hivemind's storage, bounded in keys and in subkeys per key.

    What a peer repeats is refused before hivemind pushes it on a heap that only time empties.
    """

    def __init__(self) -> None:
        super().__init__(maxsize=MAX_KEYS)

    def store_subkey(self, key: DHTID, subkey: str, value: bytes, expires_unix_s: float) -> bool:
        known = self.get(key)
        if known is not None:
            entry = known.value.get(subkey)
            if entry is None and len(known.value) >= MAX_ENTRIES_PER_KEY:
                return False
            if entry is not None and entry.expiration_time >= expires_unix_s:
                return bool(entry.value == value)
        return bool(super().store_subkey(key, subkey, value, expires_unix_s))


def directory_id(peer: PeerID) -> DHTID:
    """A peer's place in the DHT follows from its key; nobody chooses where to sit."""
    return DHTID.generate(peer.to_bytes())


class SwarmDirectory(DHTProtocol):  # type: ignore[misc]
    """hivemind's DHT protocol with its gaps closed; its class name is part of the wire names."""

    serializer = BoundedSerializer
    _rpc_handlers = None  # not those that were collected for the base class
    _stub_type = None
    closed = False

    @classmethod
    async def create(cls, *arguments: Any, **keywords: Any) -> SwarmDirectory:
        protocol: SwarmDirectory = await super().create(*arguments, **keywords)
        # One storage for both purposes: entries that peers push "into the cache" would otherwise
        # hide what the storage holds.
        protocol.storage = protocol.cache = BoundedStorage()
        return protocol

    async def clock_offset_s(self, peer: PeerID) -> float | None:
        """By how much the peer's clock is ahead of this computer's; None without an answer."""
        request = dht_pb2.PingRequest(peer=self.node_info, validate=False)
        asked_unix_s = time.time()
        try:
            answer = await self.get_stub(peer).rpc_ping(request, timeout=self.wait_timeout)
        except Exception as error:  # as hivemind's own calls: whatever its layers raise
            logger.debug("%s does not say the time: %s", peer, error)
            return None
        return float(answer.dht_time - (asked_unix_s + time.time()) / 2)

    def get_stub(self, peer: PeerID) -> Any:
        if self.closed:
            raise P2PDaemonError("the network is closed")
        return super().get_stub(peer)

    def _validate_dictionary(self, key_bytes: bytes, dictionary: DictionaryDHTValue) -> bool:
        """Drop the bad entries, where hivemind drops all entries because of a bad one."""
        with dictionary.freeze():
            for subkey, (value, expires_unix_s) in list(dictionary.items()):
                record = DHTRecord(key_bytes, self.serializer.dumps(subkey), value, expires_unix_s)
                if not self.record_validator.validate(record):
                    del dictionary[subkey]
            return bool(dictionary)

    @property
    def gate(self) -> Gate | None:
        validator: SignedRecords | None = self.record_validator
        return None if validator is None else validator.gate

    async def _is_introduced(self, peer: PeerID) -> bool:
        """Whether we and the peer know each other's passports, where the swarm asks for them."""
        gate = self.gate
        if gate is None or not gate.enforces:
            return True
        peer_id = PeerId(peer.to_base58())
        shown = self.__dict__.setdefault("_shown", set())
        if peer in shown and gate.admits(peer_id):
            return True
        try:
            await introduce(self.p2p, peer_id, gate)
        except SwarmError as error:
            logger.info("%s and we do not let each other in: %s", peer_id, error)
            return False
        shown.add(peer)
        return True

    def _admits(self, context: P2PContext) -> bool:
        gate = self.gate
        return gate is None or gate.admits(PeerId(context.remote_id.to_base58()))

    async def call_find(self, peer: PeerID, keys: Iterable[DHTID]) -> dict[DHTID, Any] | None:
        """As hivemind's, but what the peer says of ages and of others' ids is not believed."""
        if not await self._is_introduced(peer):
            return None
        found = await super().call_find(peer, keys)
        if found is None:
            self.__dict__.get("_shown", set()).discard(peer)  # it may have forgotten us
            return None
        checked = {}
        for key, (entry, nearest) in found.items():
            if entry is not None:
                latest = max(item.expiration_time for _, item in entry.value.items())
                entry = ValueWithExpiration(entry.value, latest)
            checked[key] = (
                entry,
                {node: peer for node, peer in nearest.items() if node == directory_id(peer)},
            )
        return checked

    async def update_routing_table(
        self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True
    ) -> None:
        if node_id is not None and node_id != directory_id(peer_id):
            logger.debug("%s claims a place in the directory that is not its own", peer_id)
            return
        await super().update_routing_table(node_id, peer_id, responded)

    async def call_store(self, *arguments: Any, **keywords: Any) -> list[bool] | None:
        """A refusal counts as no answer: hivemind then asks further peers, and one of them that
        refuses does not make a failure of what others took."""
        if not await self._is_introduced(arguments[0] if arguments else keywords["peer"]):
            return None
        taken = await super().call_store(*arguments, **keywords)
        return list(taken) if taken and any(taken) else None

    async def rpc_store(
        self, request: dht_pb2.StoreRequest, context: P2PContext
    ) -> dht_pb2.StoreResponse:
        """Key by key, so that our event loop never stops for more than one key's signatures."""
        _check_length(request.keys)
        if not self._admits(context):
            raise ValueError("a stranger")
        answer = dht_pb2.StoreResponse(peer=self.node_info)
        columns = zip(
            request.keys,
            request.subkeys,
            request.values,
            request.expiration_time,
            request.in_cache,
            strict=True,
        )
        for number, (key, subkey, value, expires_unix_s, in_cache) in enumerate(columns):
            single = dht_pb2.StoreRequest(
                keys=[key],
                subkeys=[subkey],
                values=[value],
                expiration_time=[expires_unix_s],
                in_cache=[in_cache],
                peer=request.peer if number == 0 else None,
            )
            part = await super().rpc_store(single, context)
            answer.store_ok.extend(part.store_ok)
            await asyncio.sleep(0)
        return answer

    async def rpc_find(
        self, request: dht_pb2.FindRequest, context: P2PContext
    ) -> dht_pb2.FindResponse:
        _check_length(request.keys)
        if not self._admits(context) and list(request.keys) != [CHARTER_KEY]:
            raise ValueError("a stranger")
        return await super().rpc_find(request, context)


def _check_length(keys: Sequence[bytes]) -> None:
    if len(keys) > MAX_KEYS_PER_REQUEST:
        raise ValueError("too many keys in one request")
