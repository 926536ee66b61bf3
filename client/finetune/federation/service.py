"""The aggregator: a door over HTTP, and the clock that ends phases.

What is accepted is decided by ``rounds``. Here requests are told apart from noise before anything
of them is read: signature first, then whether the message is wanted, then a body of bounded size.
One event loop owns all state; only adding up and files leave it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aiohttp import web

from swarm.client.finetune.federated import counted_examples, moved, vector_length
from swarm.client.finetune.federation.files import DoneRound, FederationFiles, Progress, Tensors
from swarm.client.finetune.federation.messages import RoundState, body_limit, read_message
from swarm.client.finetune.federation.rounds import ROUND_ID_BYTES, Phase, Round
from swarm.client.finetune.federation.signing import SIGNATURE, answer_headers, check_request
from swarm.client.finetune.federation.terms import FederationTerms
from swarm.client.finetune.secure_sum import Words
from swarm.operator.doors import errors_are_codes
from swarm.ports import Clock
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.identity import Identity, PeerId

log = logging.getLogger(__name__)

POLL_S = 20.0
"""How long a question for news is kept waiting."""
WAITING_PER_PEER = 4
UPLOADS = 4
"""Vectors that are read at the same time; each may have hundreds of megabytes."""
SMALL_BODY_S = 30.0
_CHUNK_BYTES = 1 << 18
COLLECTED = {
    phase.value: phase for phase in (Phase.ADVERTISE, Phase.SHARE, Phase.MASKED, Phase.UNMASK)
}

Watcher = Callable[[int, Round], None]


class AggregatorService:
    """One federation; ``run`` until it is over, while ``application`` is served."""

    def __init__(
        self,
        files: FederationFiles,
        identity: Identity,
        *,
        clock: Clock,
        changed: Watcher | None = None,
    ) -> None:
        """``changed`` is told the number of the round at every step. Raises UsageErrors."""
        self._files = files
        self._identity = identity
        self._clock = clock
        self._changed = changed or (lambda number, round_: None)
        self._terms: FederationTerms = files.terms()
        self._progress = files.progress()
        self._adapter: Tensors = files.read_adapter(self._progress.adapter)
        self._length = vector_length(self._adapter)
        self._round = self._next_round()
        self._poke = asyncio.Event()
        self._news = asyncio.Event()
        self._waiting: Counter[PeerId] = Counter()
        self._uploads = asyncio.Semaphore(UPLOADS)
        self._stopping = False
        self._fetched: set[PeerId] = set()

    @property
    def done(self) -> tuple[DoneRound, ...]:
        return self._progress.done

    def application(self) -> web.Application:
        application = web.Application(middlewares=[errors_are_codes])
        application.router.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/v1/terms", self._get_terms),
                web.get("/v1/state", self._get_state),
                web.get("/v1/adapters/{sha256:[0-9a-f]{64}}", self._get_adapter),
                web.post("/v1/rounds/{round_id:[0-9a-f]{32}}/{phase}", self._take),
            ]
        )
        return application

    async def run(self) -> None:
        """All rounds that are left. Raises NoRouteError when a round fails again and again.

        Safe to cancel: the present round is then begun again by the next process.
        """
        while self._is_open:
            self._changed(self._number, self._round)
            await self._collect()
            self._round = self._next_round()
            self._tell()

    async def collected(self, patience_s: float) -> None:
        """Wait until all who were invited have the result, or for ``patience_s``."""
        try:
            async with asyncio.timeout(patience_s):
                while len(self._fetched) < len(self._terms.invited):
                    await self._news.wait()
        except TimeoutError:
            return

    def stop(self) -> None:
        """Let those who wait for news go."""
        self._stopping = True
        self._tell()

    # --- the clock
    async def _collect(self) -> None:
        """One round from its first message to its sum."""
        while True:
            if self._round.advance(self._clock.monotonic_s(), _fresh_id()):
                self._tell()
            if self._round.phase is Phase.SUM and await self._add_up():
                return
            self._poke.clear()
            left_s = max(0.0, self._round.deadline_s - self._clock.monotonic_s())
            try:
                async with asyncio.timeout(left_s):
                    await self._poke.wait()
            except TimeoutError:
                continue

    async def _add_up(self) -> bool:
        """Move the adapter and keep it; False when the round has to be repeated."""
        current = self._round
        try:
            total = await asyncio.to_thread(current.total)
            examples = counted_examples(total)
        except ProtocolError as error:
            log.warning("round %d does not add up: %s", self._number, error)
            current.repeat(current.stayed, self._clock.monotonic_s(), _fresh_id())
            self._tell()
            return False
        line = DoneRound(self._number, len(current.stayed), examples, current.attempts)
        self._adapter, self._progress = await asyncio.to_thread(self._keep, total, line)
        log.info("round %d: %d took part", line.number, line.participants)
        return True

    def _keep(self, total: Words, line: DoneRound) -> tuple[Tensors, Progress]:
        adapter = moved(self._adapter, total)
        stored = self._files.write_adapter(adapter)
        progress = Progress(stored, (*self._progress.done, line))
        self._files.write_progress(progress, previous=self._progress.adapter)
        return adapter, progress

    # --- the door
    async def _healthz(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _get_terms(self, request: web.Request) -> web.Response:
        return self._signed("", self._terms.to_json())

    async def _get_state(self, request: web.Request) -> web.Response:
        """The state; with ``after`` as soon as it is another one, or after a while."""
        peer, _ = self._caller(request)
        with self._counted(peer), contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                while request.query.get("after") == self._version and not self._stopping:
                    await self._news.wait()
        return self._signed(request.headers[SIGNATURE], self._state_for(peer).to_json())

    async def _get_adapter(self, request: web.Request) -> web.StreamResponse:
        """Its hash is in the signed state, so the file itself needs no signature."""
        peer, _ = self._caller(request)
        stored = self._progress.adapter
        if request.match_info["sha256"] != stored.sha256:
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "an adapter of another round")
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        response.content_length = stored.size_bytes
        with self._counted(peer):
            file = await asyncio.to_thread(self._files.adapter_path(stored).open, "rb")
            with file:
                await response.prepare(request)
                while chunk := await asyncio.to_thread(file.read, _CHUNK_BYTES):
                    await response.write(chunk)
                await response.write_eof()
        if not self._is_open:
            self._fetched.add(peer)
            self._tell()
        return response

    async def _take(self, request: web.Request) -> web.Response:
        peer, digest = self._caller(request)
        phase = COLLECTED.get(request.match_info["phase"])
        if phase is None:
            raise ProtocolError(ErrorCode.FOREIGN_OBJECT, "no such phase")
        round_id = bytes.fromhex(request.match_info["round_id"])
        if not self._round.is_known(peer, phase, round_id, digest):
            body = await self._body(request, phase, digest)
            message = read_message(
                phase, peer, body, invited=len(self._terms.invited), length=self._length
            )
            now_s = self._clock.monotonic_s()
            self._round.take(peer, phase, round_id, digest, message, now_s)
            self._changed(self._number, self._round)
            self._poke.set()
        return self._signed(request.headers[SIGNATURE], b"{}")

    def _caller(self, request: web.Request) -> tuple[PeerId, str]:
        terms = self._terms
        return check_request(
            request.headers,
            terms.federation_id,
            terms.invited,
            request.method,
            request.raw_path,
            self._clock.unix_s(),
        )

    @contextmanager
    def _counted(self, peer: PeerId) -> Iterator[None]:
        """Bounds what one participant has going on at a time. Raises ProtocolError."""
        if self._waiting[peer] >= WAITING_PER_PEER:
            raise ProtocolError(ErrorCode.NO_CAPACITY, "asks too often")
        self._waiting[peer] += 1
        try:
            yield
        finally:
            self._waiting[peer] -= 1

    async def _body(self, request: web.Request, phase: Phase, digest: str) -> bytes:
        """Raises ProtocolError: TOO_LARGE before it is read, TOO_SLOW, BAD_FIELD."""
        limit = body_limit(phase, len(self._terms.invited), self._length)
        if request.content_length is None or request.content_length > limit:
            raise ProtocolError(ErrorCode.TOO_LARGE, "a body without a length, or too long")
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise ProtocolError(ErrorCode.BAD_FIELD, "a compressed body")
        is_vector = phase is Phase.MASKED
        if is_vector and request.content_length != limit:
            raise ProtocolError(ErrorCode.BAD_TENSOR, "a vector of another length")
        left_s = self._round.deadline_s - self._clock.monotonic_s()
        try:
            async with asyncio.timeout(left_s if is_vector else min(left_s, SMALL_BODY_S)):
                if is_vector:
                    async with self._uploads:
                        body = await request.content.readexactly(request.content_length)
                else:
                    body = await request.content.readexactly(request.content_length)
        except TimeoutError as error:
            raise ProtocolError(ErrorCode.TOO_SLOW) from error
        except asyncio.IncompleteReadError as error:
            raise ProtocolError(ErrorCode.BAD_FIELD, "half a body") from error
        found = await asyncio.to_thread(lambda: hashlib.sha256(body).hexdigest())
        if not hmac.compare_digest(found, digest):
            raise ProtocolError(ErrorCode.BAD_SIGNATURE, "another body than was signed")
        return body

    def _signed(self, request_signature: str, body: bytes) -> web.Response:
        headers = answer_headers(self._identity, request_signature, body)
        return web.Response(body=body, content_type="application/json", headers=headers)

    # --- the state
    @property
    def _is_open(self) -> bool:
        return len(self._progress.done) < self._terms.rounds

    @property
    def _number(self) -> int:
        """Of the present round; after the last one that of the last."""
        return min(len(self._progress.done) + 1, self._terms.rounds)

    @property
    def _version(self) -> str:
        current = self._round
        return f"{self._progress.adapter.sha256[:16]}.{current.round_id.hex()}.{current.phase}"

    def _state_for(self, peer: PeerId) -> RoundState:
        current = self._round
        aggregator = current.aggregator
        phase = current.phase
        return RoundState(
            version=self._version,
            number=self._number,
            attempt=current.attempts,
            round_id=current.round_id or bytes(ROUND_ID_BYTES),
            phase=phase,
            adapter=self._progress.adapter,
            keys=tuple(aggregator.all_keys()) if phase is Phase.SHARE else (),
            shares=aggregator.shares_for(peer) if phase is Phase.MASKED else None,
            stayed=tuple(aggregator.stayed()) if phase is Phase.UNMASK else (),
        )

    def _next_round(self) -> Round:
        """The one that is to be collected; after the last one it stays in ``DONE``."""
        terms = self._terms
        following = Round(
            terms.invited,
            terms.minimum,
            self._length,
            train_s=terms.train_s,
            answer_s=terms.answer_s,
        )
        if self._is_open:
            following.begin(_fresh_id(), self._clock.monotonic_s())
        return following

    def _tell(self) -> None:
        self._changed(self._number, self._round)
        self._news.set()
        self._news = asyncio.Event()


def _fresh_id() -> bytes:
    return secrets.token_bytes(ROUND_ID_BYTES)
