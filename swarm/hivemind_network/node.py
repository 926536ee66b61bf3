"""hivemind's DHT node with lookups that cost what they should."""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID

from swarm.hivemind_network.directory import BoundedSerializer
from swarm.ports import DirectoryEntry
from swarm.protocol.identity import PeerId

KEEPERS = 5
"""Peers that keep a key; hivemind's number of replicas."""
KEEPERS_ASKED = 3
KEEPERS_AGE_S = 1800.0
MAX_KEYS = 1024
"""Whose keepers are remembered."""

Found = Callable[[DHTID, list[DHTID], set[DHTID]], Awaitable[None]]


class SwarmNode(DHTNode):  # type: ignore[misc]
    """Finds who keeps a key without being sent what they keep, and remembers it for a while."""

    _keepers: OrderedDict[str, tuple[float, list[PeerID]]]

    async def find_nearest_nodes(
        self, queries: Collection[DHTID], *, found_callback: Found | None = None, **options: Any
    ) -> dict[DHTID, dict[DHTID, PeerID]]:
        """As hivemind's. There, each peer on the way sends all that it keeps under the key, and
        then it is thrown away; nobody keeps anything under the key's neighbour, and the same peers
        are nearest to it."""
        of_neighbour = {DHTID(int(query) ^ 1): query for query in queries}
        if found_callback is not None:

            async def found_neighbour(
                neighbour: DHTID, nearest: list[DHTID], visited: set[DHTID]
            ) -> None:
                await found_callback(of_neighbour[neighbour], nearest, visited)

            options["found_callback"] = found_neighbour
        nearest = await super().find_nearest_nodes(list(of_neighbour), **options)
        return {of_neighbour[neighbour]: peers for neighbour, peers in nearest.items()}

    async def ask_keepers(
        self, key: str, until_unix_s: float
    ) -> dict[PeerId, DirectoryEntry] | None:
        """What a few random peers that keep ``key`` have; None when none of them answers.

        Stops at the first one with an entry that expires after ``until_unix_s``.
        """
        key_id = DHTID.generate(key)
        keepers = await self._keepers_of(key, key_id)
        entries: dict[PeerId, DirectoryEntry] = {}
        answers = 0
        for keeper in random.sample(keepers, min(KEEPERS_ASKED, len(keepers))):
            found = await self.protocol.call_find(keeper, [key_id])
            if found is None:
                continue
            answers += 1
            item, _ = found[key_id]
            if item is None or not hasattr(item.value, "items"):
                continue
            for subkey, (value, expires_unix_s) in item.value.items():
                known = entries.get(subkey)
                if known is None or known.expires_unix_s < expires_unix_s:
                    content = BoundedSerializer.loads(value)
                    if isinstance(content, bytes):
                        entries[PeerId(subkey)] = DirectoryEntry(content, expires_unix_s)
            if item.expiration_time > until_unix_s:
                return entries
        if entries or not answers:  # they are not told any more, or gone: others keep it now
            self._keepers.pop(key, None)
        return entries if answers else None

    async def _keepers_of(self, key: str, key_id: DHTID) -> list[PeerID]:
        if not hasattr(self, "_keepers"):
            self._keepers = OrderedDict()
        now_s = time.monotonic()
        known = self._keepers.get(key)
        if known is not None and now_s - known[0] < KEEPERS_AGE_S:
            return known[1]
        nearest = await self.find_nearest_nodes([key_id], k_nearest=KEEPERS, exclude_self=True)
        keepers = list(nearest[key_id].values())
        self._keepers[key] = (now_s, keepers)
        self._keepers.move_to_end(key)
        while len(self._keepers) > MAX_KEYS:
            self._keepers.popitem(last=False)
        return keepers
