"""Whom this peer lets in, and what it shows others: charter, passport, revocations.

One gate belongs to one peer of a swarm that has a charter. Connections ask it at their Hello,
directories before they keep, read or pass on a record. A peer without a gate belongs to a swarm
without a charter: everybody is let in, and shows nothing.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Protocol
from weakref import WeakSet

from swarm.ports import Clock
from swarm.protocol.errors import ConfigError, ErrorCode, ProtocolError
from swarm.protocol.identity import PeerId
from swarm.protocol.passport import (
    AdmissionMode,
    Charter,
    Passport,
    RevocationPage,
    check_passport,
    open_charter,
    passport_hash,
    succeeds,
    unseal,
)

log = logging.getLogger(__name__)

MAX_KNOWN = 16384


class Closable(Protocol):
    """A live connection with a peer."""

    @property
    def peer(self) -> PeerId: ...

    async def close(self) -> None: ...


class Revocations:
    """The newest complete revocation list that an authority signed."""

    def __init__(self) -> None:
        self.number = 0
        self.pages: tuple[bytes, ...] = ()
        """As sealed; to be passed on."""
        self._serials: frozenset[bytes] = frozenset()

    def __contains__(self, serial: bytes) -> bool:
        return serial in self._serials

    def __len__(self) -> int:
        return len(self._serials)

    def adopt(self, sealed_pages: Iterable[bytes], charter: Charter) -> bool:
        """Take over a complete, newer list of an authority; False if it is none."""
        found: dict[int, tuple[bytes, RevocationPage]] = {}
        for sealed in sealed_pages:
            try:
                page, signer = unseal(RevocationPage, charter.swarm_id, sealed)
            except ProtocolError as error:
                log.info("a page of revocations is dropped: %s", error)
                continue
            known = found.get(page.page)
            if signer in charter.authorities and (known is None or known[1].number < page.number):
                found[page.page] = (sealed, page)
        pages = [page for _, page in found.values()]
        if not pages or max(page.number for page in pages) <= self.number:
            return False
        number = max(page.number for page in pages)
        if {page.number for page in pages} != {number} or len(pages) != pages[0].pages:
            return False  # the rest is still on its way
        self.number = number
        self.pages = tuple(found[index][0] for index in sorted(found))
        self._serials = frozenset(serial for page in pages for serial in page.serials)
        return True


class Gate:
    """See the module."""

    def __init__(
        self, sealed_charter: bytes, passport: bytes, own_peer: PeerId, clock: Clock
    ) -> None:
        """Raises ConfigError for a charter that is not valid."""
        try:
            self.charter: Charter = open_charter(sealed_charter)
        except ProtocolError as error:
            raise ConfigError(f"the charter is not valid: {error.detail}") from error
        self.sealed_charter = sealed_charter
        self.passport = passport
        """What we show; empty when we have none."""
        self.revocations = Revocations()
        self.refused: list[tuple[PeerId, ErrorCode]] = []
        self._own_peer = own_peer
        self._clock = clock
        self._known: OrderedDict[PeerId, bytes] = OrderedDict()
        self._live: WeakSet[Closable] = WeakSet()

    @property
    def enforces(self) -> bool:
        """Whether strangers are kept out."""
        return self.charter.admission is not AdmissionMode.OPEN

    @property
    def passport_hash(self) -> bytes:
        return passport_hash(self.passport)

    def own_passport(self) -> Passport | None:
        """What others will make of ours; None without one. Raises ProtocolError for a bad one."""
        if not self.passport and self._own_peer not in self.charter.authorities:
            return None
        return self._check(self._own_peer, self.passport)

    def check(self, peer: PeerId, passport: bytes, swarm_id: bytes) -> Passport | None:
        """Let a peer in by what it shows; None for a stranger in an open swarm.

        Raises ProtocolError(WRONG_SWARM or PASSPORT_...).
        """
        if swarm_id and swarm_id != self.charter.swarm_id:
            raise ProtocolError(ErrorCode.WRONG_SWARM)
        if not passport and not self.enforces and peer not in self.charter.authorities:
            return None
        checked = self._check(peer, passport)
        self._known[peer] = passport
        self._known.move_to_end(peer)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return checked

    def known(self, peer: PeerId) -> Passport | None:
        """The passport that a peer has shown, if it is still worth something."""
        if peer == self._own_peer:
            passport = self.passport
        elif peer in self.charter.authorities:
            passport = b""
        elif peer in self._known:
            passport = self._known[peer]
        else:
            return None
        try:
            return self._check(peer, passport)
        except ProtocolError:
            return None

    def admits(self, peer: PeerId) -> bool:
        """Whether a peer may take part, by what it has shown so far."""
        return not self.enforces or self.known(peer) is not None

    def _check(self, peer: PeerId, passport: bytes) -> Passport:
        return check_passport(
            passport,
            self.charter,
            peer,
            now_unix_s=self._clock.unix_s(),
            is_revoked=self.revocations.__contains__,
        )

    # --- changes
    def adopt_charter(self, sealed: bytes) -> bool:
        """Take over a later charter; False if it is none of ours."""
        later = succeeds(sealed, self.charter)
        if later is None:
            return False
        log.info("charter %d of %s is in force", later.version, later.name)
        self.charter, self.sealed_charter = later, sealed
        return True

    def adopt_revocations(self, sealed_pages: Collection[bytes]) -> bool:
        """Take over a newer list; False if it is none."""
        if not self.revocations.adopt(sealed_pages, self.charter):
            return False
        log.info("%d certificates are revoked", len(self.revocations))
        return True

    def watch(self, connection: Closable) -> None:
        """Close this connection when its peer loses the right to it."""
        self._live.add(connection)

    async def close_unwanted(self) -> None:
        """Close connections with peers that may no longer take part."""
        for connection in tuple(self._live):
            if not self.admits(connection.peer) or self._is_revoked(connection.peer):
                log.info("%s may no longer take part", connection.peer)
                await connection.close()

    def _is_revoked(self, peer: PeerId) -> bool:
        """In an open swarm too: who showed a passport that was revoked has to leave."""
        return peer in self._known and self.known(peer) is None


GateOf = Callable[[PeerId], Gate | None]
"""How a process makes the gate of its peer, once its peer id is known."""
