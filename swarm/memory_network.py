"""The ports ``Transport`` and ``Directory`` in memory, with links as bad as simulations want them.

Rules that hold here:

- All randomness comes from the seed and the order in which peers join, so under
  ``swarm.virtual_time`` a run can be repeated exactly.
- A stream delivers its bytes in order and once. Loss costs a retransmission, a cut holds bytes back
  until it heals or the stream is given up, a crash breaks the stream.
- A sender waits once ``window_bytes`` of a stream are neither read nor on their way.
- The directory keeps each entry on the few peers nearest to its key, each of which runs the same
  checks as in the real network; entries die with these peers.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice

from swarm.gate import Gate
from swarm.ports import Buffer, Clock, DirectoryEntry, StreamHandler
from swarm.protocol.errors import NetworkError, PeerUnreachable, ProtocolError, RecordError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.membership_records import charter_key
from swarm.protocol.records import with_passport
from swarm.record_validation import MAX_ENTRIES_PER_KEY, MAX_KEYS, RecordChecker
from swarm.virtual_time import LoopClock

logger = logging.getLogger(__name__)

DIRECTORY_REQUEST_BYTES = 200
DIRECTORY_ANSWER_BYTES = 1200
"""An answer without entries: it names the 20 peers nearest to the key."""
KEEPERS_ASKED = 3
"""Of the peers that keep a key, when one answer may be enough."""
KEEPERS_KNOWN_S = 1800.0
"""So long a peer remembers who keeps a key."""
PACKET_BYTES = 64 * 1024
"""Streams are cut into packets of at most this size; a link sends them first come, first served."""


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """One direction between two peers."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    """Up to this much is added to the latency of each packet."""
    rate_bytes_per_s: float = float("inf")
    loss: float = 0.0
    """Share of packets that are lost and sent again after ``retransmit_s``."""
    retransmit_s: float = 0.2


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """What holds for the whole network."""

    link: LinkSettings = LinkSettings()
    """Of all pairs that :meth:`MemoryNetwork.set_link` was not called for."""
    window_bytes: int = 1024 * 1024
    dial_timeout_s: float = 10.0
    give_up_after_s: float = 30.0
    """A stream over a cut link breaks after this."""
    directory_replicas: int = 5
    directory_reads: int = 20
    """So many peers, the nearest to the key, are asked for entries; more than keep them, since
    peers that joined in the meantime may be nearer."""


class MemoryNetwork:
    """All peers and links; ``on_event`` sees dials, packets and directory accesses and when."""

    def __init__(
        self,
        seed: int = 0,
        settings: MemorySettings = MemorySettings(),
        *,
        clock: Clock | None = None,
        on_event: Callable[[float, str], None] | None = None,
    ) -> None:
        self.settings = settings
        self.clock: Clock = clock or LoopClock()
        self.seed = seed
        self._on_event = on_event
        self._peers: dict[PeerId, MemoryPeer] = {}
        self._nearest: dict[str, list[tuple[int, int, MemoryPeer]]] = {}
        self._joined = 0
        self._settings_of_link: dict[tuple[PeerId, PeerId], LinkSettings] = {}
        self._links: dict[tuple[PeerId, PeerId], _Link] = {}
        self._cuts: set[frozenset[PeerId]] = set()
        self._relayed: set[frozenset[PeerId]] = set()

    def join(self, identity: Identity, gate: Gate | None = None) -> MemoryPeer:
        """Add a peer; also one that crashed before, with nothing left of what it knew."""
        if identity.peer_id in self._peers:
            raise ValueError(f"{identity.peer_id} is already in the network")
        peer = MemoryPeer(self, identity.peer_id, self._joined, gate)
        self._joined += 1
        self._peers[peer.peer_id] = peer
        for key, nearest in self._nearest.items():
            insort(nearest, (peer.place ^ _place(key), peer.index, peer))
        return peer

    def set_link(self, one: PeerId, other: PeerId, settings: LinkSettings) -> None:
        """Both directions, from now on."""
        for pair in ((one, other), (other, one)):
            self._settings_of_link[pair] = settings
            if pair in self._links:
                self._links[pair].settings = settings

    def cut(self, one: PeerId, other: PeerId) -> None:
        """No byte passes between the two any more; neither of them is told."""
        self._cuts.add(frozenset((one, other)))

    def partition(self, group: Collection[PeerId]) -> None:
        """Cut all links between ``group`` and the rest."""
        for one in group:
            for other in self._peers:
                if other not in group:
                    self.cut(one, other)

    def heal(self) -> None:
        """Mend all cuts; what was held back goes on its way."""
        self._cuts.clear()
        for link in list(self._links.values()):
            link.release()

    def relay(self, one: PeerId, other: PeerId) -> None:
        """Streams that are opened between the two from now on count as relayed."""
        self._relayed.add(frozenset((one, other)))

    def punch(self, one: PeerId, other: PeerId) -> None:
        """Undo ``relay``; streams that are open stay as they are."""
        self._relayed.discard(frozenset((one, other)))

    def crash(self, peer_id: PeerId) -> None:
        """End a peer as by power failure: its handlers, streams and directory entries are gone."""
        peer = self._peers.pop(peer_id)
        for key, nearest in self._nearest.items():
            del nearest[bisect_left(nearest, (peer.place ^ _place(key), peer.index, peer))]
        self.record(f"crash {peer.index}")
        peer.stop()

    # --- for the peers and streams of this network ---------------------------------------------
    def record(self, event: str) -> None:
        if self._on_event is not None:
            self._on_event(self.clock.monotonic_s(), event)

    def peer(self, peer_id: PeerId) -> MemoryPeer | None:
        """None when no such peer is there (any more)."""
        return self._peers.get(peer_id)

    def is_cut(self, one: PeerId, other: PeerId) -> bool:
        return frozenset((one, other)) in self._cuts

    def is_relayed(self, one: PeerId, other: PeerId) -> bool:
        return frozenset((one, other)) in self._relayed

    def link(self, source: MemoryPeer, target: MemoryPeer) -> _Link:
        pair = (source.peer_id, target.peer_id)
        if pair not in self._links:
            self._links[pair] = _Link(
                partial(self.is_cut, *pair),
                self._settings_of_link.get(pair, self.settings.link),
                random.Random(f"{self.seed}/{source.index}/{target.index}"),  # noqa: S311
            )
        return self._links[pair]

    def round_trip_s(self, one: MemoryPeer, other: MemoryPeer) -> float:
        """One sample for a small message and its answer."""
        if one is other:
            return 0.0
        return self.link(one, other).delay_s(0) + self.link(other, one).delay_s(0)

    def question_s(self, one: MemoryPeer, other: MemoryPeer) -> float:
        """The same for the directory, whose peers ask too many others to keep a link for each."""
        if one is other:
            return 0.0
        delay_s = 0.0
        for pair in ((one.peer_id, other.peer_id), (other.peer_id, one.peer_id)):
            settings = self._settings_of_link.get(pair, self.settings.link)
            delay_s += settings.latency_s + settings.jitter_s * one.dice.random()
            while settings.loss and one.dice.random() < settings.loss:
                delay_s += settings.retransmit_s
        return delay_s

    def nearest(self, key: str, asking: MemoryPeer) -> Iterator[MemoryPeer]:
        """The peers that ``asking`` can reach, those nearest to ``key`` first."""
        nearest = self._nearest.get(key)
        if nearest is None:
            if len(self._nearest) >= MAX_KEYS:
                self._nearest.clear()
            place = _place(key)
            nearest = sorted(
                (peer.place ^ place, peer.index, peer) for peer in self._peers.values()
            )
            self._nearest[key] = nearest
        return (
            peer
            for _, _, peer in nearest
            if not self._cuts or not self.is_cut(asking.peer_id, peer.peer_id)
        )


@lru_cache(maxsize=2 * MAX_KEYS)
def _place(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest())


class _Link:
    """One direction between two peers: when do bytes arrive?"""

    def __init__(
        self, is_cut: Callable[[], bool], settings: LinkSettings, dice: random.Random
    ) -> None:
        self.settings = settings
        self._is_cut = is_cut
        self._dice = dice
        self._free_at_s = 0.0
        self._held_back: list[Callable[[], None]] = []

    def delay_s(self, size_bytes: int) -> float:
        """How long these bytes take, behind what was sent before them."""
        now_s = asyncio.get_running_loop().time()
        settings = self.settings
        self._free_at_s = max(self._free_at_s, now_s) + size_bytes / settings.rate_bytes_per_s
        delay_s = self._free_at_s - now_s + settings.latency_s
        delay_s += settings.jitter_s * self._dice.random()
        while self._dice.random() < settings.loss:
            delay_s += settings.retransmit_s
        return delay_s

    def pass_on(self, arrive: Callable[[], None]) -> None:
        """Run ``arrive`` now, or when the link is mended."""
        if self._is_cut():
            self._held_back.append(arrive)
        else:
            arrive()

    def release(self) -> None:
        held_back, self._held_back = self._held_back, []
        for arrive in held_back:
            arrive()


class _Pipe:
    """One direction of a stream: what is on its way, what has arrived, and how it ended."""

    def __init__(self, network: MemoryNetwork, source: MemoryPeer, target: MemoryPeer) -> None:
        self._network = network
        self._link = network.link(source, target)
        self._name = f"{source.index}>{target.index}"
        self._arrived = bytearray()
        self._unread_bytes = 0  # on their way or arrived
        self._last_arrival_s = 0.0
        self._discarding = False
        self._changed = asyncio.Event()
        self._timers: set[asyncio.TimerHandle] = set()
        self.ended = ""
        """Why no more bytes come; empty while they may."""
        self.opposite: _Pipe | None = None

    async def send(self, content: memoryview) -> None:
        for start in range(0, len(content), PACKET_BYTES):
            packet = bytes(content[start : start + PACKET_BYTES])
            while self._unread_bytes >= self._network.settings.window_bytes and not self.ended:
                await self._changed.wait()
            if self.ended:
                raise NetworkError(self.ended)
            self._unread_bytes += len(packet)
            self._network.record(f"send {self._name} {len(packet)}")
            self._schedule(len(packet), partial(self._arrive, packet))

    async def receive_exactly(self, size_bytes: int) -> bytes:
        content = bytearray()
        try:
            while len(content) < size_bytes:
                if self._arrived:
                    taken = self._arrived[: size_bytes - len(content)]
                    del self._arrived[: len(taken)]
                    content += taken
                    self._unread_bytes -= len(taken)
                    self._notify()
                elif self.ended or self._discarding:
                    raise NetworkError(self.ended or "the stream is closed")
                else:
                    await self._changed.wait()
        except BaseException:  # the next call must find what this one leaves
            self._arrived[:0] = content
            self._unread_bytes += len(content)
            raise
        return bytes(content)

    def end_after_delivery(self, reason: str) -> None:
        """The far end learns of it behind all bytes that were sent before."""
        self._schedule(0, partial(self.end, reason))

    def end(self, reason: str) -> None:
        """Nothing is sent or delivered any more; what has arrived can be read."""
        self.ended = self.ended or reason
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self._notify()

    def discard(self) -> None:
        """The receiver is gone. The sender does not know yet: what it sends arrives nowhere."""
        self._discarding = True
        self._unread_bytes -= len(self._arrived)
        self._arrived.clear()
        self._notify()

    def _schedule(self, size_bytes: int, arrive: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        # Strictly later than the one before: timers that are due together fire in any order.
        self._last_arrival_s = max(
            math.nextafter(self._last_arrival_s, math.inf),
            loop.time() + self._link.delay_s(size_bytes),
        )

        def at_far_end() -> None:
            self._timers.discard(timer)
            give_up = loop.call_later(self._network.settings.give_up_after_s, self._give_up)
            self._timers.add(give_up)

            def passed() -> None:
                give_up.cancel()
                self._timers.discard(give_up)
                if not self.ended:
                    arrive()

            self._link.pass_on(passed)

        timer = loop.call_at(self._last_arrival_s, at_far_end)
        self._timers.add(timer)

    def _give_up(self) -> None:
        for pipe in (self, self.opposite):
            if pipe is not None:
                pipe.end("the link went silent")

    def _arrive(self, packet: bytes) -> None:
        self._network.record(f"arrive {self._name} {len(packet)}")
        if self._discarding:
            self._unread_bytes -= len(packet)
        else:
            self._arrived += packet
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class MemoryStream:
    """``ports.Stream``: one end of two pipes. ``streams`` are all of the peer whose end it is."""

    def __init__(
        self,
        remote_peer: PeerId,
        outgoing: _Pipe,
        incoming: _Pipe,
        streams: dict[MemoryStream, None],
        *,
        relayed: bool,
        gate: Gate | None,
    ) -> None:
        self.gate = gate
        self._remote_peer = remote_peer
        self._relayed = relayed
        self._outgoing = outgoing
        self._incoming = incoming
        self._closed = False
        self._streams = streams
        streams[self] = None

    @property
    def remote_peer(self) -> PeerId:
        return self._remote_peer

    @property
    def relayed(self) -> bool:
        return self._relayed

    async def send(self, *buffers: Buffer) -> None:
        for buffer in buffers:
            if self._closed or self._incoming.ended:
                raise NetworkError(f"the stream to {self._remote_peer} is closed")
            await self._outgoing.send(memoryview(buffer).cast("B"))

    async def receive_exactly(self, size_bytes: int) -> bytes:
        return await self._incoming.receive_exactly(size_bytes)

    async def close(self) -> None:
        self.end("the peer closed the stream")

    def end(self, reason: str) -> None:
        """Bytes on their way still arrive, then the far end learns the reason."""
        if not self._closed:
            self._closed = True
            self._outgoing.end_after_delivery(reason)
            self._incoming.discard()
            self._streams.pop(self, None)


class MemoryPeer:
    """``Transport`` and ``Directory`` of one peer in a :class:`MemoryNetwork`."""

    def __init__(
        self, network: MemoryNetwork, peer_id: PeerId, index: int, gate: Gate | None = None
    ) -> None:
        self.gate = gate
        self.index = index
        self.place = _place(peer_id)
        self.checker = RecordChecker(gate)
        self.dice = random.Random(f"{network.seed}/{index}")  # noqa: S311
        self._keepers_known_until_s: dict[str, float] = {}
        self.directory_bytes_sent = 0
        self.directory_bytes_received = 0
        self.entries: dict[str, dict[PeerId, DirectoryEntry]] = {}
        self._network = network
        self._peer_id = peer_id
        self.handlers: dict[str, StreamHandler] = {}
        self.streams: dict[MemoryStream, None] = {}  # a set with an order
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._alive = True

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    async def addresses(self) -> Sequence[str]:
        return (f"/memory/{self.index}",)

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        self.handlers[protocol] = handler

    async def open(
        self,
        peer: PeerId,
        protocol: str,
        addresses: Sequence[str] = (),
        *,
        direct_within_s: float = 0.0,
    ) -> MemoryStream:
        network = self._network
        target = network.peer(peer)
        if not self._alive or target is None:
            raise PeerUnreachable(f"{peer} is not in the network")
        network.record(f"dial {self.index}>{target.index}")
        if network.is_cut(self._peer_id, peer):
            await network.clock.sleep(network.settings.dial_timeout_s)
            raise PeerUnreachable(f"{peer} did not answer")
        await network.clock.sleep(network.round_trip_s(self, target))
        handler = target.handlers.get(protocol)
        if not self._alive or network.peer(peer) is not target or handler is None:
            raise PeerUnreachable(f"{peer} does not serve {protocol}")
        there, back = _Pipe(network, self, target), _Pipe(network, target, self)
        there.opposite, back.opposite = back, there
        relayed = network.is_relayed(self._peer_id, peer)
        theirs = MemoryStream(
            self._peer_id, back, there, target.streams, relayed=relayed, gate=target.gate
        )
        target.accept(theirs, handler)
        return MemoryStream(peer, there, back, self.streams, relayed=relayed, gate=self.gate)

    async def is_direct(self, peer: PeerId) -> bool | None:
        if self._network.peer(peer) is None:
            return None
        return not self._network.is_relayed(self._peer_id, peer)

    async def store(self, key: str, value: bytes, expires_unix_s: float) -> bool:
        network = self._network
        if self.gate is not None:
            value = with_passport(value, self.gate.passport)
        entry = DirectoryEntry(value, expires_unix_s)
        asked = self._nearest(key, network.settings.directory_reads)
        for peer in asked:
            self._count(peer, DIRECTORY_REQUEST_BYTES, DIRECTORY_ANSWER_BYTES)
        replicas = asked[: network.settings.directory_replicas]
        for replica in replicas:
            self._count(replica, DIRECTORY_REQUEST_BYTES + len(value), 0)
        await self._ask(replicas)
        network.record(f"store {self.index}")
        willing = [peer for peer in replicas if peer.lets_in(self) and self.lets_in(peer)]
        return any([replica.keep(key, self._peer_id, entry) for replica in willing])  # noqa: C419

    async def get(
        self, key: str, *, until_unix_s: float = math.inf
    ) -> Mapping[PeerId, DirectoryEntry]:
        network = self._network
        asked = self._nearest(key, network.settings.directory_reads)
        if until_unix_s < math.inf:
            asked = self._keepers_to_ask(key, asked, until_unix_s)
        await self._ask(asked)
        network.record(f"get {self.index}")
        found: dict[PeerId, DirectoryEntry] = {}
        for replica in asked:
            if key != charter_key() and not (replica.lets_in(self) and self.lets_in(replica)):
                continue
            entries = replica.live_entries(key)
            size_bytes = sum(len(entry.value) for entry in entries.values())
            self._count(replica, DIRECTORY_REQUEST_BYTES, DIRECTORY_ANSWER_BYTES + size_bytes)
            for peer, entry in entries.items():
                best = found.get(peer)
                newer = best is None or entry.expires_unix_s > best.expires_unix_s
                if newer and self._is_valid(key, peer, entry):
                    found[peer] = entry
        return found

    def lets_in(self, other: MemoryPeer) -> bool:
        """Whether ``other`` may use the directory here; they introduce themselves first."""
        if self.gate is None or other is self:
            return True
        shown = other.gate
        try:
            self.gate.check(
                other.peer_id,
                b"" if shown is None else shown.passport,
                b"" if shown is None else shown.charter.swarm_id,
            )
        except ProtocolError:
            return False
        return True

    def _nearest(self, key: str, count: int) -> list[MemoryPeer]:
        return list(islice(self._network.nearest(key, self), count)) if self._alive else []

    def _keepers_to_ask(
        self, key: str, nearest: list[MemoryPeer], until_unix_s: float
    ) -> list[MemoryPeer]:
        """A few of those that keep the key, up to one whose entries live long enough.

        Who they are is looked up and then known for a while; that costs traffic, but here it is
        never out of date.
        """
        now_s = self._network.clock.monotonic_s()
        if self._keepers_known_until_s.get(key, 0.0) <= now_s:
            self._keepers_known_until_s[key] = now_s + KEEPERS_KNOWN_S
            for peer in nearest:
                self._count(peer, DIRECTORY_REQUEST_BYTES, DIRECTORY_ANSWER_BYTES)
        keepers = nearest[: self._network.settings.directory_replicas]
        others = [peer for peer in keepers if peer is not self] or keepers
        asked: list[MemoryPeer] = []
        for peer in self.dice.sample(others, min(KEEPERS_ASKED, len(others))):
            asked.append(peer)
            if peer.keeps_until(key) > until_unix_s:
                break
        return asked

    def keeps_until(self, key: str) -> float:
        """When the last entry that is kept here under ``key`` expires."""
        entries = self.entries.get(key)
        return max(entry.expires_unix_s for entry in entries.values()) if entries else 0.0

    def _count(self, other: MemoryPeer, sent_bytes: int, received_bytes: int) -> None:
        if other is not self:
            self.directory_bytes_sent += sent_bytes
            other.directory_bytes_received += sent_bytes
            self.directory_bytes_received += received_bytes
            other.directory_bytes_sent += received_bytes

    def keep(self, key: str, peer: PeerId, entry: DirectoryEntry) -> bool:
        """Asked to keep an entry of ``peer``: False when it is not valid or not newer."""
        if not self._is_valid(key, peer, entry) or (
            key not in self.entries and len(self.entries) >= MAX_KEYS
        ):
            return False
        self.live_entries(key)
        entries = self.entries.setdefault(key, {})
        known = entries.get(peer)
        if known is None and len(entries) >= MAX_ENTRIES_PER_KEY:
            return False
        if known is not None and known.expires_unix_s >= entry.expires_unix_s:
            return known == entry
        entries[peer] = entry
        return True

    def live_entries(self, key: str) -> dict[PeerId, DirectoryEntry]:
        """What is kept under ``key``; what has expired is dropped."""
        entries = self.entries.get(key, {})
        now_unix_s = self._network.clock.unix_s()
        if (
            min((entry.expires_unix_s for entry in entries.values()), default=math.inf)
            <= now_unix_s
        ):
            entries = {
                peer: entry for peer, entry in entries.items() if entry.expires_unix_s > now_unix_s
            }
            if entries:
                self.entries[key] = entries
            else:
                del self.entries[key]
        return entries

    async def close(self) -> None:
        """Leave: like a crash, but waits until the handlers have ended."""
        if self._alive:
            self._network.crash(self._peer_id)
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        if tasks:
            await asyncio.wait(tasks)

    def stop(self) -> None:
        """Called by the network when this peer crashes."""
        self._alive = False
        self.entries.clear()
        for stream in list(self.streams):
            stream.end("the peer is gone")
        for task in list(self._tasks):
            task.cancel()

    def accept(self, stream: MemoryStream, handler: StreamHandler) -> None:
        """A peer has opened ``stream``: start the handler that owns it."""
        task = asyncio.get_running_loop().create_task(self._handle(stream, handler))
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def _handle(self, stream: MemoryStream, handler: StreamHandler) -> None:
        try:
            await handler(stream)
        except NetworkError as error:
            logger.debug("stream of %s: %s", stream.remote_peer, error)
        except Exception:
            logger.exception("a handler failed for %s", stream.remote_peer)
        finally:
            await stream.close()

    async def _ask(self, replicas: Sequence[MemoryPeer]) -> None:
        """Wait as long as the slowest of them takes to answer."""
        round_trips_s = [self._network.question_s(self, replica) for replica in replicas]
        await self._network.clock.sleep(max(round_trips_s, default=0.0))

    def _is_valid(self, key: str, peer: PeerId, entry: DirectoryEntry) -> bool:
        try:
            self.checker.check(
                lambda expected: expected == key,
                peer,
                entry.value,
                entry.expires_unix_s,
                now_unix_s=self._network.clock.unix_s(),
            )
        except RecordError as error:
            logger.debug("dropped a record of %s: %s", peer, error.detail)
            return False
        return True
