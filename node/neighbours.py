"""What the directory says of the other nodes of our model.

A node sends activations on only to peers that announce the same model: a client cannot make it
dial strangers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from swarm.membership import list_models
from swarm.nodes_view import NodesView
from swarm.ports import Clock, Directory
from swarm.protocol.errors import RecordError
from swarm.protocol.identity import PeerId
from swarm.protocol.records import NodeRecord, open_record, shard_key, shard_of

MAXIMUM_KNOWN = 1024
FRESH_S = 20.0


class Neighbours:
    """Looks peers up, and remembers for a while whom it found."""

    def __init__(
        self,
        directory: Directory,
        clock: Clock,
        model_revision: bytes,
        view: NodesView | None = None,
    ) -> None:
        """Whom ``view`` knows is not looked up; it must be of the same model."""
        self._view = view
        self._directory = directory
        self._clock = clock
        self._model_revision = model_revision
        self._known: OrderedDict[PeerId, tuple[float, Sequence[str]]] = OrderedDict()

    async def resolve(self, peer: PeerId, *, afresh: bool = False) -> Sequence[str] | None:
        """Addresses of a node that hosts our model; None when the directory knows no such node.

        ``afresh`` asks the directory even if they are remembered. Raises NetworkError when the
        directory cannot be asked.
        """
        now_s = self._clock.monotonic_s()
        known = self._known.get(peer)
        if known is not None and now_s < known[0] and not afresh:
            return known[1]
        record = self._view.record(peer) if self._view is not None and not afresh else None
        if record is None:
            record = await self._find(peer)
        if record is None:
            self._known.pop(peer, None)
            return None
        self._known[peer] = (now_s + FRESH_S, record.addresses)
        self._known.move_to_end(peer)
        while len(self._known) > MAXIMUM_KNOWN:
            self._known.popitem(last=False)
        return record.addresses

    async def _find(self, peer: PeerId) -> NodeRecord | None:
        for shards in await self._numbers_of_shards():
            key = shard_key(self._model_revision, shard_of(peer, shards))
            entry = (await self._directory.get(key)).get(peer)
            if entry is None:
                continue
            try:
                record = open_record(
                    entry.value, now_unix_s=self._clock.unix_s(), expected_peer=peer
                )
            except RecordError:
                continue
            if isinstance(record, NodeRecord) and record.model_revision == self._model_revision:
                return record
        return None

    async def _numbers_of_shards(self) -> list[int]:
        """The number that the swarm uses, then those that it may just have left."""
        models = await list_models(self._directory, self._clock)
        agreed = next(
            (model.shards for model in models if model.model_revision == self._model_revision), 1
        )
        return [agreed, 2 * agreed] if agreed == 1 else [agreed, agreed // 2, 2 * agreed]
