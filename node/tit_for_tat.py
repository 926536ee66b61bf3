"""Whom a node serves first for having served its owner: units received less units given.

The owner's client keeps what it received, this node what it gave. Whoever is ahead is served before
strangers, never more than that: it is priority and no currency, and each node decides by its own
books alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path

from swarm.ledger.node_books import LedgerReader
from swarm.ledger.received import received_from
from swarm.ports import Clock
from swarm.protocol.errors import ConfigError, ProtocolError
from swarm.protocol.identity import public_key_from_peer_id

log = logging.getLogger(__name__)

PERIOD_S = 60.0


class Owed:
    """What is owed to each payer, as of the last look at both books."""

    def __init__(self, given: Path, received: Path | None, clock: Clock) -> None:
        self._given = given
        self._received = received
        self._clock = clock
        self._units: Mapping[str, int] = {}

    def __call__(self) -> Mapping[str, int]:
        return self._units

    async def run(self) -> None:
        """Look again every minute, until cancelled."""
        while True:
            try:
                self._units = await asyncio.to_thread(self._compare)
            except ConfigError as error:
                log.debug("no books to compare yet: %s", error)
            await self._clock.sleep(PERIOD_S)

    def _compare(self) -> dict[str, int]:
        if self._received is None:
            return {}
        reader = LedgerReader.open(self._given)
        try:
            given = reader.given_to()
        finally:
            reader.close()
        return owed(received_from(self._received), given)


def owed(received: Mapping[str, int], given: Mapping[str, int]) -> dict[str, int]:
    """By payer (a public key in hexadecimal): what its node gave us and we did not give back."""
    balance: dict[str, int] = {}
    for node, units in received.items():
        try:
            payer = public_key_from_peer_id(node).hex()
        except ProtocolError:
            continue
        balance[payer] = units - given.get(payer, 0)
    return balance
