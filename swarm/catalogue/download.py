"""Fetches parts of a revision from several peers at once, and checks every chunk.

One task talks to one peer: it asks which chunks the peer holds, keeps a few requests on their way,
and hands what arrives to the store. Which chunk is asked for next: ``chunk_choice``. A peer whose
bytes do not fit their hash is left for good; one that is silent is left for a while, and what it
was asked for goes to others. When all that is missing is on its way already, idle peers are asked
for the oldest requests once more, so that one slow peer does not hold up the end.

What nobody holds comes from a mirror, if there is one. The bytes of a peer are worth nothing until
their hash was checked; who sent them does not matter then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from swarm.catalogue.chunk_choice import choose_chunk, holders, own_chunks, priorities
from swarm.catalogue.chunk_service import InThread
from swarm.catalogue.holdings import ChunkMask
from swarm.catalogue.rate import RateLimit
from swarm.catalogue.store import StoredRevision
from swarm.connection import Connection, remote_error
from swarm.ports import Clock, Transport
from swarm.protocol.errors import (
    ErrorCode,
    NetworkError,
    ProtocolError,
    RemoteError,
    SwarmError,
)
from swarm.protocol.identity import PeerId
from swarm.protocol.manifest import Part
from swarm.protocol.messages import (
    MAX_PAYLOAD_BYTES,
    AskChunks,
    Chunk,
    ChunksHeld,
    Error,
    GetChunk,
    Ping,
    Pong,
)
from swarm.protocol.version import WEIGHTS_PROTOCOL

log = logging.getLogger(__name__)

SPEED_WINDOW_S = 10.0
PROGRESS_PERIOD_S = 1.0
IDLE_S = 30.0
"""A peer of which nothing is wanted is asked so rarely on the stream of its chunks."""


@dataclass(frozen=True, slots=True)
class Source:
    """A peer that says that it sends chunks of the revision."""

    peer_id: PeerId
    addresses: tuple[str, ...] = ()
    is_near: bool = False
    """In the same country or network, by what it declares."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a download has come."""

    bytes_done: int
    bytes_total: int
    peers: int
    """That sent something within the last seconds."""
    bytes_per_s: float

    @property
    def seconds_left(self) -> float | None:
        """At the present speed; None while there is none."""
        if self.bytes_per_s <= 0:
            return None
        return (self.bytes_total - self.bytes_done) / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class DownloadLimits:
    """How a download behaves towards peers."""

    peers: int = 8
    requests_per_peer: int = 2
    stall_s: float = 12.0
    """A peer that sends nothing for so long, or for six times what a chunk takes, is left."""
    stalled_pause_s: float = 30.0
    shortest_pause_s: float = 1.0
    """Before a peer that could not be reached is tried again; doubles up to ``longest_pause_s``."""
    longest_pause_s: float = 8.0
    discover_s: float = 3.0
    ask_again_s: float = 0.5
    connect_s: float = 10.0
    mirror_after_s: float = 4.0
    """So long nobody must hold a chunk before the mirror is asked for it."""
    give_up_s: float | None = 120.0
    """Without a single chunk in so long, the download fails; None: never."""


class Mirror(Protocol):
    """Somewhere beside the swarm where chunks lie: a folder or a web server."""

    @property
    def name(self) -> str: ...

    async def chunk(self, digest: bytes, size_bytes: int) -> bytes | None:
        """The chunk with this hash, unchecked; None when it is not there."""


@dataclass(slots=True)
class _Peer:
    """A peer that we talk to now."""

    source: Source
    held: ChunkMask
    coming: ChunkMask
    expected: deque[int | None] = field(default_factory=deque)
    """What we wait for, in the order in which it was asked: chunks, or None for ChunksHeld."""
    heard_s: float = 0.0
    is_followed: bool = False
    """Whether we hear on another stream what it holds."""


@dataclass(slots=True)
class _Past:
    """What became of a peer before."""

    failures: int = 0
    not_before_s: float = 0.0
    is_liar: bool = False


class Download:
    """One revision's missing chunks on their way; ``run`` ends when all are here."""

    def __init__(
        self,
        stored: StoredRevision,
        parts: Iterable[Part],
        *,
        transport: Transport,
        clock: Clock,
        find_sources: Callable[[], Awaitable[Sequence[Source]]],
        rate: RateLimit | None = None,
        mirrors: Sequence[Mirror] = (),
        limits: DownloadLimits | None = None,
        in_thread: InThread = asyncio.to_thread,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._on_progress = on_progress
        self._stored = stored
        self._manifest = stored.manifest
        self._parts = tuple(parts)
        self._transport = transport
        self._clock = clock
        self._find_sources = find_sources
        self._rate = rate or RateLimit(None, clock)
        self._mirrors = tuple(mirrors)
        self._limits = limits or DownloadLimits()
        self._in_thread = in_thread
        chunks = self._manifest.number_of_chunks
        self._wanted: ChunkMask = np.zeros(chunks, dtype=np.bool_)
        self._wanted[list(self._manifest.chunks_of(self._parts))] = True
        self._order = priorities(transport.peer_id, chunks)
        self._own: ChunkMask = np.ones(chunks, dtype=np.bool_)
        self._asked: dict[int, dict[PeerId, float]] = {}
        self._peers: dict[PeerId, _Peer] = {}
        self._past: dict[PeerId, _Past] = {}
        self._arrivals: deque[tuple[float, PeerId | None, int]] = deque()
        self._progress_s = 0.0
        self._chunk_s = 1.0
        self._changed = asyncio.Event()
        self._finished = asyncio.Event()
        self.received_bytes = 0
        """From peers and mirrors, also what was thrown away."""
        self.liars: set[PeerId] = set()
        """Peers whose bytes did not fit their hash."""
        self.from_mirrors = 0
        """Chunks."""

    async def run(self) -> None:
        """Fetch until all parts are complete. Cancelling is safe: what is here stays.

        Raises NetworkError when nobody sends anything for too long, CheckpointError when the disk
        does not take it.
        """
        self._stored.complete_empty(self._parts)
        if not self._missing().any():
            return
        self._progress_s = self._clock.monotonic_s()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._discover(group))
                group.create_task(self._tell())
                for mirror in self._mirrors:
                    group.create_task(self._use_mirror(mirror))
                await self._finished.wait()
                raise _Finished
        except* _Finished:
            pass
        except* SwarmError as errors:
            raise _first(errors) from None
        finally:
            self._stored.coming[:] = False

    def progress(self) -> Progress:
        """As of now."""
        now_s = self._clock.monotonic_s()
        while self._arrivals and self._arrivals[0][0] < now_s - SPEED_WINDOW_S:
            self._arrivals.popleft()
        recent_bytes = sum(size for _, _, size in self._arrivals)
        span_s = now_s - self._arrivals[0][0] if self._arrivals else 0.0
        sizes = self._sizes()
        return Progress(
            bytes_done=int(sizes[self._wanted & self._stored.held].sum()),
            bytes_total=int(sizes[self._wanted].sum()),
            peers=len({peer for _, peer, _ in self._arrivals if peer is not None}),
            bytes_per_s=recent_bytes / max(span_s, 1.0),
        )

    async def _tell(self) -> None:
        while self._on_progress is not None:
            self._on_progress(self.progress())
            await self._clock.sleep(PROGRESS_PERIOD_S)

    def _sizes(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        sizes = np.full(self._manifest.number_of_chunks, self._manifest.chunk_bytes, dtype=np.int64)
        for first, part in zip(self._manifest.first_chunks, self._manifest.parts, strict=True):
            if part.chunks:
                last = len(part.chunks) - 1
                sizes[first + last] = part.size_bytes - last * self._manifest.chunk_bytes
        return sizes

    def _missing(self) -> ChunkMask:
        return self._wanted & ~self._stored.held

    # --- peers
    async def _discover(self, group: asyncio.TaskGroup) -> None:
        """Start to fetch from peers as they become known; ends the download that nobody serves."""
        while True:
            try:
                sources = await self._find_sources()
            except NetworkError as error:
                log.info("the directory cannot be asked for sources: %s", error)
                sources = ()
            now_s = self._clock.monotonic_s()
            for source in sorted(sources, key=self._rank):
                past = self._past.setdefault(source.peer_id, _Past())
                if (
                    source.peer_id == self._transport.peer_id
                    or source.peer_id in self._peers
                    or past.is_liar
                    or past.not_before_s > now_s
                    or len(self._peers) >= self._limits.peers
                ):
                    continue
                nothing: ChunkMask = np.zeros(self._manifest.number_of_chunks, dtype=np.bool_)
                peer = _Peer(source, nothing, nothing.copy(), heard_s=now_s)
                self._peers[source.peer_id] = peer
                group.create_task(self._fetch_from(peer, past))
            give_up_s = self._limits.give_up_s
            if give_up_s is not None and now_s - self._progress_s > give_up_s:
                raise NetworkError(self._describe_failure())
            await self._clock.sleep(self._limits.discover_s)

    def _rank(self, source: Source) -> tuple[bool, int, float]:
        """Near ones first, then those that failed least, then by lot."""
        past = self._past.get(source.peer_id, _Past())
        draw = priorities(PeerId(self._transport.peer_id + source.peer_id), 1)[0]
        return not source.is_near, past.failures, float(draw)

    def _describe_failure(self) -> str:
        missing = int(self._missing().sum())
        return (
            f"{missing} of {int(self._wanted.sum())} chunks of {self._manifest.name} could not be "
            f"fetched: {len(self._peers)} peers that hold some of it answer; "
            "what was fetched is kept for the next try"
        )

    async def _fetch_from(self, peer: _Peer, past: _Past) -> None:
        peer_id = peer.source.peer_id
        pause_s = min(
            self._limits.shortest_pause_s * 2**past.failures, self._limits.longest_pause_s
        )
        try:
            await self._converse(peer)
            past.failures = 0
        except _Liar:
            log.warning("%s sent wrong bytes; it is not asked again", peer_id)
            past.is_liar = True
            self.liars.add(peer_id)
        except _Stalled:
            log.info("%s sends nothing; others are asked", peer_id)
            past.failures += 1
            pause_s = self._limits.stalled_pause_s
        except RemoteError as error:
            log.info("%s refuses: %s", peer_id, error)
            past.failures += 1
            pause_s = max(pause_s, error.retry_after_ms / 1000)
        except (NetworkError, ProtocolError, TimeoutError) as error:
            log.info("%s is lost as a source: %s", peer_id, error)
            past.failures += 1
        finally:
            past.not_before_s = self._clock.monotonic_s() + pause_s
            del self._peers[peer_id]
            for chunk in tuple(peer.expected):
                if chunk is not None:
                    self._forget_request(chunk, peer_id)
            self._share_out()

    async def _converse(self, peer: _Peer) -> None:
        """Ask one peer for chunks until it is gone or is of no more use."""
        digest = self._manifest.digest
        async with asyncio.timeout(self._limits.connect_s):
            stream = await self._transport.open(
                peer.source.peer_id, WEIGHTS_PROTOCOL, peer.source.addresses
            )
        async with Connection(stream) as connection:
            connection.maximum_payload_bytes = MAX_PAYLOAD_BYTES
            async with asyncio.timeout(self._limits.connect_s):
                await connection.say_hello(AskChunks(manifest_digest=digest))
            peer.expected.append(None)
            peer.heard_s = self._clock.monotonic_s()
            following = asyncio.ensure_future(self._follow(peer))
            try:
                await self._request_chunks(connection, peer)
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    async def _follow(self, peer: _Peer) -> None:
        """Hear what the peer holds on a stream of its own: behind chunks it would be old news."""
        stream = await self._transport.open(
            peer.source.peer_id, WEIGHTS_PROTOCOL, peer.source.addresses
        )
        question = AskChunks(manifest_digest=self._manifest.digest)
        try:
            async with Connection(stream) as connection:
                connection.maximum_payload_bytes = MAX_PAYLOAD_BYTES
                await connection.say_hello(question)
                while True:
                    held = await connection.receive_only(ChunksHeld)
                    self._heard_of_chunks(peer, held.bitmaps)
                    peer.is_followed = True
                    self._wake()
                    await self._clock.sleep(self._ask_again_s())
                    await connection.send(question)
        finally:
            peer.is_followed = False

    async def _request_chunks(self, connection: Connection, peer: _Peer) -> None:
        """Keep requests on their way until the stream breaks."""
        while True:
            while sum(item is not None for item in peer.expected) < (
                self._limits.requests_per_peer
            ):
                chunk = self._next_chunk(peer)
                if chunk is None:
                    break
                now_s = self._clock.monotonic_s()
                self._asked.setdefault(chunk, {})[peer.source.peer_id] = now_s
                self._stored.coming[chunk] = True
                if not peer.expected:
                    peer.heard_s = now_s
                peer.expected.append(chunk)
                await self._rate.take(self._manifest.locate(chunk)[2])
                await connection.send(GetChunk(chunk=chunk))
            if peer.expected:
                await self._receive(connection, peer)
            else:
                idle_s = IDLE_S if peer.is_followed else self._ask_again_s()
                if not await self._changed_within(idle_s):
                    peer.expected.append(None)
                    peer.heard_s = self._clock.monotonic_s()
                    await connection.send(AskChunks(manifest_digest=self._manifest.digest))

    def _ask_again_s(self) -> float:
        """Bitmaps of large models are rarer, so that they cost less than 1 % of a slow link."""
        return self._limits.ask_again_s + self._manifest.number_of_chunks / 4 / (32 * 1024)

    async def _changed_within(self, longest_s: float) -> bool:
        changed = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(longest_s):
                await changed.wait()
        return changed.is_set()

    async def _receive(self, connection: Connection, peer: _Peer) -> None:
        stall_s = max(self._limits.stall_s, 6 * self._chunk_s)
        try:
            async with asyncio.timeout(peer.heard_s + stall_s - self._clock.monotonic_s()):
                message = await connection.receive()
        except TimeoutError:
            raise _Stalled from None
        now_s = self._clock.monotonic_s()
        took_s, peer.heard_s = now_s - peer.heard_s, now_s
        if isinstance(message, Ping):
            await connection.send(Pong(nonce=message.nonce))
            return
        expected = peer.expected.popleft()
        match message:
            case ChunksHeld() if expected is None:
                self._heard_of_chunks(peer, message.bitmaps)
            case Chunk() if message.chunk == expected:
                self._chunk_s += (took_s - self._chunk_s) / 8
                await self._take_in(message.chunk, message.content, peer.source.peer_id)
            case Error():
                error = remote_error(message, peer.source.peer_id)
                if expected is None or error.code is not ErrorCode.CHUNK_NOT_HELD:
                    raise error
                peer.held[expected] = False
                self._forget_request(expected, peer.source.peer_id)
            case _:
                raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(message).__name__)

    def _heard_of_chunks(self, peer: _Peer, bitmaps: bytes) -> None:
        chunks = self._manifest.number_of_chunks
        half = -(-chunks // 8)
        if len(bitmaps) != 2 * half:
            raise ProtocolError(ErrorCode.BAD_FIELD, "bitmaps of another size")
        bits = np.frombuffer(bitmaps, dtype=np.uint8).reshape(2, half)
        held, coming = np.unpackbits(bits, axis=1, count=chunks).astype(np.bool_)
        was_fetching = peer.coming.any()
        peer.held, peer.coming = held.copy(), coming & ~held
        if was_fetching != peer.coming.any():
            self._share_out()

    def _share_out(self) -> None:
        """Our own chunks, among those who fetch now as far as we see."""
        fetching = [id_ for id_, peer in self._peers.items() if peer.coming.any()]
        chunks = self._manifest.number_of_chunks
        self._own = own_chunks(self._transport.peer_id, fetching, chunks)

    # --- chunks
    def _next_chunk(self, peer: _Peer) -> int | None:
        missing = self._missing()
        eligible = missing & peer.held
        fresh = eligible.copy()
        fresh[list(self._asked)] = False
        counts = holders(
            [other.held for other in self._peers.values()],
            [other.coming for other in self._peers.values()],
            len(missing),
        )
        chunk = choose_chunk(fresh, counts, self._own, self._order)
        if chunk is not None:
            return chunk
        # Nothing is left that nobody was asked for: help with what takes long elsewhere.
        late_s = self._clock.monotonic_s() - max(2.0, 3 * self._chunk_s)
        late = [
            (min(asked.values()), chunk)
            for chunk, asked in self._asked.items()
            if eligible[chunk]
            and peer.source.peer_id not in asked
            and len(asked) < 3
            and max(asked.values()) < late_s
        ]
        return min(late)[1] if late else None

    def _forget_request(self, chunk: int, peer_id: PeerId) -> None:
        asked = self._asked.get(chunk)
        if asked is not None:
            asked.pop(peer_id, None)
            if not asked:
                del self._asked[chunk]
                self._stored.coming[chunk] = False
        self._wake()

    async def _take_in(self, chunk: int, content: bytes, sender: PeerId | None) -> None:
        """Check and keep a chunk. Raises _Liar when its hash does not fit."""
        self.received_bytes += len(content)
        is_right = True
        if not self._stored.held[chunk]:
            is_right = await self._in_thread(self._stored.put_chunk, chunk, content)
        if sender is not None:
            self._forget_request(chunk, sender)
        if not is_right:
            raise _Liar
        now_s = self._clock.monotonic_s()
        self._progress_s = now_s
        self._arrivals.append((now_s, sender, len(content)))
        if not self._stored.held[chunk]:
            self._stored.keep(chunk)
            self._stored.coming[chunk] = False
        if not self._missing().any():
            self._finished.set()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _use_mirror(self, mirror: Mirror) -> None:
        """Fetch what no peer holds."""
        absent: ChunkMask = np.zeros(self._manifest.number_of_chunks, dtype=np.bool_)
        since_s = self._clock.monotonic_s()
        while True:
            now_s = self._clock.monotonic_s()
            known = [peer.held for peer in self._peers.values()]
            orphans = self._missing() & ~absent
            orphans[list(self._asked)] = False
            for held in known:
                orphans &= ~held
            chunk = choose_chunk(orphans, np.zeros(len(orphans), np.int64), self._own, self._order)
            if chunk is None or now_s - since_s < self._limits.mirror_after_s:
                if chunk is None:
                    since_s = now_s
                await self._clock.sleep(self._limits.ask_again_s)
                continue
            _, _, size_bytes = self._manifest.locate(chunk)
            me = self._transport.peer_id
            self._asked.setdefault(chunk, {})[me] = now_s
            self._stored.coming[chunk] = True
            try:
                content = await mirror.chunk(self._manifest.chunk_digest(chunk), size_bytes)
                if content is None:
                    absent[chunk] = True
                else:
                    await self._take_in(chunk, content, None)
                    self.from_mirrors += 1
            except _Liar:
                log.warning("the mirror %s has wrong bytes for chunk %d", mirror.name, chunk)
                absent[chunk] = True
            finally:
                self._forget_request(chunk, me)


class _Finished(Exception):
    """Everything is here."""


class _Liar(Exception):
    """Bytes that do not fit their hash."""


class _Stalled(Exception):
    """A peer that sends nothing."""


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
