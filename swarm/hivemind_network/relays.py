"""Being reachable behind a router: places reserved at relays, watched and replaced.

libp2p's daemon can look for relays itself, but wants to know four of them first, waits three
minutes when one of those that it was told is dead, and does not say when one is lost. So we speak
the reservation protocol (circuit relay v2, https://github.com/libp2p/specs/tree/master/relay) and
the daemon does the rest: it accepts what comes through a relay, and punches holes.

A reservation is asked for again every few seconds; that also tells whether the relay lives.

Every p2pd gives places, told to relay or not. Those that were not told to let 128 KiB pass, or two
minutes: no place for a session, and so we do not take it (``relay_daemon`` has the other side).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hivemind.p2p import P2P

from swarm.addresses import host_of, is_global
from swarm.hivemind_network.multiaddresses import decode_address
from swarm.hivemind_network.protobuf import read_delimited, read_fields, write_delimited
from swarm.hivemind_network.requests import connect, disconnect, list_connections, open_stream
from swarm.protocol.errors import NetworkError, PeerUnreachable
from swarm.protocol.identity import PeerId

logger = logging.getLogger(__name__)

HOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/hop"
RESERVE = b"\x08\x00"
STATUS_OK = 100
SHORTEST_CIRCUIT_S = 3600
SMALLEST_CIRCUIT_BYTES = 1 << 30
"""A place at a relay that ends circuits sooner is none."""
RELAYS_WANTED = 3
ADDRESSES_PER_RELAY = 2
CHECK_PERIOD_S = 6.0
RESERVE_TIMEOUT_S = 4.0
OTHERS_AT_A_TIME = 8
FAILURE_COUNTS_S = 5.0
"""A known relay that failed is not asked again for so long: the others first."""
REFUSAL_COUNTS_S = 600.0
"""Some other peer that does not relay is not asked again for so long."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A place at a relay. Others dial ``addresses``; the relay passes them on to us."""

    relay: PeerId
    addresses: tuple[str, ...]


async def reserve(p2p: P2P, relay: PeerId) -> Reservation:
    """Take a place at a connected relay, or keep it. Raises PeerUnreachable."""
    opened = await open_stream(p2p, relay, HOP_PROTOCOL)
    try:
        write_delimited(opened.writer, RESERVE)
        answer = _read_answer(await read_delimited(opened.reader))
    except (OSError, EOFError, ValueError) as error:
        raise PeerUnreachable(f"{relay} gives no place as a relay: {error}") from error
    finally:
        opened.writer.transport.abort()
    if answer.status != STATUS_OK:
        raise PeerUnreachable(f"{relay} gives no place as a relay: status {answer.status}")
    if not answer.lets_sessions_pass:
        raise PeerUnreachable(f"{relay} relays a little only, as peers do that were not told to")
    # The way that we use ourselves, and the relay's further ports on the same host.
    here = opened.connection.address
    same_host = [one for one in answer.addresses if host_of(one) == host_of(here)]
    ways = list(dict.fromkeys((here, *same_host)))[:ADDRESSES_PER_RELAY]
    return Reservation(relay, tuple(f"{way}/p2p/{relay}/p2p-circuit" for way in ways))


@dataclass(slots=True)
class _Answer:
    """What a relay says to RESERVE; a limit of 0 is none."""

    status: int = 0
    addresses: list[str] = field(default_factory=list)
    circuit_s: int = 0
    circuit_bytes: int = 0

    @property
    def lets_sessions_pass(self) -> bool:
        return (self.circuit_s == 0 or self.circuit_s >= SHORTEST_CIRCUIT_S) and (
            self.circuit_bytes == 0 or self.circuit_bytes >= SMALLEST_CIRCUIT_BYTES
        )


def _read_answer(message: bytes) -> _Answer:
    """Raises ValueError."""
    answer = _Answer()
    for number, value in read_fields(message):
        if number == 5 and isinstance(value, int):
            answer.status = value
        if number == 3 and isinstance(value, bytes):  # the reservation
            for inner_number, inner in read_fields(value):
                if inner_number == 2 and isinstance(inner, bytes):
                    answer.addresses.append(decode_address(inner).partition("/p2p/")[0])
        if number == 4 and isinstance(value, bytes):  # the limit of a circuit
            for inner_number, inner in read_fields(value):
                if inner_number == 1 and isinstance(inner, int):
                    answer.circuit_s = inner
                if inner_number == 2 and isinstance(inner, int):
                    answer.circuit_bytes = inner
    return answer


class RelayKeeper:
    """Keeps places at some relays; the network owns the task of ``run``."""

    def __init__(
        self, known: Sequence[str], daemon: Callable[[], P2P], changed: Callable[[], None]
    ) -> None:
        """``known`` are full addresses of relays, which go before any other connected peer."""
        self._known: dict[PeerId, list[str]] = {}
        for address in known:
            base, found, peer = address.rpartition("/p2p/")
            if found:
                self._known.setdefault(PeerId(peer), []).append(base)
        self._daemon = daemon
        self._changed = changed
        self._held: dict[PeerId, Reservation] = {}
        self._failed_s: dict[PeerId, float] = {}
        self._settled = asyncio.Event()

    @property
    def addresses(self) -> tuple[str, ...]:
        """At which others reach us through relays."""
        return tuple(way for reservation in self._held.values() for way in reservation.addresses)

    @property
    def relays(self) -> tuple[PeerId, ...]:
        return tuple(self._held)

    async def settled(self) -> None:
        """Wait for the first reservation, or until all known relays were asked in vain."""
        await self._settled.wait()

    async def run(self) -> None:
        """Until cancelled. Network errors are logged, never raised."""
        while True:
            try:
                await self._round()
            except NetworkError as error:
                logger.debug("relays: %s", error)
            self._settled.set()
            await asyncio.sleep(CHECK_PERIOD_S)

    async def _round(self) -> None:
        await self._try_all(list(self._held))
        known = [peer for peer in self._known if self._may_try(peer, FAILURE_COUNTS_S)]
        await self._try_all(known[: RELAYS_WANTED - len(self._held)])
        if len(self._held) < RELAYS_WANTED:
            connected = dict.fromkeys(
                connection.peer
                for connection in await list_connections(self._daemon())
                if not connection.relayed and is_global(connection.address)
            )
            others = [peer for peer in connected if self._may_try(peer, REFUSAL_COUNTS_S)]
            for peer in others[:OTHERS_AT_A_TIME]:
                if len(self._held) < RELAYS_WANTED and peer not in self._known:
                    await self._try(peer)

    def _may_try(self, peer: PeerId, failure_counts_s: float) -> bool:
        failed_s = self._failed_s.get(peer, -failure_counts_s)
        return peer not in self._held and time.monotonic() - failed_s >= failure_counts_s

    async def _try_all(self, peers: Sequence[PeerId]) -> None:
        async with asyncio.TaskGroup() as group:
            for peer in peers:
                group.create_task(self._try(peer))

    async def _try(self, relay: PeerId) -> None:
        before = self._held.get(relay)
        try:
            async with asyncio.timeout(RESERVE_TIMEOUT_S):
                await connect(self._daemon(), relay, self._known.get(relay, ()))
                self._held[relay] = await reserve(self._daemon(), relay)
            self._settled.set()
        except (NetworkError, TimeoutError) as error:
            logger.debug("relay %s: %s", relay, error or "no answer")
            self._held.pop(relay, None)
            self._failed_s[relay] = time.monotonic()
            if before is not None:
                logger.warning("lost the relay %s", relay)
                await self._forget_connection(relay)
        if self._held.get(relay) != before:
            self._changed()

    async def _forget_connection(self, relay: PeerId) -> None:
        """A connection to a host that vanished would stay for half a minute, and be used."""
        try:
            await disconnect(self._daemon(), relay)
        except NetworkError as error:
            logger.debug("relay %s: %s", relay, error)
