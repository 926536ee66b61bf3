"""A directory in which simulated nodes announce themselves with real, signed records.

For whatever reads a directory, and at most pings nodes, at sizes for which no machine can run them.
Records are signed anew when they are due and somebody looks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from swarm.connection import Connection
from swarm.membership import (
    ANNOUNCE_PERIOD_S,
    EXPIRY_PERIODS,
    INDEX_PUBLISHERS,
    announce_period_s,
)
from swarm.ports import Clock, DirectoryEntry, Stream
from swarm.protocol.errors import NetworkError, UsageError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.messages import Ping, Pong
from swarm.protocol.records import (
    ModelIndexRecord,
    NodeRecord,
    NodeState,
    Record,
    expected_key,
    model_index_key,
    shard_key,
    shard_of,
    sign_record,
)
from swarm.protocol.tensors import DType
from swarm.simulation.population import MODELS, dice_of, draw_volunteers

SHARD_RECORDS = 64
HIDDEN_SIZE = 4096
LONGEST_HELLO_S = 10.0
COUNTRIES = {"AA": "KE", "BB": "IN", "CC": "FR", "DD": "BR", "EE": "TZ", "FF": "SN"}
"""Real ones for those of the population."""


async def answer_pings(stream: Stream) -> None:
    """What a node's service does with the streams of those who watch it."""
    with suppress(NetworkError):
        async with Connection(stream) as connection:
            await connection.answer_hello(LONGEST_HELLO_S)
            while True:
                ping = await connection.receive_only(Ping)
                await connection.send(Pong(nonce=ping.nonce))


class AnnouncedSwarm:
    """``ports.Directory`` over the announcements of one model's nodes."""

    def __init__(self, records: Mapping[Identity, NodeRecord], clock: Clock) -> None:
        """Every record without a valid sequence and expiry: they are filled in here."""
        self._clock = clock
        self._records = {identity.peer_id: (identity, item) for identity, item in records.items()}
        self._shards = 1 << max(0, math.ceil(math.log2(max(len(records) / SHARD_RECORDS, 1))))
        self._period_s = announce_period_s(ANNOUNCE_PERIOD_S, self._shards)
        self._of_key: dict[str, list[PeerId]] = {}
        self._signed: dict[tuple[PeerId, str], tuple[float, DirectoryEntry]] = {}
        self.reads = 0
        self._arrange()

    @property
    def identities(self) -> list[Identity]:
        """Of all nodes."""
        return [identity for identity, _ in self._records.values()]

    @classmethod
    def of(
        cls,
        count: int,
        clock: Clock,
        *,
        seed: int = 0,
        number_of_blocks: int = 80,
        name: str = "Llama-3.3-70B-Instruct",
    ) -> AnnouncedSwarm:
        """``count`` volunteers as ``population`` draws them, placed evenly."""
        dice = dice_of(seed, "announced")
        now_unix_s = int(clock.unix_s())
        records: dict[Identity, NodeRecord] = {}
        first_block = 0
        for index, who in enumerate(draw_volunteers(count, MODELS[number_of_blocks], dice)):
            identity = Identity.generate()
            size = max(1, who.size)
            first_block = first_block if first_block + size <= number_of_blocks else 0
            records[identity] = NodeRecord(
                peer_id=identity.peer_id,
                model_name=name,
                model_revision=bytes([seed % 256]) * 32,
                number_of_blocks=number_of_blocks,
                shards=1,
                first_block=first_block,
                end_block=first_block + size,
                state=NodeState.ONLINE,
                dtype=DType.BFLOAT16,
                minimum_version=1,
                maximum_version=1,
                sequence=0,
                expires_unix_s=0,
                decode_tokens_per_s=int(who.speed_one_session * 10),
                batched_tokens_per_s=int(who.speed * 10),
                cache_tokens_total=65536,
                adapters=("medical-sw", "law-fr") if index % 5 == 0 else (),
                addresses=(f"/ip4/10.{index >> 16}.{index >> 8 & 255}.{index & 255}/tcp/31330",),
                software="0.1.0",
                display_name=f"volunteer {index}",
                organisation=who.organisation,
                country=COUNTRIES[who.country],
                started_unix_s=now_unix_s - dice.randrange(30 * 86400),
                energy_measured=index % 2 == 0,
            )
            first_block = (first_block + size) % number_of_blocks
        return cls(records, clock)

    @property
    def records(self) -> list[NodeRecord]:
        return [record for _, record in self._records.values()]

    def remove(self, peer: PeerId) -> None:
        """It is dead; its last announcement stays until it expires."""
        del self._records[peer]

    def change(self, peer: PeerId, record: NodeRecord) -> None:
        """It announces this from now on, at once."""
        identity, _ = self._records[peer]
        self._records[peer] = identity, record
        for key in [key for key in self._signed if key[0] == peer]:
            del self._signed[key]

    async def store(self, key: str, value: bytes, expires_unix_s: float) -> bool:
        """Raises UsageError: who only reads announces nothing."""
        raise UsageError("this directory is read only")

    async def get(
        self, key: str, *, until_unix_s: float = math.inf
    ) -> Mapping[PeerId, DirectoryEntry]:
        """What nodes have announced under ``key`` and has not expired."""
        self.reads += 1
        now_unix_s = self._clock.unix_s()
        entries = {}
        for peer in self._of_key.get(key, ()):
            signed_unix_s, entry = self._signed.get((peer, key), (-math.inf, None))
            if peer in self._records and now_unix_s - signed_unix_s >= self._period_s:
                entry = self._sign(peer, key, now_unix_s)
                self._signed[peer, key] = now_unix_s, entry
            if entry is not None and entry.expires_unix_s > now_unix_s:
                entries[peer] = entry
        return entries

    def _arrange(self) -> None:
        for number, (peer, (_, record)) in enumerate(self._records.items()):
            key = shard_key(record.model_revision, shard_of(peer, self._shards))
            self._of_key.setdefault(key, []).append(peer)
            if number < INDEX_PUBLISHERS:
                self._of_key.setdefault(model_index_key(), []).append(peer)

    def _sign(self, peer: PeerId, key: str, now_unix_s: float) -> DirectoryEntry:
        identity, node = self._records[peer]
        before_unix_s, _ = self._signed.get((peer, key), (now_unix_s, None))
        node = _after_work(node, now_unix_s - before_unix_s)
        self._records[peer] = identity, node
        sequence = int(now_unix_s * 1000)
        expires_unix_s = int(now_unix_s + EXPIRY_PERIODS * self._period_s)
        record: Record = replace(
            node, shards=self._shards, sequence=sequence, expires_unix_s=expires_unix_s
        )
        if key == model_index_key():
            record = ModelIndexRecord(
                peer_id=peer,
                model_name=node.model_name,
                model_revision=node.model_revision,
                number_of_blocks=node.number_of_blocks,
                shards=self._shards,
                hidden_size=HIDDEN_SIZE,
                sequence=sequence,
                expires_unix_s=expires_unix_s,
            )
        if expected_key(record) != key:
            raise AssertionError("a record under a wrong key")
        return DirectoryEntry(sign_record(identity, record), expires_unix_s)


def _after_work(node: NodeRecord, seconds: float) -> NodeRecord:
    """The node has computed for so long, at a tenth of its speed."""
    tokens = int(seconds * node.decode_tokens_per_s / 10)
    watts = 60 if node.energy_measured else 0
    return replace(
        node,
        decode_block_tokens=node.decode_block_tokens + tokens,
        prefill_block_tokens=node.prefill_block_tokens + 4 * tokens,
        energy_j=node.energy_j + int(watts * seconds),
    )
