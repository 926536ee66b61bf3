"""Charter and revocation list by way of the directory: read, checked, kept, brought to others.

The authority need not be online: every member that has the newest list announces it, as long as few
others do. Whoever adopts a list closes its connections with those who are on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from swarm.gate import Gate
from swarm.membership import EXPIRY_PERIODS, INDEX_PUBLISHERS, RecordReader
from swarm.ports import Clock, Directory
from swarm.protocol.errors import ConfigError, NetworkError
from swarm.protocol.identity import Identity
from swarm.protocol.membership_records import (
    CharterRecord,
    RevocationRecord,
    charter_key,
    revocations_key,
)
from swarm.protocol.passport import RevocationPage, unseal
from swarm.protocol.records import Record, sign_record

log = logging.getLogger(__name__)

READS_PER_PERIOD = 3
"""So that a revocation is in force everywhere within one announce period."""


class RevocationWatch:
    """Keeps a gate young; the application owns the task of ``run``."""

    def __init__(
        self,
        identity: Identity,
        directory: Directory,
        clock: Clock,
        gate: Gate,
        *,
        announce_period_s: float = 30.0,
        keep: Callable[[Gate], None] = lambda _: None,
        brings: bool = True,
    ) -> None:
        """``keep`` writes charter and revocations to the disk. Clients that come and go bring
        nothing to others."""
        self._identity = identity
        self._directory = directory
        self._clock = clock
        self._gate = gate
        self._reader = RecordReader(directory, clock)
        self._period_s = announce_period_s
        self._keep = keep
        self._brings = brings
        self._sequence = 0

    async def run(self) -> None:
        """Look and bring until cancelled. Network errors are logged and tried again."""
        while True:
            try:
                await self.look()
                if self._brings:
                    await self.bring()
            except NetworkError as error:
                log.info("charter and revocations cannot be read now: %s", error)
            await self._clock.sleep(self._period_s / READS_PER_PERIOD)

    async def look(self) -> bool:
        """Read both once, adopt what is newer; whether anything was. Raises NetworkError."""
        changed = False
        for record in await self._reader.read(charter_key()):
            if isinstance(record, CharterRecord):
                changed |= self._gate.adopt_charter(record.charter)
        pages: list[bytes] = []
        page, known_pages = 0, 1
        while page < known_pages:
            found = await self._reader.read(revocations_key(self._gate.charter.swarm_id, page))
            for record in found:
                if isinstance(record, RevocationRecord):
                    pages.append(record.content)
                    known_pages = max(known_pages, self._pages(record.content))
            page += 1
        changed |= self._gate.adopt_revocations(pages)
        if changed:
            try:
                self._keep(self._gate)
            except ConfigError as error:
                log.warning("%s", error)
        await self._gate.close_unwanted()
        return changed

    def _pages(self, sealed: bytes) -> int:
        page, signer = unseal(RevocationPage, self._gate.charter.swarm_id, sealed)
        return page.pages if signer in self._gate.charter.authorities else 0

    async def bring(self) -> None:
        """Announce what we have, unless enough others do. Raises NetworkError."""
        await self._announce(
            charter_key(),
            lambda sequence, expires: CharterRecord(
                self._identity.peer_id, sequence, expires, self._gate.sealed_charter
            ),
            lambda record: (
                isinstance(record, CharterRecord) and record.charter == self._gate.sealed_charter
            ),
        )
        swarm_id = self._gate.charter.swarm_id
        for page, content in enumerate(self._gate.revocations.pages):
            await self._announce(
                revocations_key(swarm_id, page),
                lambda sequence, expires, page=page, content=content: RevocationRecord(  # type: ignore[misc]
                    self._identity.peer_id, swarm_id, page, sequence, expires, content
                ),
                lambda record, content=content: (  # type: ignore[misc]
                    isinstance(record, RevocationRecord) and record.content == content
                ),
            )

    async def is_known(self) -> bool:
        """Whether the directory has all pages of our list. Raises NetworkError."""
        swarm_id = self._gate.charter.swarm_id
        for page, content in enumerate(self._gate.revocations.pages):
            found = await self._reader.read(revocations_key(swarm_id, page))
            if not any(isinstance(r, RevocationRecord) and r.content == content for r in found):
                return False
        return True

    async def _announce(
        self,
        key: str,
        make: Callable[[int, int], CharterRecord | RevocationRecord],
        is_same: Callable[[Record], bool],
    ) -> None:
        others = [
            record
            for record in await self._reader.read(key)
            if is_same(record) and record.peer_id < self._identity.peer_id
        ]
        if len(others) >= INDEX_PUBLISHERS:
            return
        self._sequence = max(self._sequence + 1, int(self._clock.unix_s() * 1000))
        expires_unix_s = int(self._clock.unix_s() + EXPIRY_PERIODS * self._period_s)
        value = sign_record(self._identity, make(self._sequence, expires_unix_s))
        await self._directory.store(key, value, expires_unix_s)
